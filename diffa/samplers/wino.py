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
    """Accept generously, and at every forward check the block's decided tokens by shadow slots
    that see everything but the token they check (WINO, arXiv 2507.18578).

    Args:
        vocab: the backbone's vocabulary.
        block: answer tokens per block.
        accept: probability from which a mask is decided.
        doubt: leave-one-out probability below which a decided token is masked again.
        stop: end a row when all tokens before its first EOS are decided.

    Raises:
        SpecError: a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block: int = 128,
        accept: float = 0.6,
        doubt: float = 0.9,
        stop: bool = True,
    ) -> None:
        Rule(block=block)
        for name, value in {"accept": accept, "doubt": doubt}.items():
            if not 0 <= value <= 1:
                raise SpecError(f"{name} must lie between 0 and 1, got {value}")
        self.vocab, self.block, self.stop = vocab, block, stop
        self.accept, self.doubt = accept, doubt

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""
        width = min(self.block, canvas.length)
        ours, blocks = canvas.undecided(), Blocks(canvas, self.block)
        shadows = canvas.scratch(width, branch=1)
        while (place := blocks.enter()) is not None:
            checked, there = self._cast(canvas, place, ours, shadows)
            rows = torch.cat([place.rows, torch.where(there, shadows, -1)], dim=1)
            attn_mask = self._attn_mask(canvas, checked, shadows)
            logits = clean(denoise(None, rows, attn_mask=attn_mask), canvas.vocab.mask)
            own = place.rows.shape[1]
            found, loud = logits[:, :own], logits[:, own:]
            predictions = read(found, seeds=canvas.seeds, step=place.step, places=place.places)
            taken = select.capped(predictions.score, place.masked, self.accept, self._cap(place))
            # At least one token more is decided after every forward than before it.
            doubted = self._doubted(canvas, loud, checked, there, taken.sum(dim=1) - 1)
            canvas.write(
                torch.where(taken, place.rows, -1), predictions.tokens, predictions.confidence
            )
            masks = torch.full_like(checked, canvas.vocab.mask or 0)
            canvas.write(torch.where(doubted, checked, -1), masks, torch.zeros_like(loud[..., 0]))
            if self.stop:
                end(canvas, ~ours)
            blocks.advance()
            yield snapshot(canvas, revised=self.block)

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
        canvas.place(shadows, there, masks, positions)
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
        return worst & (share < self.doubt)
