"""Every encoder with every adapter and every backbone: built dry, and run where it is quick."""

import pytest
import torch
from backbones.test_transformers_backbones import DREAM, MODELS
from helpers.families import CONFIGS

import diffa
from diffa.errors import PluginError, SpecError
from diffa.spec import registry

LLADA = {
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_hidden_size": 24,
    "vocab_size": 40,
    "mask_token_id": 39,
    "eos_token_id": 3,
    "max_sequence_length": 4096,
}
MOE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "expert_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 40,
    "mask_token_id": 39,
    "eos_token_id": 3,
    "max_position_embeddings": 4096,
}
TINY = {"name": "tiny", "width": 16, "layers": 4, "heads": 2, "window_seconds": 1.0}
SMALL = {"intermediate_size": 16, "num_queries": 3}

QWEN = MODELS["qwen2"] | {"max_position_embeddings": 4096, "mask_token_id": 35}
LLADA2 = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
    "vocab_size": 40,
    "mask_token_id": 39,
    "pad_token_id": 3,
}

ENCODERS = {
    "tiny": TINY,
    "whisper": {"name": "whisper"},  # its configuration ships with diffa
    "mel": {"name": "mel"},
    "kaldi": {"name": "mel", "filterbank": "kaldi"},
    "timm-patches": {"name": "timm", "num_mel_bins": 32, "window_seconds": 0.64},
    "timm-convolutions": {
        "name": "timm",
        "model": "resnet10t",
        "num_mel_bins": 64,
        "window_seconds": 0.64,
    },
    "stack": {"name": "stack", "first": TINY, "second": {"name": "mel"}},
    **{name: {"name": "pretrained", "config": config} for name, config in CONFIGS.items()},
}
ADAPTERS = {
    "cif": {"name": "cif"},
    "conv": {"name": "conv"},
    "ctc": {"name": "ctc"},
    "experts": {"name": "experts", "intermediate_size": 16},
    "linear": {"name": "linear", "intermediate_size": 16},
    "perceiver": {"name": "perceiver", **SMALL},
    "pool": {"name": "pool", "mix_layers": True},
    "prompt": {"name": "prompt", "num_embeddings": 2},
    "qformer": {"name": "qformer", "encoder_layers": 1, **SMALL},
    "window": {"name": "window", **SMALL},
}
BACKBONES = {
    "causal": {"name": "causal", "config": MODELS["qwen2"] | {"max_position_embeddings": 4096}},
    "dream": {"name": "dream", "config": DREAM | {"max_position_embeddings": 4096}},
    "fastdllm2": {"name": "fastdllm2", "config": QWEN, "block_length": 8},
    "llada": {"name": "llada", "config": LLADA},
    "llada-moe": {"name": "llada-moe", "config": MOE},
    "llada2": {"name": "llada2", "config": LLADA2},
    "llama": {"name": "llama", "config": MODELS["llama"] | {"max_position_embeddings": 4096}},
    "sdar": {"name": "sdar", "config": QWEN},
}
CAUSAL = {"causal", "llama"}


def spec(encoder, adapter, backbone):
    masked = backbone not in CAUSAL
    return {
        "encoder": ENCODERS[encoder],
        "adapters": {"audio": ADAPTERS[adapter]},
        "backbone": BACKBONES[backbone],
        "sampler": {"name": "blockwise", "block_length": 4} if masked else "greedy",
        "objective": "masked" if masked else "autoregressive",
    }


def test_no_part_is_forgotten():
    for kind, known in (("encoder", ENCODERS), ("adapter", ADAPTERS), ("backbone", BACKBONES)):
        own = {part.name for part in registry.list_parts(kind) if part.is_builtin}
        assert own == {part["name"] for part in known.values()}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_combination_builds_without_memory(encoder):
    """The encoder is built once; each backbone and adapter then takes its place in the model."""
    model = diffa.build(spec(encoder, "pool", "llada"), device="meta")
    for backbone in BACKBONES:
        parts = spec(encoder, "pool", backbone)
        del parts["encoder"]
        with torch.device("meta"):
            model = diffa.swap(model, **parts)
            for adapter in ADAPTERS.values():
                swapped = diffa.swap(model, adapters={"audio": adapter})
                assert all(value.is_meta for value in swapped.parameters())
                counts = swapped.adapters["audio"].out_lengths(
                    torch.tensor([0, 50, 1500], device="cpu")
                )
                assert (counts.diff() >= 0).all()


# each part at least once, in pairs that differ
SOUNDING = [
    ("tiny", "pool", "llada"),
    ("mel", "window", "dream"),
    ("timm-patches", "perceiver", "causal"),
    ("stack", "cif", "llama"),
    ("wavlm", "ctc", "llada"),
    ("parakeet", "experts", "dream"),
    ("qwen-omni", "qformer", "causal"),
    ("ast", "conv", "llada"),
    ("clap", "linear", "llama"),
    ("tiny", "linear", "llada-moe"),
    ("tiny", "pool", "sdar"),
    ("mel", "pool", "llada2"),
    ("tiny", "linear", "fastdllm2"),
]


@pytest.mark.parametrize("names", SOUNDING, ids="-".join)
def test_a_combination_answers_and_a_batch_equals_its_rows(names):
    model = diffa.build(spec(*names))
    rate = model.encoder.sample_rate
    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(int(s * rate), generator=generator) for s in (1.0, 0.6)]
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    batch = model.generate(prompts, waves, audio_at=[1, 2], max_tokens=4)
    for row in range(2):
        alone = model.generate(prompts[row], waves[row], audio_at=row + 1, max_tokens=4)
        assert batch.tokens[row].tolist() == alone.tokens[0].tolist()


def test_a_missing_library_disturbs_only_its_part(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PluginError, match=r"diffa-audio\[timm\]"):
        diffa.build(spec("timm-patches", "pool", "llada"), device="meta")
    diffa.build(spec("mel", "pool", "llada"), device="meta")


def test_a_masked_backbone_with_a_causal_sampler_is_refused():
    with pytest.raises(SpecError, match="greedy"):
        diffa.build(spec("tiny", "pool", "dream") | {"sampler": "greedy"}, device="meta")
