"""Run by test_distributed.py in every process: train a recipe as torchrun and accelerate say."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

import diffa

CONFIGS = Path(diffa.__file__).parent / "assets" / "configs" / "accelerate"


def follow(name: str) -> None:
    """Set what `accelerate launch --config_file` sets for a shipped configuration."""
    held = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if held["distributed_type"] != "FSDP":
        return
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for key, value in held["fsdp_config"].items():
        said = "TRANSFORMER_CLS_TO_WRAP" if key.endswith("cls_to_wrap") else key[5:].upper()
        os.environ[f"FSDP_{said}"] = str(value).lower() if isinstance(value, bool) else str(value)
    allow_cpu()


def allow_cpu() -> None:
    """Let accelerate shard on CPUs: it does so for every device but them, with the same code."""
    from accelerate.state import AcceleratorState, DistributedType

    begin = AcceleratorState.__init__

    def init(self: Any, *words: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *words, fsdp_plugin=fsdp_plugin, **options)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def main() -> None:
    """Train what the command line names: CONFIGURATION RECIPE OUT [resume]."""
    torch.set_num_threads(1)
    follow(sys.argv[1])
    from diffa.trainers import run as running

    seen: list[bool] = []
    is_sharded = running.is_sharded

    def note(model: Any) -> bool:
        seen.append(is_sharded(model))
        return seen[-1]

    running.is_sharded = note
    running.train(sys.argv[2], out=sys.argv[3], resume=len(sys.argv) > 4, device="cpu")
    print(f"split: {seen}")


if __name__ == "__main__":
    main()
