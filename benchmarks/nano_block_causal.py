"""Compare nano with its block-causal twin: forward passes and CPU time of the same questions.

python benchmarks/nano_block_causal.py: both models answer the caption and transcript questions
about the same utterances, one after the other. Scores: ``nano.py --spec nano-block-causal``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from reports import write_report

import diffa
from diffa.nano.corpus.examples import all_instructions
from diffa.nano.corpus.utterances import Utterances

SPECS, PRESETS = ("nano", "nano-block-causal"), ("exact", "fast")


def main() -> None:
    """Ask, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=20_261_121)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {}
    for spec in SPECS:
        model = diffa.build(spec)
        for preset in PRESETS:
            sampler = model.spec.data["sampler_presets"][preset]
            models[spec, preset] = diffa.swap(model, sampler=sampler)
    speech = Utterances("test", args.seed)
    totals: dict[tuple[str, str], dict[str, Any]] = {
        key: {"tokens": 0, "num_forwards": 0, "cpu_seconds": 0.0} for key in models
    }
    for index in range(args.count):
        utterance = speech[index]
        wave = (torch.from_numpy(utterance.audio), 16_000)
        for trial in all_instructions(utterance.labels, args.seed, index):
            if trial.task not in ("caption", "transcribe"):
                continue
            for key, model in models.items():
                begin = time.process_time()
                answer = model.answer(wave, trial.question)
                totals[key]["cpu_seconds"] += time.process_time() - begin
                ended = (answer.tokens == model.backbone.vocab.eos).nonzero()
                length = len(answer.tokens) if not len(ended) else int(ended[0]) + 1
                totals[key]["tokens"] += length
                totals[key]["num_forwards"] += answer.num_forwards
    rows = []
    for (spec, preset), total in totals.items():
        per_forward = round(total["tokens"] / total["num_forwards"], 2)
        seconds = round(total["cpu_seconds"], 2)
        rows.append({"spec": spec, "preset": preset, **total, "cpu_seconds": seconds})
        print(
            f"{spec:18} {preset:6} {total['num_forwards']:5d} passes"
            f"  {per_forward:5.2f} tokens per pass  {seconds:7.2f} s"
        )
    write_report({"count": args.count, "seed": args.seed, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
