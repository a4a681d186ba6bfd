"""How often the paper's factor rule and the released one differ: python benchmarks/factor_rule.py.

Fast-dLLM's released loop, which DIFFA-2 copies, also accepts all tokens where only the least
confident one fails. Counts cases of random confidences, and passes of nano's decoding.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from reports import write_report
from torch import Tensor

import diffa
from diffa.nano.demo import recordings
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.selection import select_factor
from diffa.types import Denoise, Step

RESULTS = Path(__file__).parent / "results" / "factor-rule.json"
QUESTIONS = ("Please transcribe the audio to text.", "What can you hear from the audio?")


class BothRules:
    """Decodes by the paper's rule and counts the passes in which the released one differs."""

    decoding: Literal["masked"] = "masked"

    def __init__(self, blockwise: Blockwise, factor: float) -> None:
        self.blockwise, self.factor = blockwise, factor
        self.passes = self.different = 0

    def __call__(self, canvas: Any, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers."""
        return self.blockwise.unmask(canvas, denoise, self._accept)

    def _accept(self, predictions: Any, state: Any) -> Tensor:
        paper, released = both(predictions.score, state.masked, self.factor)
        self.passes += 1
        self.different += int((paper != released).any())
        return paper


def both(scores: Tensor, masked: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Accept by the paper's rule and by the released one."""
    return select_factor(scores, masked, factor), select_factor(
        scores, masked, factor, released=True
    )


def random_cases(count: int, factor: float) -> int:
    """Cases of 1 to 32 masks with uniform confidences in which the rules differ."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(1, 33, (count, 1), generator=generator)
    masked = torch.arange(32) < masks
    paper, released = both(torch.rand(count, 32, generator=generator), masked, factor)
    return int((paper != released).any(dim=1).sum())


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = diffa.build("nano")
    blockwise = Blockwise(model.backbone.vocab, block_length=24)
    sampler = BothRules(blockwise, options.factor)
    model.sampler = sampler
    for recording in sorted(recordings().glob("*.flac")):
        for question in QUESTIONS:
            model.answer(recording, question, max_tokens=24)
    rows = [
        {
            "cases": "random confidences, 1 to 32 masks",
            "differ": random_cases(options.cases, options.factor),
            "of": options.cases,
        },
        {"cases": "passes of nano", "differ": sampler.different, "of": sampler.passes},
    ]
    write_report({"factor": options.factor, "rows": rows}, options.json)
    for row in rows:
        print(f"{row['cases']}: the rules differ in {row['differ']} of {row['of']}")


if __name__ == "__main__":
    main()
