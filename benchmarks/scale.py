"""What the LLaDA-8B recipes need on 1, 8 and 64 GPUs: python benchmarks/scale.py.

Rows, tokens, hours and memory are those of `diffa train RECIPE --dry-run`: nothing is trained. Time
is arithmetic on them: floating-point operations of every forward and backward over the GPU's stated
rate times an assumed utilisation (`--tflops`, `--mfu`); both are written down, and neither was
measured. Writes benchmarks/results/scale.json, from which docs/scale.md is built.
"""

from __future__ import annotations

import argparse
import io
import math
import os
from pathlib import Path
from typing import Any

from reports import RESULTS, write_report
from rich.console import Console

import diffa
from diffa.trainers import Recipe, train
from diffa.trainers.config_sections import StageConfig

GPUS = (1, 8, 64)
GIB = 2**30
WINDOW = 30  # seconds that Whisper pads a recording to


def main() -> None:
    """Estimate every stage of every recipe on every number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=["diffa-1", "diffa-2"])
    parser.add_argument("--tflops", type=float, default=989.0, help="dense bf16 rate of one GPU")
    parser.add_argument("--gpu", default="H100 SXM 80 GB, data sheet")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the rate that is reached")
    parser.add_argument("--json", type=Path, default=RESULTS / "scale.json")
    args = parser.parse_args()
    rate = args.tflops * 1e12 * args.mfu
    rows = [row for name in args.recipes for row in estimates(name, rate)]
    report = {"gpu": args.gpu, "tflops": args.tflops, "mfu": args.mfu, "rows": rows}
    write_report(report, args.json)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


def estimates(name: str, rate: float) -> list[dict[str, Any]]:
    """Rows of the table for one recipe."""
    recipe = Recipe.read(name)
    model = diffa.build(recipe.spec, device="meta")
    rows: list[dict[str, Any]] = []
    for gpus in GPUS:
        os.environ["WORLD_SIZE"] = str(gpus)
        quiet = Console(file=io.StringIO())
        report = train(name, out="unused", dry_run=True, console=quiet)
        for stage, plan in zip(recipe.stages, report.stages, strict=True):
            work = operations(model, recipe, stage, plan)
            rows.append(row(name, stage, plan, gpus, work / (gpus * rate)))
    del os.environ["WORLD_SIZE"]
    order = [f"{name}: {stage.name}" for stage in recipe.stages]
    return sorted(rows, key=lambda one: order.index(one["stage"]))


def operations(model: Any, recipe: Recipe, stage: StageConfig, plan: Any) -> float:
    """Floating-point operations of one epoch: 2 per weight and slot forward, 2 for what flows
    back through frozen weights, 2 more where they learn, 2 for computing activations again."""
    shape = model.backbone
    tables = 2 * shape.vocab.size * shape.width  # embedding and head: few rows meet them
    read_by_all = sum(p.numel() for p in shape.parameters()) - tables
    passes = 4 + 2 * ("backbone" in stage.train) + 2 * recipe.config.gradient_checkpointing
    if stage.learner.name == "preferences":
        passes = (passes + 2) * samples(stage)  # and the reference reads too
    estimate = plan.estimate
    windows = max(1, math.ceil(3600 * estimate.hours / plan.rows / WINDOW)) * plan.rows
    frames = windows * WINDOW * model.encoder.out.rate
    encoder_work = 2.0 * sum(p.numel() for p in model.encoder.parameters()) * frames
    return encoder_work + float(passes) * read_by_all * (
        estimate.tokens + estimate.audio_embeddings
    )


def samples(stage: StageConfig) -> int:
    """Draws of the likelihood per answer, of a preference stage."""
    objective = stage.objective
    return int(objective.get("samples", 1)) if isinstance(objective, dict) else 1


def row(name: str, stage: StageConfig, plan: Any, gpus: int, seconds: float) -> dict[str, Any]:
    """One line of the table; ``seconds`` are those of an epoch."""
    estimate = plan.estimate
    memory = estimate.memory
    split = (memory.weights + memory.gradients + memory.optimizer) / gpus + memory.activations
    epochs = (
        stage.epochs
        or plan.steps * stage.batch_size * stage.gradient_accumulation_steps * gpus / plan.rows
    )
    return {
        "stage": f"{name}: {plan.name}",
        "learns": f"{plan.trained / 1e6:.0f} M",
        "GPUs": gpus,
        "GiB each, DDP": f"{memory.total / GIB:.0f}",
        "GiB each, FSDP2": f"{split / GIB:.0f}",
        "tokens/s": f"{(estimate.tokens + estimate.audio_embeddings) / seconds:,.0f}",
        "audio hours/s": f"{estimate.hours / seconds:.3f}",
        "epochs": f"{epochs:g}",
        "days": f"{epochs * seconds / 86400:.2g}",
    }


if __name__ == "__main__":
    main()
