"""Remasking diffusion: decided tokens may be masked again, quality for compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers import selection as select
from diffa.samplers.acceptance import Rule, positive
from diffa.samplers.blocks import Place, snapshot
from diffa.samplers.loop import Loop
from diffa.samplers.predictions import Order, Predictions
from diffa.samplers.recompute import Cache
from diffa.samplers.rng import uniform
from diffa.samplers.transfer_schedule import per_block
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class ReMDM:
    """Unmask a block by schedule, remasking its decided tokens at random in between (ReMDM,
    arXiv 2503.00307). Tokens that were given stay, and so do finished blocks.

    Args:
        vocab: the backbone's vocabulary.
        block: answer tokens per block.
        steps: forwards over the whole answer; twice its length where None.
        eta: strength of remasking, from 0 to 1.
        scale: a token's probability of being masked again, with m the most that the schedule
            allows: ``cap`` min(eta, m), ``rescale`` eta m, ``confidence`` eta m shared out by
            softmax of minus confidence.
        order: what ranks masked tokens.
        temperature: of the tokens; 0 takes the likeliest.
        cache: as in ``blockwise``.
        stop: end a row when all tokens before its first EOS are decided.

    Raises:
        SpecError: a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block: int = 32,
        steps: int | None = None,
        eta: float = 0.05,
        scale: Literal["cap", "rescale", "confidence"] = "cap",
        order: Order = "confidence",
        temperature: float = 0.0,
        cache: Cache = "none",
        stop: bool = True,
    ) -> None:
        Rule(block=block, steps=steps)
        positive("temperature", temperature)
        if not 0 <= eta <= 1:
            raise SpecError(f"eta must lie between 0 and 1, got {eta}")
        self.vocab, self.block, self.steps, self.eta, self.scale = vocab, block, steps, eta, scale
        self.loop = Loop(block, order, temperature, cache, stop)

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""
        ours, latest = canvas.undecided(), list[Place]()

        def take(predictions: Predictions, place: Place) -> Tensor:
            latest[:] = [place]
            decided = place.due - place.masked.sum(dim=1)
            return select.fixed(
                predictions.score, place.masked, self._target(canvas, place, 1) - decided
            )

        for _ in self.loop(canvas, denoise, take):
            canvas.fill(self._again(canvas, latest[0], ours), canvas.vocab.mask or 0)
            yield snapshot(canvas, revised=self.block)

    def _steps(self, canvas: Canvas, place: Place) -> Tensor:
        """Forwards (B,) of the rows' active blocks."""
        share = canvas.length / self.block
        steps = self.steps or 2 * canvas.length
        per = per_block(None, canvas.length, self.block)
        counts = torch.tensor(per, device=place.block.device)[place.block.clamp(min=0)]
        return (counts * steps / (share * self.block)).long().clamp(min=1)

    def _target(self, canvas: Canvas, place: Place, ahead: int) -> Tensor:
        """How many of the block's masks are to be decided ``ahead`` forwards from now, (B,)."""
        steps = self._steps(canvas, place)
        done = (place.since + ahead).clamp(max=steps)
        return (place.due * done + steps - 1) // steps

    def _again(self, canvas: Canvas, place: Place, ours: Tensor) -> Tensor:
        """Which tokens (B, A) of the active blocks to mask again."""
        undecided = canvas.undecided()
        places = torch.arange(canvas.length, device=ours.device)
        here = places >= (place.first - canvas.start)[:, None]
        here &= places < (place.end - canvas.start)[:, None]
        open_ = (undecided & here).any(dim=1) & place.alive
        able = ours & here & ~undecided & open_[:, None]
        now = self._target(canvas, place, 1) / place.due.clamp(min=1)
        then = self._target(canvas, place, 2) / place.due.clamp(min=1)
        most = ((1 - then) / now.clamp(min=1e-6)).clamp(0, 1)[:, None]
        sigma = most.clamp(max=self.eta) if self.scale == "cap" else self.eta * most
        if self.scale == "confidence":
            doubt = (-canvas.confidence).masked_fill(~able, -torch.inf).softmax(dim=1)
            sigma = (sigma * doubt.nan_to_num() * able.sum(dim=1, keepdim=True)).clamp(max=1)
        draws = uniform(canvas.seeds, place.step, places.expand_as(ours), stream=3)
        return able & (draws < sigma)
