"""Draft widely, verify by leave-one-out, and take back what does not hold (WINO)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers import selection as select
from diffa.samplers.acceptance import Rule
from diffa.samplers.blocks import Blocks, Place, end, snapshot
from diffa.samplers.predictions import clean, read
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
        Rule(block_length=block_length)
        for name, value in {"threshold": threshold, "remask_threshold": remask_threshold}.items():
            if not 0 <= value <= 1:
                raise SpecError(f"{name} must lie between 0 and 1, got {value}")
        self.vocab, self.block_length, self.stop_at_eos = vocab, block_length, stop_at_eos
        self.threshold, self.remask_threshold = threshold, remask_threshold

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""
        width = min(self.block_length, canvas.length)
        ours, blocks = canvas.undecided(), Blocks(canvas, self.block_length)
        shadows = canvas.add_scratch(width, branch=1)
        while (place := blocks.enter()) is not None:
            checked, there = self._cast(canvas, place, ours, shadows)
            rows = torch.cat([place.rows, torch.where(there, shadows, -1)], dim=1)
            attn_mask = self._attn_mask(canvas, checked, shadows)
            logits = clean(denoise(None, rows, attn_mask=attn_mask), canvas.vocab.mask)
            own = place.rows.shape[1]
            found, loud = logits[:, :own], logits[:, own:]
            predictions = read(found, seeds=canvas.seeds, step=place.step, places=place.places)
            taken = select.capped(predictions.score, place.masked, self.threshold, self._cap(place))
            # At least one token more is decided after every forward than before it.
            doubted = self._doubted(canvas, loud, checked, there, taken.sum(dim=1) - 1)
            canvas.write(
                torch.where(taken, place.rows, -1), predictions.tokens, predictions.confidence
            )
            masks = torch.full_like(checked, canvas.vocab.mask or 0)
            canvas.write(torch.where(doubted, checked, -1), masks, torch.zeros_like(loud[..., 0]))
            if self.stop_at_eos:
                end(canvas, ~ours)
            blocks.advance()
            yield snapshot(canvas, revised=self.block_length)

    def _cast(
        self, canvas: Canvas, place: Place, ours: Tensor, shadows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lay a masked shadow beside every decided slot of the block; return those slots (B, W),
        and which of them there are."""
        slots = place.first[:, None] + torch.arange(len(shadows), device=shadows.device)
        inside = (slots < place.end[:, None]) & place.alive[:, None]
        slots = slots.clamp(max=canvas.start + canvas.length - 1)
        able = (ours & ~canvas.undecided()).gather(1, slots - canvas.start)
        there = inside & able
        masks = torch.full_like(slots, canvas.vocab.mask or 0)
        positions = canvas.positions[: canvas.count].gather(1, slots)
        canvas.fill_scratch(shadows, there, masks, positions)
        return slots, there

    def _attn_mask(self, canvas: Canvas, checked: Tensor, shadows: Tensor) -> Tensor:
        """What each slot may see (B, S, S): a shadow all but its token and the other shadows."""
        attn_mask = torch.ones(
            canvas.count, canvas.size, canvas.size, dtype=torch.bool, device=checked.device
        )
        own = torch.ones(len(shadows), canvas.size, dtype=torch.bool, device=checked.device)
        own[:, shadows] = torch.eye(len(shadows), dtype=torch.bool, device=checked.device)
        attn_mask[:, shadows] = own.expand(canvas.count, -1, -1).scatter(
            2, checked[:, :, None], False
        )
        return attn_mask

    def _cap(self, place: Place) -> Tensor:
        """The most tokens (B,) to accept at once: min(max(0.7 m, 5), 20) of m masks."""
        return (0.7 * place.masked.sum(dim=1)).long().clamp(min=5, max=20)

    def _doubted(
        self, canvas: Canvas, logits: Tensor, slots: Tensor, there: Tensor, most: Tensor
    ) -> Tensor:
        """Which decided tokens (B, W) to take back: the least likely ones, at most ``most``."""
        tokens = canvas.tokens[: canvas.count].gather(1, slots)
        known = logits.gather(-1, tokens[..., None])[..., 0]
        share = (known - logits.logsumexp(dim=-1)).exp()
        worst = select.fixed(-share, there, most) & (most > 0)[:, None]
        return worst & (share < self.remask_threshold)
