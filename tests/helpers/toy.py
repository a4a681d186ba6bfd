"""A toy world for tests: a small tokenizer, a small model's spec, and recordings on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rich.console import Console

QUIET = Console(file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
WORDS = ["zero", "one", "two", "three", "four", "five", "high", "low", "?", ".", ":"]
TALK = ["system", "user", "assistant", "This", "is", "the", "audio", "What", "do", "you", "hear"]
TALK += ["How", "many", "Transcribe", "You", "are"]
SPECIAL = ["<|endoftext|>", "<|mask|>", "<|startoftext|>", "<|start|>", "<|end|>", "<|eot|>"]
TEMPLATE = (
    "{{ '<|startoftext|>' }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>' + m['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>' }}{% endif %}"
)
EOS, MASK = 0, 1


def write_tokenizer(folder: Path) -> Path:
    """Write a word-level tokenizer with a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, "<unk>", *WORDS, *TALK, "<", "audio", ">", "helpful", "voice", "a"]
    table = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[<>.?:]"), "isolated"),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer as transformers does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def tone(pitch: float, seconds: float = 0.4, rate: int = 16000) -> np.ndarray:
    """A sine at a pitch in Hz."""
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype("f4")


def write_tones(folder: Path, count: int = 8) -> Path:
    """Write recordings and a manifest that asks whether each tone is high or low."""
    rows = []
    for i in range(count):
        high = i % 2 == 0
        name = f"tone{i}.wav"
        soundfile.write(folder / name, tone(1500 + 40 * i if high else 200 + 10 * i), 16000)
        rows.append(
            {
                "audio_filepath": name,
                "input": "What do you hear ?",
                "target": "high" if high else "low",
                "transcription": "one two",
                "duration": 0.4,
                "seed_transcript": "[00:00-00:01] (tone)",
                "dataset": "toy",
                "audio_id": f"tone{i}",
            }
        )
    path = folder / "train.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def write_world(folder: Path, **more: str) -> Path:
    """Write a tokenizer, tones, and ``pairs.json``: their rows with more in each."""
    write_tokenizer(folder / "tokenizer")
    rows = json.loads(write_tones(folder).read_text())
    (folder / "pairs.json").write_text(json.dumps([row | more for row in rows]))
    return folder


def spec(tokenizer: Path) -> dict[str, Any]:
    """A whole model small enough to train in seconds."""
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    return {
        "format": 1,
        "encoder": {"name": "tiny"},
        "adapters": {"semantic": {"name": "conv", "stride": 4}},
        "backbone": {
            "name": "llada",
            "tokenizer": str(tokenizer),
            "config": {
                "d_model": 32,
                "n_layers": 2,
                "n_heads": 2,
                "n_kv_heads": 2,
                "mlp_hidden_size": 64,
                "embedding_size": vocabulary,
                "vocab_size": vocabulary,
                "max_sequence_length": 256,
                "mask_token_id": MASK,
                "eos_token_id": EOS,
                "pad_token_id": EOS,
                "rope_theta": 10000.0,
                "weight_tying": False,
            },
        },
        "objective": "masked",
        "sampler": "blockwise",
        "train": ["adapters"],
    }
