"""The likeliest tokens of every answer slot at the pass that wrote it (``top_logprobs``)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.canvas.canvas import Canvas
from diffa.canvas.denoiser import Denoiser
from diffa.serving.requests import LikelyTokens
from diffa.types import Backbone


class RecordingDenoiser(Denoiser):
    """A ``denoise`` call that notes the ``count`` likeliest tokens of every answer slot.

    They are the model's own: before temperature and guidance, without the mask token.
    """

    def __init__(self, backbone: Backbone, canvas: Canvas, count: int) -> None:
        super().__init__(backbone, canvas)
        self._count = min(count, canvas.vocab.size - 1)
        self._tokens = canvas.answer.clone()
        self._latest, self._written = self._empty(), self._empty()

    def _empty(self) -> LikelyTokens:
        shape = (*self._tokens.shape, self._count)
        ids = torch.zeros(shape, dtype=torch.long, device=self._tokens.device)
        return LikelyTokens(ids, torch.full(shape, -torch.inf, device=ids.device))

    def __call__(self, recompute: Tensor | None, output_slots: Tensor, **options: Any) -> Tensor:
        """Return the logits (B, R, V), and note their likeliest tokens."""
        logits = super().__call__(recompute, output_slots, **options)
        mask, canvas = self._canvas.vocab.mask, self._canvas
        own = logits[: len(output_slots)].float()  # without unconditional twins
        places = output_slots - canvas.start
        if mask is None:  # a slot predicts the next one, the end of the prompt the first
            places = (places + 1).clamp(min=0)
        else:
            excluded = torch.tensor([mask], device=own.device)
            own = own.index_fill(-1, excluded, -torch.inf)  # a copy: logits stay as they are
        values, ids = own.log_softmax(dim=-1).topk(self._count, dim=-1)
        self._fit(canvas.length)
        recorded = (output_slots >= 0) & (places >= 0) & (places < canvas.length)
        at = recorded.nonzero()[:, 0], places[recorded]
        self._latest.ids[at], self._latest.log_probs[at] = ids[recorded], values[recorded]
        return logits

    def keep(self, tokens: Tensor) -> None:
        """Keep what was recorded of the answer tokens (B, A) that the last step wrote."""
        self._fit(tokens.shape[1])
        changed = (tokens != self._tokens)[:, :, None]
        pairs = zip(self._latest, self._written, strict=True)
        self._written = LikelyTokens(*(torch.where(changed, new, old) for new, old in pairs))
        self._tokens = tokens.clone()

    def of_row(self, row: int, length: int) -> LikelyTokens:
        """Return what was kept of a row's first ``length`` tokens."""
        return LikelyTokens(*(values[row, :length].cpu().clone() for values in self._written))

    def _fit(self, length: int) -> None:
        """Make room for an answer that has grown at its end."""
        if (more := length - self._tokens.shape[1]) > 0:
            self._tokens = F.pad(self._tokens, (0, more), value=-1)
            wide = (0, 0, 0, more)
            self._latest, self._written = (
                LikelyTokens(F.pad(old.ids, wide), F.pad(old.log_probs, wide, value=-torch.inf))
                for old in (self._latest, self._written)
            )
