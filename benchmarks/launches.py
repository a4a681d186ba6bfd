"""Kernels and host syncs of a decoding step: python benchmarks/launches.py --json FILE.

Counted on a stand-in for a GPU (``diffa.testing.device``), so that no GPU is needed: a LLaDA of 32
narrow layers in bfloat16, one question, blocks of 32 tokens. Steps three to seven are counted: the
first two enter a block. Launches and syncs do not depend on the width of the layers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from reports import RESULTS, write_report

import diffa
from diffa.canvas.batch import make_canvas, validate_inputs
from diffa.canvas.denoiser import Denoiser
from diffa.testing.device import StandInDevice

LENGTH, BLOCK, STEPS = 64, 32, 7
CONFIG = {
    "d_model": 64, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 96, "vocab_size": 128,
    "embedding_size": 128, "max_sequence_length": 1024, "rope_theta": 10000.0,
    "mask_token_id": 127, "eos_token_id": 126, "pad_token_id": 126,
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "steps": {"steps": LENGTH}, "threshold": {"threshold": 0.999}, "factor": {"factor": 0.1},
}  # fmt: skip


def samplers() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, options and backbone of everything that is counted."""
    for rule, options in RULES.items():
        for cache in ("none", "prefix", "dual"):
            yield f"{rule}, {cache}", {"name": "blockwise", **options, "cache": cache}, "llada"
    dual = {"name": "blockwise", "cache": "dual", "steps": LENGTH}
    yield "guided, dual", {**dual, "cfg_scale": 0.5}, "llada"
    yield "vicinity, dual", {**dual, "vicinity_window": 8}, "llada"
    yield "suffix window", {"name": "blockwise", "steps": LENGTH, "suffix_window": 32}, "llada"
    yield "drift, dual", {**dual, "drift_threshold": 0.01}, "llada"
    for name in ("wino", "remdm", "prophet", "speculative", "revise"):
        yield name, {"name": name}, "llada"
    yield "growing", {"name": "growing", "initial_length": BLOCK}, "llada"
    yield "block-causal, prefix", {"name": "blockwise", "cache": "prefix"}, "block"
    yield "edit, block-causal", {"name": "edit"}, "block"


def count(options: dict[str, Any], backbone: str, layers: int) -> dict[str, Any]:
    """Launches and syncs of the steps of a sampler."""
    options = {"stop_at_eos": False, "block_length": BLOCK, **options}
    blocks = BLOCK if backbone == "block" else None
    config = {**CONFIG, "n_layers": layers}
    spec = {
        "format": 1,
        "encoder": {"name": "tiny", "width": 16, "layers": 1, "heads": 1},
        "adapters": {"audio": {"name": "linear", "intermediate_size": 16}},
        "backbone": {"name": "llada", "config": config, "block_length": blocks},
        "sampler": options,
    }
    model = diffa.build(spec, device="cpu").eval().to(torch.bfloat16).to("cuda:0")
    inputs = validate_inputs(model.backbone.vocab, torch.arange(40), None, None, LENGTH, 0, None)
    canvas = make_canvas(model.backbone, inputs, [None])
    device, steps = StandInDevice.current, []
    device.reset()
    for _ in model.sampler(canvas, Denoiser(model.backbone, canvas)):
        steps.append((device.launches, device.syncs))
        device.reset()
        if len(steps) == STEPS:
            break
    within = steps[2:]
    return {
        "launches": statistics.median(launches for launches, _ in within),
        "syncs": statistics.median(syncs for _, syncs in within),
        "first_launches": steps[0][0],
        "first_syncs": steps[0][1],
    }


def main() -> None:
    """Count, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="Names of samplers to count.")
    parser.add_argument("--json", type=Path, default=RESULTS / "launches.json")
    args = parser.parse_args()
    table: dict[str, Any] = {}
    with StandInDevice(), torch.no_grad():
        for name, options, backbone in samplers():
            if args.only and name not in args.only:
                continue
            table[name] = row = count(options, backbone, args.layers)
            print(f"{name:24}" + "".join(f"  {key} {value:g}" for key, value in row.items()))
    write_report({"layers": args.layers, "samplers": table}, args.json)


if __name__ == "__main__":
    main()
