"""Tokens per forward against accuracy, for every sampler on a trained model: table, JSON, plot.

    python benchmarks/nano_decode.py --manifest test.json

The manifest's targets are the answers. Each seed draws its own items from it (and seeds the
samplers that draw), so the spread over seeds is that of the test set.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plot import Point, scatter
from reports import RESULTS, write_report

import diffa
from diffa.data.manifest import Manifest
from diffa.data.samples import Sample

BLOCK = 16
DUAL: dict[str, Any] = {"name": "blockwise", "block_length": BLOCK, "cache": "dual"}
PLAIN: dict[str, Any] = {"name": "blockwise", "block_length": BLOCK}
SAMPLERS: dict[str, dict[str, Any]] = {
    "one per step": PLAIN,
    "prefix": {**PLAIN, "cache": "prefix"},
    "dual": DUAL,
    "dual, vicinity 4": {**DUAL, "vicinity_window": 4},
    "suffix 8": {**PLAIN, "suffix_window": 8},
    "audio every 4": {**PLAIN, "audio_refresh_interval": 4},
    "drift .1": {**DUAL, "drift_threshold": 0.1},
    "threshold .9": {**PLAIN, "threshold": 0.9},
    "threshold .7": {**PLAIN, "threshold": 0.7},
    "factor 1": {**PLAIN, "factor": 1.0},
    "factor 1, dual": {**DUAL, "factor": 1.0},
    "entropy .1": {**PLAIN, "entropy_bound": 0.1},
    "local leap": {**PLAIN, "threshold": 0.9, "neighbor_threshold": 0.75},
    "run threshold": {**PLAIN, "threshold": 0.9, "run_threshold": 0.4},
    "KLASS": {**PLAIN, "threshold": 0.6, "kl_threshold": 0.015},
    "credit": {**PLAIN, "threshold": 0.9, "credit_strength": 0.7},
    "prophet": {"name": "prophet", "block_length": BLOCK},
    "wino": {"name": "wino", "block_length": BLOCK},
    "remdm": {"name": "remdm", "block_length": BLOCK},
    "growing": {
        "name": "growing",
        "block_length": BLOCK,
        "initial_length": BLOCK,
        "threshold": 0.9,
    },
    "speculative": {"name": "speculative", "block_length": BLOCK},
    "revise": {
        "name": "revise",
        "block_length": BLOCK,
        "threshold": 0.9,
    },  # without a draft
}


class Tally(NamedTuple):
    """One sampler on one seed's items."""

    accuracy: float
    tokens_per_forward: float
    answers: list[list[int]]


def normalize(text: str) -> str:
    """Lower case, without punctuation: what counts as the same answer."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def run(
    model: Any, items: list[Sample], *, most: int, seed: int, batch: int, waves: dict[str, Any]
) -> Tally:
    """Answer every item; a row's forward passes count until that row is finished."""
    chat, eos = model.chat_format, model.backbone.vocab.eos
    right, tokens, num_forwards, answers = 0, 0, 0, list[list[int]]()
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        prompts = [chat.encode(item.question) for item in part]
        steps = list(
            model.stream(
                [prompt.tokens for prompt in prompts],
                [waves[item.key] for item in part],
                audio_at=[prompt.audio_at or 0 for prompt in prompts],
                max_tokens=most,
                seeds=[seed * 100_003 + start + row for row in range(len(part))],
            )
        )
        done = torch.stack([step.final.all(dim=1) for step in steps])
        num_forwards += int((~done).sum()) + len(part)
        for row, item in enumerate(part):
            ids = steps[-1].tokens[row].tolist()
            tokens += ids.index(eos) + 1 if eos in ids else len(ids)
            answers.append(ids)
            right += normalize(chat.decode(torch.tensor(ids))) == normalize(item.target)
    return Tally(right / len(items), tokens / num_forwards, answers)


def load_waves(model: Any, items: list[Sample]) -> dict[str, Any]:
    """Return the waveform of each item, read once."""
    from diffa.audio import prepare

    return {item.key: prepare(item.audio, model.encoder.sample_rate) for item in items}


def measure(model: Any, source: Manifest, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every sampler on the same items, seed by seed."""
    tallies: dict[str, list[Tally]] = {name: [] for name in SAMPLERS}
    for seed in range(args.seeds):
        order = random.Random(seed).sample(range(len(source)), min(args.items, len(source)))
        items = [source[index] for index in order]
        waves = load_waves(model, items)
        for name, sampler in SAMPLERS.items():
            other = diffa.swap(model, sampler=sampler)
            tally = run(
                other, items, most=args.max_tokens, seed=seed, batch=args.batch, waves=waves
            )
            tallies[name].append(tally)
            print(f"seed {seed}  {name:18} {tally.accuracy:6.3f} {tally.tokens_per_forward:6.2f}")
    return [line(name, tallies) for name in SAMPLERS]


def line(name: str, tallies: dict[str, list[Tally]]) -> dict[str, Any]:
    """One row of the report: means over seeds, spread, and agreement with two references."""
    mine = tallies[name]

    def same(other: str) -> float:
        pairs = [
            a == b
            for one, two in zip(mine, tallies[other], strict=True)
            for a, b in zip(one.answers, two.answers, strict=True)
        ]
        return round(sum(pairs) / len(pairs), 4)

    accuracy = [tally.accuracy for tally in mine]
    return {
        "name": name,
        "accuracy": round(statistics.mean(accuracy), 4),
        "spread": round(statistics.stdev(accuracy), 4) if len(accuracy) > 1 else 0.0,
        "tokens_per_forward": round(statistics.mean(t.tokens_per_forward for t in mine), 3),
        "same_as_one_per_step": same("one per step"),
        "same_as_dual": same("dual"),
        "sampler": SAMPLERS[name],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    model = diffa.build(args.spec)
    rows = measure(model, Manifest(args.manifest), args)
    digest = model.spec.digest()
    report = {"spec": digest, "items": args.items, "seeds": args.seeds, "rows": rows}
    target = RESULTS / f"nano-decode-{digest}"
    write_report(report, target.with_suffix(".json"))
    points = [
        Point(row["tokens_per_forward"], 100 * row["accuracy"], row["name"], 100 * row["spread"])
        for row in rows
    ]
    title = "Quality against speed, every sampler"
    scatter(
        points,
        target.with_suffix(".svg"),
        x="tokens per forward",
        y="accuracy in percent",
        title=title,
    )
    for row in rows:
        print(
            f"{row['name']:18} {100 * row['accuracy']:6.1f} ±{100 * row['spread']:4.1f} "
            f"{row['tokens_per_forward']:6.2f} tokens/forward, "
            f"{100 * row['same_as_one_per_step']:5.1f} % as one per step"
        )


if __name__ == "__main__":
    main()
