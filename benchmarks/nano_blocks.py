"""Answer length by block length on nano, in the form of DIFFA's Table A.2.

python benchmarks/nano_blocks.py: one token per forward pass; token error of captions and
transcripts of FSDD's test recordings, for every pair in which the block divides the length.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from nano import wilson
from reports import write_report

import diffa
from diffa.evaluation.word_errors import count_edits
from diffa.nano.corpus.examples import all_instructions
from diffa.nano.corpus.utterances import Utterances

LENGTHS, BLOCKS = (24, 32, 48), (1, 4, 8, 12, 16, 24, 32, 48)


def main() -> None:
    """Measure every pair, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=20_261_123)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = diffa.build(args.spec)
    speech = Utterances("test", args.seed)
    items = [
        (torch.from_numpy(utterance.audio), trial)
        for index in range(args.count)
        for utterance in [speech[index]]
        for trial in all_instructions(utterance.labels, args.seed, index)
        if trial.task in ("caption", "transcribe")
    ]
    items.sort(key=lambda pair: len(pair[0]))
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        for block in (block for block in BLOCKS if length % block == 0):
            candidate = diffa.swap(model, sampler={"name": "blockwise", "block_length": block})
            row: dict[str, Any] = {"length": length, "block_length": block}
            for kind in ("caption", "transcribe"):
                row[kind] = error(
                    candidate, [pair for pair in items if pair[1].task == kind], length
                )
            rows.append(row)
            print(
                f"length {length:3d} block {block:3d}  caption {row['caption']['value']:.3f}"
                f"  transcript {row['transcribe']['value']:.3f}",
                flush=True,
            )
    write_report({"count": args.count, "seed": args.seed, "rows": rows}, args.json)


def error(model: diffa.Model, items: list[tuple[torch.Tensor, Any]], length: int) -> dict[str, Any]:
    """Edits per token of the references, with an interval."""
    wrong = tokens = 0
    for begin in range(0, len(items), 16):
        part = items[begin : begin + 16]
        answer = model.answer(
            [wave for wave, _ in part], [trial.question for _, trial in part], max_tokens=length
        )
        for text, (_, trial) in zip(answer.text, part, strict=True):
            wrong += count_edits(trial.answer.split(), text.split()).errors
            tokens += len(trial.answer.split())
    return wilson(wrong, tokens)


if __name__ == "__main__":
    main()
