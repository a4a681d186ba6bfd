"""Every part that diffa ships keeps to its kind's conformance suite."""

from __future__ import annotations

from pathlib import Path

from diffa.testing import AdapterSuite, BackboneSuite, EncoderSuite, ObjectiveSuite, SamplerSuite

GOLDEN = Path(__file__).parents[1] / "golden" / "diffa1-tiny"

SMALL = {
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 24,
    "max_sequence_length": 64,
    "vocab_size": 20,
    "eos_token_id": 17,
    "pad_token_id": 18,
    "mask_token_id": 19,
}
LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 20,
    "eos_token_id": 17,
    "pad_token_id": 18,
}


class TestTiny(EncoderSuite):
    name = "tiny"
    options = {"width": 16, "layers": 2, "heads": 2, "num_mel_bins": 16, "window_seconds": 1.0}
    seconds = 0.8


class TestTinyWithATail(EncoderSuite):
    name = "tiny"
    options = {
        "width": 16,
        "layers": 2,
        "heads": 2,
        "num_mel_bins": 16,
        "window_seconds": 4.0,
        "trailing_silence": 0.2,
    }
    seconds = 0.8


class TestWhisper(EncoderSuite):
    name = "whisper"
    options = {"checkpoint": str(GOLDEN / "whisper")}


class TestConv(AdapterSuite):
    name = "conv"


class TestConvOfAnotherStride(AdapterSuite):
    name = "conv"
    options = {"stride": 3, "final_relu": False}


class TestNumberedConv(AdapterSuite):
    name = "conv"
    options = {"word_numbers": 4}


class TestQFormer(AdapterSuite):
    name = "qformer"
    options = {"num_queries": 5, "intermediate_size": 16, "dropout": 0.0, "encoder_layers": 2}
    reads_padding = True
    idle = ("*.key.bias",)  # softmax does not see what is added to all of its scores


class TestPrompt(AdapterSuite):
    name = "prompt"
    options = {"num_embeddings": 3}
    uses_audio = False


class TestLinear(AdapterSuite):
    name = "linear"
    options = {"stride": 3, "intermediate_size": 16}


class TestLLaDA(BackboneSuite):
    name = "llada"
    options = {"config": SMALL}


class TestLLaDATied(BackboneSuite):
    name = "llada"
    options = {"config": {**SMALL, "weight_tying": True, "n_kv_heads": 1}}


class TestLlama(BackboneSuite):
    name = "llama"
    options = {"config": LLAMA}


class TestMasked(ObjectiveSuite):
    name = "masked"
    unbiased = True


class TestMaskedByCount(ObjectiveSuite):
    name = "masked"
    options = {"masking": "count", "normalization": "sample", "schedule": "cosine"}
    unbiased = True


class TestMaskedWithoutWeights(ObjectiveSuite):
    name = "masked"
    options = {"normalization": "masked"}


class TestVRPO(ObjectiveSuite):
    name = "vrpo"
    unbiased = True


class TestAutoregressive(ObjectiveSuite):
    name = "autoregressive"
    random = False


class TestGreedy(SamplerSuite):
    name = "greedy"
    exact = {"temperature": 1.0}


class TestBlockwise(SamplerSuite):
    name = "blockwise"
    options = {"block_length": 4}
    exact = {"temperature": 1.0, "ranking": "random"}


class TestBlockwiseTokenByToken(SamplerSuite):
    name = "blockwise"
    options = {"block_length": 1, "cache": "prefix", "stop_at_eos": False}
    exact = {"temperature": 1.0}


class TestBlockwiseByThreshold(SamplerSuite):
    name = "blockwise"
    options = {"block_length": 4, "threshold": 0.6, "cache": "dual"}
    exact = {"temperature": 1.0, "block_length": 1}


class TestBlockwiseByFactor(SamplerSuite):
    name = "blockwise"
    options = {"block_length": 5, "factor": 1.0, "cache": "prefix", "ranking": "margin"}
    exact = {"temperature": 1.0, "block_length": 1}


class TestBlockwiseByEntropy(SamplerSuite):
    name = "blockwise"
    options = {"block_length": 6, "entropy_bound": 0.5}
    exact = {"temperature": 1.0, "block_length": 1}


class TestBlockwiseGuided(SamplerSuite):
    name = "blockwise"
    options = {
        "block_length": 4,
        "steps": 6,
        "cfg_scale": 1.0,
        "cfg_drop": "audio",
        "cache": "dual",
    }
    exact = {"temperature": 1.0, "block_length": 1, "steps": None}
