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
    """Unmask a block by a fixed schedule, and mask decided tokens again at random (ReMDM).

    Tokens of a draft and of finished blocks stay (arXiv 2503.00307).

    Args:
        vocab: The backbone's vocabulary.
        block_length: Answer tokens per block (LLaDA).
        steps: Denoising steps for the whole answer. Default: twice its length.
        eta: Strength of remasking, from 0 (none) to 1.
        remasking_schedule: Probability of masking a token again, m being the largest that the
            schedule allows: min(eta, m) (cap), eta m (rescale), or eta m weighted by low
            confidence.
        ranking: Order in which masked tokens are accepted: highest confidence, margin to the second
            token, lowest entropy, or random.
        temperature: Sampling temperature. Default: take the most likely token.
        cache: Keys and values kept within a block: none, those before it (prefix), or also those
            after it (dual).
        stop_at_eos: End a row once all tokens before its first EOS are decided; the rest becomes
            EOS.

    Raises:
        SpecError: a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block_length: int = 32,
        steps: int | None = None,
        eta: float = 0.05,
        remasking_schedule: Literal["cap", "rescale", "confidence"] = "cap",
        ranking: Order = "confidence",
        temperature: float = 0.0,
        cache: Cache = "none",
        stop_at_eos: bool = True,
    ) -> None:
        Rule(block_length=block_length, steps=steps)
        positive("temperature", temperature)
        if not 0 <= eta <= 1:
            raise SpecError(f"eta must lie between 0 and 1, got {eta}")
        self.vocab, self.block_length, self.steps, self.eta, self.remasking_schedule = (
            vocab,
            block_length,
            steps,
            eta,
            remasking_schedule,
        )
        self.loop = Loop(block_length, ranking, temperature, cache, stop_at_eos)

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
            yield snapshot(canvas, revised=self.block_length)

    def _steps(self, canvas: Canvas, place: Place) -> Tensor:
        """Forwards (B,) of the rows' active blocks."""
        share = canvas.length / self.block_length
        steps = self.steps or 2 * canvas.length
        per = per_block(None, canvas.length, self.block_length)
        counts = torch.tensor(per, device=place.block.device)[place.block.clamp(min=0)]
        return (counts * steps / (share * self.block_length)).long().clamp(min=1)

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
        sigma = most.clamp(max=self.eta) if self.remasking_schedule == "cap" else self.eta * most
        if self.remasking_schedule == "confidence":
            doubt = (-canvas.confidence).masked_fill(~able, -torch.inf).softmax(dim=1)
            sigma = (sigma * doubt.nan_to_num() * able.sum(dim=1, keepdim=True)).clamp(max=1)
        draws = uniform(canvas.seeds, place.step, places.expand_as(ours), stream=3)
        return able & (draws < sigma)
