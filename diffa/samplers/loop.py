"""The loop that every unmasking sampler runs: recompute, read, accept, yield."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffa.samplers.blocks import Blocks, Place, end, snapshot
from diffa.samplers.predictions import Order, Predictions, clean, read
from diffa.samplers.recompute import Cache, Slots, cached
from diffa.types import Denoise, Step

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


def unmask(
    canvas: Canvas,
    denoise: Denoise,
    *,
    block_length: int,
    understand: Callable[[Tensor, Place], Predictions],
    take: Callable[[Predictions, Place], Tensor],
    slots: Slots | None = None,
    stop_at_eos: bool = True,
) -> Iterator[Step]:
    """Unmask blocks from left to right, yielding after every forward.

    Args:
        canvas: what to fill; between two steps the caller may mask tokens again.
        denoise: the call that drives the backbone.
        block: answer tokens per block.
        understand: logits (B or 2B, R, V) of the masked slots -> a guess.
        take: a guess -> which of the masked slots to accept, (B, R) bool.
        slots: which slots to recompute; all where None.
        stop: end a row when all tokens before its first EOS are decided.
    """
    slots = slots or Slots([])
    blocks = Blocks(canvas, block_length)
    given = ~canvas.undecided()
    while (place := blocks.enter()) is not None:
        recompute, write = slots(canvas, place)
        predictions = understand(denoise(recompute, place.rows, write=write), place)
        taken = torch.where(take(predictions, place), place.rows, -1)
        canvas.write(taken, predictions.tokens, predictions.confidence)
        if stop_at_eos:
            end(canvas, given)
        blocks.advance()
        yield snapshot(canvas, given=given if stop_at_eos else None)


class Loop(NamedTuple):
    """What the samplers share that differ in what they accept: options, and the loop itself.

    Attributes:
        block: answer tokens per block.
        order: what ranks masked tokens.
        temperature: of the tokens; 0 takes the likeliest.
        cache: which slots are remembered between refreshes.
        stop: end a row when all tokens before its first EOS are decided.
    """

    block_length: int
    ranking: Order = "confidence"
    temperature: float = 0.0
    cache: Cache = "none"
    stop_at_eos: bool = True

    def __call__(
        self, canvas: Canvas, denoise: Denoise, take: Callable[[Predictions, Place], Tensor]
    ) -> Iterator[Step]:
        """Fill the canvas's answers by what ``take`` accepts, yielding after every forward."""
        return unmask(
            canvas,
            denoise,
            block_length=self.block_length,
            understand=reader(canvas, ranking=self.ranking, temperature=self.temperature),
            take=take,
            slots=cached(self.cache),
            stop_at_eos=self.stop_at_eos,
        )


def reader(
    canvas: Canvas, *, ranking: Order = "confidence", temperature: float = 0.0
) -> Callable[[Tensor, Place], Predictions]:
    """The plain way to read logits: clean, choose, rank."""
    return lambda logits, place: read(
        clean(logits, canvas.vocab.mask),
        seeds=canvas.seeds,
        step=place.step,
        places=place.places,
        ranking=ranking,
        temperature=temperature,
    )
