"""Cross-entropy against a large vocabulary, a few rows at a time.

Logits of 126,464 entries cost more than the rest of the model: only the rows that are to be
predicted meet the vocabulary, in chunks, and a frozen head never gets a weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffa.runtime.cpu_linear import Linear

# Logits held at once when no chunk is given: 128 MiB in float32, 265 rows of LLaDA's vocabulary.
LOGITS = 1 << 25


class Rows(NamedTuple):
    """Negative log-likelihood (N,) in float32 of each row's target, and whether it ranks first."""

    nll: Tensor
    hits: Tensor


def frozen_matrix(head: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return the head's matrix (V, W) if the head is that product alone and learns nothing.

    Recognised: a plain ``nn.Linear`` without bias; a bound method whose owner has a
    ``head_weight``; any callable that is no module and has a ``weight``.
    """
    weight: Any = None
    if isinstance(head, nn.Module):
        # A subclass (LoRA, quantised) may compute more than the product with its weight.
        weight = head.weight if type(head) in (nn.Linear, Linear) and head.bias is None else None
    elif hasattr(head, "__self__"):
        weight = getattr(head.__self__, "head_weight", None)
    else:
        weight = getattr(head, "weight", None)
    usable = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
    return weight if usable and not weight.requires_grad else None


def rows_nll(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk_size: int | None = None
) -> Rows:
    """Score targets (N,) under the head's reading of hidden (N, W), ``chunk`` rows at a time."""
    matrix = frozen_matrix(head)
    if matrix is not None and matrix.shape[1] == hidden.shape[1]:
        return _frozen_rows(hidden, matrix, targets, chunk_size or _fitting(len(matrix)))
    step = chunk_size or _fitting(_width_of(head, hidden))
    parts = [
        _through(head, hidden[i : i + step], targets[i : i + step]) for i in _starts(hidden, step)
    ]
    return Rows(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def rows_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float,
    chunk_size: int | None = None,
) -> Tensor:
    """Entropy (N,) in nats of the head's reading of hidden (N, W) at a temperature, in float32."""

    def score(logits: Tensor) -> Tensor:
        logs = (logits / temperature).log_softmax(dim=1)
        return -(logs.exp() * logs.clamp(min=-1e4)).sum(dim=1)

    return _rows(hidden, head, score, chunk_size)


def rows_log_total(
    hidden: Tensor, head: Callable[[Tensor], Tensor], chunk_size: int | None = None
) -> Tensor:
    """Log-sum-exp (N,) over the vocabulary of the head's reading of hidden (N, W), in float32."""
    return _rows(hidden, head, lambda logits: logits.logsumexp(dim=1), chunk_size)


def _rows(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
    chunk_size: int | None,
) -> Tensor:
    """One number (N,) per row of logits, a few rows at a time, forward and backward."""
    step = chunk_size or _fitting(_width_of(head, hidden))
    parts = [hidden[i : i + step] for i in _starts(hidden, step)]
    if not torch.is_grad_enabled():
        return torch.cat([score(head(part).float()) for part in parts])
    kept = [checkpoint(lambda x: score(head(x).float()), x, use_reentrant=False) for x in parts]
    return torch.cat(kept)


def _starts(hidden: Tensor, step: int) -> range:
    """One chunk at least, so that an empty selection still belongs to the graph."""
    return range(0, max(len(hidden), 1), step)


def _fitting(vocabulary: int) -> int:
    return max(1, LOGITS // max(1, vocabulary))


def _width_of(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    with torch.no_grad():
        return head(hidden.new_zeros(1, hidden.shape[1])).shape[-1]


def _through(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Score one chunk, keeping its logits only until the backward pass needs them again."""

    def score(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(rows).float()
        right = logits.gather(1, wanted[:, None])[:, 0]
        return torch.logsumexp(logits, 1) - right, logits.argmax(1) == wanted

    if not torch.is_grad_enabled():
        return score(hidden, targets)
    nll, hits = checkpoint(score, hidden, targets, use_reentrant=False)
    return nll, hits


class _FrozenHead(torch.autograd.Function):
    """Scores rows under a frozen matrix; the gradient of hidden is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, targets: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        nll = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        hits = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            # (C, V); logsumexp and softmax in float32 whatever the matrix is kept in
            logits = (hidden[part].to(matrix.dtype) @ matrix.T).to(nll.dtype)
            top = torch.logsumexp(logits, 1)
            wanted = targets[part, None]
            nll[part] = top - logits.gather(1, wanted)[:, 0]
            hits[part] = logits.argmax(1) == targets[part]
            if gradient is not None:
                logits.sub_(top[:, None]).exp_()
                logits.scatter_add_(1, wanted, -torch.ones_like(top[:, None]))
                gradient[part] = (logits.to(matrix.dtype) @ matrix).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        return nll, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None, None


def _frozen_rows(hidden: Tensor, matrix: Tensor, targets: Tensor, chunk_size: int) -> Rows:
    return Rows(*_FrozenHead.apply(hidden, matrix, targets, chunk_size))  # type: ignore[no-untyped-call]
