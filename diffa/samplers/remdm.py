"""Remasking diffusion: mask decided tokens again to gain quality for compute (ReMDM)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import check_shares
from diffa.samplers.blocks import BlockState, make_step
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.predictions import Predictions, Ranking
from diffa.samplers.recompute import CacheMode
from diffa.samplers.rng import slot_uniform
from diffa.samplers.selection import select_top_k
from diffa.samplers.transfer_schedule import steps_per_block
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
        ranking: Ranking = "confidence",
        temperature: float = 0.0,
        cache: CacheMode = "none",
        stop_at_eos: bool = True,
    ) -> None:
        check_shares(eta=eta)
        self.blockwise = Blockwise(
            vocab, block_length=block_length, steps=steps, ranking=ranking, cache=cache,
            temperature=temperature, stop_at_eos=stop_at_eos,
        )  # fmt: skip
        self.vocab, self.block_length, self.steps = vocab, block_length, steps
        self.eta, self.remasking_schedule = eta, remasking_schedule

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the masks of the canvas's answers, yielding after every forward pass."""
        writable, latest = canvas.undecided(), list[BlockState]()

        def accept(predictions: Predictions, state: BlockState) -> Tensor:
            latest[:] = [state]
            decided = state.initial_masks - state.masked.sum(dim=1)
            counts = self._target(state, 1) - decided
            return select_top_k(predictions.score, state.masked, counts)

        for _ in self.blockwise.unmask(canvas, denoise, accept):
            canvas.fill(self._remasked(canvas, latest[0], writable), canvas.vocab.mask or 0)
            yield make_step(canvas, revisable_block_length=self.block_length)

    def _steps(self, state: BlockState) -> Tensor:
        """Steps (B,) of each row's block: its share of the answer's, by length."""
        share = state.answer_length / self.block_length
        steps = self.steps or 2 * state.answer_length
        lengths = steps_per_block(None, state.answer_length, self.block_length)
        counts = torch.tensor(lengths, device=state.block.device)[state.block.clamp(min=0)]
        return (counts * steps / (share * self.block_length)).long().clamp(min=1)

    def _target(self, state: BlockState, ahead: int) -> Tensor:
        """How many of the block's masks should be decided ``ahead`` steps from now, (B,)."""
        steps = self._steps(state)
        done = (state.block_step + ahead).clamp(max=steps)
        return (state.initial_masks * done + steps - 1) // steps

    def _remasked(self, canvas: Canvas, state: BlockState, writable: Tensor) -> Tensor:
        """Draw which tokens (B, A) of the current blocks to mask again.

        The probability sigma of each is at most (1 - alpha_s) / alpha_t, where alpha_t is the share
        decided after this step, and alpha_s the share after the next (ReMDM).
        """
        undecided = canvas.undecided()
        places = torch.arange(canvas.length, device=writable.device)
        in_block = places >= (state.start - canvas.start)[:, None]
        in_block &= places < (state.end - canvas.start)[:, None]
        unfinished = (undecided & in_block).any(dim=1) & state.active
        candidates = writable & in_block & ~undecided & unfinished[:, None]
        masks = state.initial_masks.clamp(min=1)
        now, then = self._target(state, 1) / masks, self._target(state, 2) / masks
        largest = ((1 - then) / now.clamp(min=1e-6)).clamp(0, 1)[:, None]
        if self.remasking_schedule == "cap":
            sigma = largest.clamp(max=self.eta)
        else:
            sigma = self.eta * largest
        if self.remasking_schedule == "confidence":
            doubt = (-canvas.confidence).masked_fill(~candidates, -torch.inf).softmax(dim=1)
            count = candidates.sum(dim=1, keepdim=True)
            sigma = (sigma * doubt.nan_to_num() * count).clamp(max=1)  # NaN: no candidates
        draws = slot_uniform(canvas.seeds, state.step, places.expand_as(writable), stream=3)
        return candidates & (draws < sigma)
