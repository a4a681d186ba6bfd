"""Answer length by block length on nano, in the form of DIFFA's Table A.2.

python benchmarks/nano_blocks.py: one token per forward; token error of captions and transcripts of
FSDD's test recordings, for every pair in which the block divides the length.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from nano import wilson
from reports import write

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
    chosen = parser.parse_args()
    model = diffa.build(chosen.spec)
    speech = Utterances("test", chosen.seed)
    asked = [
        (torch.from_numpy(utterance.audio), trial)
        for index in range(chosen.count)
        for utterance in [speech[index]]
        for trial in all_instructions(utterance.labels, chosen.seed, index)
        if trial.kind in ("caption", "transcribe")
    ]
    asked.sort(key=lambda pair: len(pair[0]))
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        for block in (block for block in BLOCKS if length % block == 0):
            tried = diffa.swap(model, sampler={"name": "blockwise", "block_length": block})
            row: dict[str, Any] = {"length": length, "block_length": block}
            for kind in ("caption", "transcribe"):
                row[kind] = error(tried, [pair for pair in asked if pair[1].kind == kind], length)
            rows.append(row)
            print(
                f"length {length:3d} block {block:3d}  caption {row['caption']['value']:.3f}"
                f"  transcript {row['transcribe']['value']:.3f}",
                flush=True,
            )
    write({"count": chosen.count, "seed": chosen.seed, "rows": rows}, chosen.json)


def error(model: diffa.Model, asked: list[tuple[torch.Tensor, Any]], length: int) -> dict[str, Any]:
    """Edits per token of the references, with an interval."""
    wrong = tokens = 0
    for begin in range(0, len(asked), 16):
        part = asked[begin : begin + 16]
        answer = model.answer(
            [wave for wave, _ in part], [trial.question for _, trial in part], max_tokens=length
        )
        for said, (_, trial) in zip(answer.text, part, strict=True):
            wrong += count_edits(trial.answer.split(), said.split()).errors
            tokens += len(trial.answer.split())
    return wilson(wrong, tokens)


if __name__ == "__main__":
    main()
