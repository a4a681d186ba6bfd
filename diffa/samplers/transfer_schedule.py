"""How many tokens a block's forwards accept when their number is given."""

from __future__ import annotations

import torch
from torch import Tensor


def even(
    block: Tensor, since: Tensor, due: Tensor, *, steps: int | None, length: int, width: int
) -> Tensor:
    """Tokens (B,) for each row's ``since``-th forward in its ``block`` that began with ``due``.

    ``steps`` over the whole answer (one per token where None) are spread over blocks by width, at
    least one each; a block's masks are split evenly over its steps, the remainder first (LLaDA).
    """
    spread = torch.tensor(per_block(steps, length, width), device=block.device)
    count = spread[block.clamp(min=0)]
    return due // count + (since < due % count).long()


def per_block(steps: int | None, length: int, width: int) -> list[int]:
    """Forwards of every block of an answer of ``length`` tokens."""
    total = min(steps or length, length)
    ends = [min(end + width, length) * total // length for end in range(0, length, width)]
    return [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
