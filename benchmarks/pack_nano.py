"""Write what training nano left as folders in the published layouts, in float16.

python benchmarks/pack_nano.py RUN/model TO: whisper/, llada/ (or llama/) and diffa/ from the parts
that the run has trained.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffa.backbones import llama
from diffa.checkpoints.read import find_checkpoint

_CONNECTORS = {"semantic": "semantic_connector", "acoustic": "acoustic_connector"}


def main() -> None:
    """Write every part that the run holds weights of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder that `diffa train` calls RUN/model")
    parser.add_argument("to", type=Path)
    args = parser.parse_args()
    spec = json.loads((args.run / "spec.json").read_text(encoding="utf-8"))
    state = load_file(args.run / "model.safetensors")
    encoder, language = part(state, "encoder."), part(state, "backbone.transformer.")
    if encoder:
        whisper(part(encoder, "encoder."), args.to / "whisper")
    if language:
        backbone(spec["backbone"], language, args.to)
    if part(state, "adapters."):
        adapters(state, args.to / "diffa")


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def write(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Write weights in float16 beside a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {key: value.to(torch.float16).contiguous() for key, value in state.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1) + "\n", encoding="utf-8")
    print(folder, f"{sum(value.numel() for value in half.values()) / 1e6:.2f} M parameters")


def whisper(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the encoder as a Whisper of whatever size its weights have."""
    width, positions = state["layer_norm.weight"].shape[0], state["embed_positions.weight"].shape[0]
    hidden, mels = state["layers.0.fc1.weight"].shape[0], state["conv1.weight"].shape[1]
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
    heads = width // 32
    write(
        {f"model.encoder.{key}": value for key, value in state.items()},
        {
            "model_type": "whisper", "architectures": ["WhisperModel"], "d_model": width,
            "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": hidden,
            "num_mel_bins": mels, "max_source_positions": positions, "decoder_layers": 1,
            "decoder_attention_heads": heads, "decoder_ffn_dim": hidden, "vocab_size": 16,
            "activation_function": "gelu", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1, "scale_embedding": False,
        },
        folder,
    )  # fmt: skip
    settings = {
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": mels, "n_fft": 400,
        "hop_length": 160, "sampling_rate": 16000, "chunk_length": positions * 320 // 16000,
        "n_samples": positions * 320, "nb_max_frames": 2 * positions, "padding_value": 0.0,
        "return_attention_mask": False, "padding_side": "right",
    }  # fmt: skip
    text = json.dumps(settings, indent=1) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def backbone(options: Mapping[str, Any], state: Mapping[str, Tensor], to: Path) -> None:
    """Write the language model in LLaDA's layout or Llama's, with its tokenizer."""
    config = options.get("config") or json.loads(
        (find_checkpoint(options["checkpoint"], weights=False) / "config.json").read_text(
            encoding="utf-8"
        )
    )
    if options["name"] == "llada":
        fixed = {
            "architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama",
            "activation_type": "silu", "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True,
        }  # fmt: skip
        named = {f"model.transformer.{key}": value for key, value in state.items()}
        config = {**fixed, **config}
    else:
        inner = {new: old for old, new in llama._BLOCK_KEYS.items()}
        outer = {new: old for old, new in llama._OUTER_KEYS.items()}
        named = {}
        for key, value in state.items():
            first, *rest = key.split(".")
            name = f"model.layers.{rest[0]}.{inner[rest[1]]}" if first == "blocks" else outer[first]
            named[f"{name}.{key.rpartition('.')[2]}"] = value
        config = {"architectures": ["LlamaForCausalLM"], **config}
    folder = to / options["name"]
    write(named, config, folder)
    words = options.get("tokenizer") or options["checkpoint"]  # ids that the model was trained with
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(find_checkpoint(words, weights=False) / name, folder / name)


def adapters(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapters under the names of DIFFA's connectors."""
    named = {
        f"{connector}.{key}": value
        for name, connector in _CONNECTORS.items()
        for key, value in part(state, f"adapters.{name}.").items()
    }
    write(named, {"architectures": ["DIFFAModel"]}, folder)


if __name__ == "__main__":
    main()
