"""CTC between an adapter's embeddings and words, read by the backbone's own frozen head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.objectives.likelihood import frozen_head_matrix, token_logsumexp
from diffa.types import Embeds


def head_ctc_loss(
    embeds: Embeds,
    head: Callable[[Tensor], Tensor],
    words: Sequence[Tensor],
    *,
    blank: int,
    exact: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the CTC loss per word (Graves et al. 2006) of embeddings read as hidden states.

    It pulls what an adapter emits towards the directions in which the backbone writes those words
    (diffusion-gemma-asr trains its projector so before the diffusion loss).

    Args:
        embeds: The adapter's output, (B, N, W).
        head: The backbone's head.
        words: Token ids of each row. Rows too short for their words count 0.
        blank: A token id that no answer uses.
        exact: Let the whole vocabulary compete. By default only the batch's words and the blank
            do, which costs (B, N, words) logits instead of (B, N, V).
        chunk_size: With ``exact``, frames whose logits are computed at a time.
    """
    device = embeds.values.device
    targets = torch.cat(list(words)).to(device)
    classes, index = torch.unique(targets, return_inverse=True)
    classes = torch.cat([torch.tensor([blank], device=device), classes])
    logits = _class_logits(embeds.values, head, classes)
    if exact:
        frames = embeds.values.flatten(0, 1)
        log_total = token_logsumexp(frames, head, chunk_size).view(*logits.shape[:2], 1)
        log_probs = logits - log_total
        # torch's gradient assumes classes that sum to one: add all other words as one class.
        rest = (1 - log_probs.exp().sum(dim=2, keepdim=True)).clamp(min=1e-6).log()
        log_probs = torch.cat([log_probs, rest], dim=2)
    else:
        log_probs = logits.log_softmax(dim=2)
    counts = torch.tensor([len(row) for row in words], device=device)
    total = F.ctc_loss(
        log_probs.transpose(0, 1), index + 1, embeds.lengths, counts, reduction="sum",
        zero_infinity=True,
    )  # fmt: skip
    return total / counts.sum().clamp(min=1)


def _class_logits(values: Tensor, head: Callable[[Tensor], Tensor], classes: Tensor) -> Tensor:
    """Return float32 logits (B, N, C) of some tokens of the vocabulary."""
    matrix = frozen_head_matrix(head)
    if matrix is None:
        return head(values).float()[..., classes]
    return (values.to(matrix.dtype) @ matrix[classes].T).float()
