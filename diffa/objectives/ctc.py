"""CTC between an adapter's embeddings and words, read by the backbone's own frozen head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.objectives.likelihood import frozen_matrix, rows_log_total
from diffa.types import Embeds


def ctc(
    embeds: Embeds,
    head: Callable[[Tensor], Tensor],
    words: Sequence[Tensor],
    *,
    blank: int,
    exact: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Return CTC (Graves et al. 2006) per word of embeddings (B, N, W) against word ids per row.

    The embeddings are read as if they were hidden states: what an adapter emits is pulled to the
    directions in which the backbone writes those words (diffusion-gemma-asr trains its projector
    so before the diffusion loss can). ``blank`` is an id that no answer uses. The batch's words
    and the blank alone compete, which costs (B, N, words) instead of (B, N, V); ``exact`` lets
    the whole vocabulary compete, ``chunk`` rows at a time. Rows too short for their words count 0.
    """
    device = embeds.values.device
    flat = torch.cat(list(words)).to(device)
    classes, index = torch.unique(flat, return_inverse=True)
    classes = torch.cat([torch.tensor([blank], device=device), classes])
    logits = _logits(embeds.values, head, classes)
    if exact:
        rows = embeds.values.flatten(0, 1)
        logs = logits - rows_log_total(rows, head, chunk_size).view(*logits.shape[:2], 1)
        # torch's gradient holds for classes that add up to one: all other words are one class more
        rest = (1 - logs.exp().sum(dim=2, keepdim=True)).clamp(min=1e-6).log()
        logs = torch.cat([logs, rest], dim=2)
    else:
        logs = logits.log_softmax(dim=2)
    counts = torch.tensor([len(row) for row in words], device=device)
    total = F.ctc_loss(
        logs.transpose(0, 1), index + 1, embeds.lengths, counts, reduction="sum",
        zero_infinity=True,
    )  # fmt: skip
    return total / counts.sum().clamp(min=1)


def _logits(values: Tensor, head: Callable[[Tensor], Tensor], classes: Tensor) -> Tensor:
    """Logits (B, N, C) of some of the vocabulary, in float32."""
    matrix = frozen_matrix(head)
    if matrix is None:
        return head(values).float()[..., classes]
    return (values.to(matrix.dtype) @ matrix[classes].T).float()
