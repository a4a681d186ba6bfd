"""Accept tokens generously and revoke those that leave-one-out checks refute (WINO)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import check_at_least, check_shares
from diffa.samplers.blocks import (
    BlockState,
    BlockTracker,
    block_slots,
    fill_after_eos,
    make_step,
)
from diffa.samplers.predictions import exclude_mask, predict, token_probability
from diffa.samplers.selection import select_capped, select_top_k
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Wino:
    """Accept tokens generously, and mask those again that the next pass finds unlikely (WINO).

    Shadow slots score each decided token of the block by leave-one-out: they attend to everything
    but the token they check (arXiv 2507.18578).

    Args:
        vocab: The backbone's vocabulary.
        block_length: Answer tokens per block (LLaDA).
        threshold: Accept tokens whose probability exceeds this value, and at least one per pass.
        remask_threshold: Mask a token again if its leave-one-out probability is below this value
            (``threshold_back`` in WINO's code).
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
        block_length: int = 128,
        threshold: float = 0.6,
        remask_threshold: float = 0.9,
        stop_at_eos: bool = True,
    ) -> None:
        check_at_least(1, block_length=block_length)
        check_shares(threshold=threshold, remask_threshold=remask_threshold)
        self.vocab, self.block_length, self.stop_at_eos = vocab, block_length, stop_at_eos
        self.threshold, self.remask_threshold = threshold, remask_threshold

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the masks of the canvas's answers, yielding after every forward pass.

        A pass computes the canvas and one shadow slot per decided token of the block::

            prompt | a b _ c _ _ | later blocks | A B C      a b c: decided, _: masks
                                                  ^ a masked shadow at the position of a; it attends
                                                    to everything but a and the other shadows
        """
        writable, blocks = canvas.undecided(), BlockTracker(canvas, self.block_length)
        shadows = canvas.add_scratch(min(self.block_length, canvas.length), branch=1)
        while (state := blocks.current()) is not None:
            slots, decided = self._place_shadows(canvas, state, writable, shadows)
            output_slots = torch.cat([state.masked_slots, torch.where(decided, shadows, -1)], dim=1)
            attn_mask = self._attn_mask(canvas, slots, shadows)
            logits = denoise(None, output_slots, attn_mask=attn_mask)
            logits = exclude_mask(logits, canvas.vocab.mask)
            num_masked = state.masked_slots.shape[1]
            predictions = predict(
                logits[:, :num_masked], seeds=canvas.seeds, step=state.step, places=state.places
            )
            most = _most_accepted(state)
            accepted = select_capped(predictions.score, state.masked, self.threshold, most)
            # Revoke fewer tokens than are accepted, so that every pass gains at least one.
            revoked = self._revoked(
                canvas, logits[:, num_masked:], slots, decided, accepted.sum(dim=1) - 1
            )
            accepted_slots = torch.where(accepted, state.masked_slots, -1)
            canvas.write(accepted_slots, predictions.tokens, predictions.confidence)
            masks = torch.full_like(slots, canvas.vocab.mask or 0)
            zeros = torch.zeros_like(masks, dtype=predictions.confidence.dtype)
            canvas.write(torch.where(revoked, slots, -1), masks, zeros)
            if self.stop_at_eos:
                fill_after_eos(canvas, ~writable)
            blocks.advance()
            yield make_step(canvas, revisable_block_length=self.block_length)

    def _place_shadows(
        self, canvas: Canvas, state: BlockState, writable: Tensor, shadows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Place a masked shadow beside every decided token of the block; return the block's slots
        (B, W), and which of them have one, (B, W) bool."""
        slots, exists = block_slots(canvas, state, len(shadows))
        decided = exists & (writable & ~canvas.undecided()).gather(1, slots - canvas.start)
        masks = torch.full_like(slots, canvas.vocab.mask or 0)
        positions = canvas.positions[: canvas.count].gather(1, slots)
        canvas.fill_scratch(shadows, decided, masks, positions)
        return slots, decided

    def _attn_mask(self, canvas: Canvas, slots: Tensor, shadows: Tensor) -> Tensor:
        """Hide from each shadow its own token and all other shadows, (B, S, S) bool."""
        device = slots.device
        shape = canvas.count, canvas.size, canvas.size
        attn_mask = torch.ones(shape, dtype=torch.bool, device=device)
        visible = torch.ones(len(shadows), canvas.size, dtype=torch.bool, device=device)
        visible[:, shadows] = torch.eye(len(shadows), dtype=torch.bool, device=device)
        visible = visible.expand(canvas.count, -1, -1)
        attn_mask[:, shadows] = visible.scatter(2, slots[:, :, None], False)
        return attn_mask

    def _revoked(
        self, canvas: Canvas, logits: Tensor, slots: Tensor, decided: Tensor, most: Tensor
    ) -> Tensor:
        """Return which decided tokens (B, W) to mask again: the ``most`` (B,) least likely ones
        below the threshold."""
        tokens = canvas.tokens[: canvas.count].gather(1, slots)
        probability = token_probability(logits, tokens)
        worst = select_top_k(-probability, decided, most) & (most > 0)[:, None]
        return worst & (probability < self.remask_threshold)


def _most_accepted(state: BlockState) -> Tensor:
    """Most tokens (B,) to accept at once: min(max(0.7 m, 5), 20) of m masks (WINO's code)."""
    return (0.7 * state.masked.sum(dim=1)).long().clamp(min=5, max=20)
