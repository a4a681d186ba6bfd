"""Token weights by visible context: CART, Dream's context-adaptive rescheduling."""

from __future__ import annotations

import torch
from torch import Tensor


def cart_weights(masked: Tensor, answer: Tensor, p: float) -> Tensor:
    """Return w_n = 1/2 sum over visible i of p (1 - p)^(|n - i| - 1), (B, L) (Ye et al. 2025).

    Distances count answer tokens. The prompt counts as infinitely long visible text on the left,
    which adds (1 - p)^(n - 1) to the n-th answer token; so its length and padding do not matter.

    Args:
        masked: Masked tokens, (B, L) bool.
        answer: Answer tokens, (B, L) bool.
        p: Parameter of the geometric distribution (``cart_p`` in Dream's code).
    """
    place = (answer.cumsum(dim=1) - 1).clamp(min=0)  # index within the answer
    size = max(int(answer.sum(dim=1).max()), 1)
    visible = torch.zeros(len(answer), size, dtype=torch.float32, device=answer.device)
    visible = visible.scatter_add(1, place, (answer & ~masked).float())
    index = torch.arange(size, device=answer.device)
    gap = (index[:, None] - index).abs()
    kernel = torch.where(gap > 0, p * (1 - p) ** (gap - 1), 0.0)
    total = visible @ kernel + (1 - p) ** index
    return 0.5 * total.gather(1, place)
