"""Cross-entropy against a large vocabulary, a few tokens at a time.

Logits over LLaDA's 126,464 tokens cost more than the rest of the model. So they are computed for
predicted tokens only, in chunks, and a frozen head gets no weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffa.runtime.cpu_linear import Linear
from diffa.runtime.precision import no_grad

# Default number of logits computed at a time: 128 MiB in float32, 265 tokens of LLaDA's vocabulary.
MAX_LOGITS = 1 << 25


class TokenLosses(NamedTuple):
    """Losses of N predicted tokens.

    Attributes:
        nll: (N,) negative log-likelihood in float32.
        correct: (N,) bool, whether the token has the highest logit.
    """

    nll: Tensor
    correct: Tensor


def frozen_head_matrix(head: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return the matrix (V, W) of a head that only multiplies by it and is frozen, or None.

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


def token_nll(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk_size: int | None = None
) -> TokenLosses:
    """Return the losses of targets (N,) predicted from hidden (N, W), in chunks."""
    matrix = frozen_head_matrix(head)
    if matrix is not None and matrix.shape[1] == hidden.shape[1]:
        return _frozen_losses(hidden, matrix, targets, chunk_size or _default_chunk(len(matrix)))
    step = chunk_size or _default_chunk(_vocab_size(head, hidden))
    parts = [
        _checkpointed_losses(head, hidden[i : i + step], targets[i : i + step])
        for i in _starts(hidden, step)
    ]
    return TokenLosses(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def token_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the entropy (N,) in nats of predictions from hidden (N, W) at a temperature."""

    def score(logits: Tensor) -> Tensor:
        logs = (logits / temperature).log_softmax(dim=1)
        return -(logs.exp() * logs.clamp(min=-1e4)).sum(dim=1)

    return _score_chunks(hidden, head, score, chunk_size)


def token_logsumexp(
    hidden: Tensor, head: Callable[[Tensor], Tensor], chunk_size: int | None = None
) -> Tensor:
    """Return the log-sum-exp (N,) of the logits of hidden (N, W), in float32."""
    return _score_chunks(hidden, head, lambda logits: logits.logsumexp(dim=1), chunk_size)


def _score_chunks(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
    chunk_size: int | None,
) -> Tensor:
    """Return ``score`` (N,) of the logits of hidden (N, W), in chunks, forward and backward."""
    step = chunk_size or _default_chunk(_vocab_size(head, hidden))
    parts = [hidden[i : i + step] for i in _starts(hidden, step)]
    if not torch.is_grad_enabled():
        return torch.cat([score(head(part).float()) for part in parts])
    scores = [checkpoint(lambda x: score(head(x).float()), x, use_reentrant=False) for x in parts]
    return torch.cat(scores)


def _starts(hidden: Tensor, step: int) -> range:
    """Return where chunks start: at least one, so that the graph exists without tokens too."""
    return range(0, max(len(hidden), 1), step)


def _default_chunk(vocabulary: int) -> int:
    return max(1, MAX_LOGITS // max(1, vocabulary))


def _vocab_size(head: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    with no_grad():
        return head(hidden.new_zeros(1, hidden.shape[1])).shape[-1]


def _checkpointed_losses(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return nll and correct of one chunk; the backward pass recomputes its logits."""

    def score(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(rows).float()
        own = logits.gather(1, target[:, None])[:, 0]
        return torch.logsumexp(logits, 1) - own, logits.argmax(1) == target

    if not torch.is_grad_enabled():
        return score(hidden, targets)
    nll, correct = checkpoint(score, hidden, targets, use_reentrant=False)
    return nll, correct


class _FrozenHead(torch.autograd.Function):
    """Losses under a frozen matrix; the forward pass also computes the gradient, p - one_hot."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, targets: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        nll = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            # (C, V). logsumexp and softmax run in float32, whatever dtype the matrix has.
            logits = (hidden[part].to(matrix.dtype) @ matrix.T).to(nll.dtype)
            log_total = torch.logsumexp(logits, 1)
            target = targets[part, None]
            nll[part] = log_total - logits.gather(1, target)[:, 0]
            correct[part] = logits.argmax(1) == targets[part]
            if gradient is not None:
                logits.sub_(log_total[:, None]).exp_()
                logits.scatter_add_(1, target, -torch.ones_like(log_total[:, None]))
                gradient[part] = (logits.to(matrix.dtype) @ matrix).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None, None


def _frozen_losses(hidden: Tensor, matrix: Tensor, targets: Tensor, chunk_size: int) -> TokenLosses:
    return TokenLosses(*_FrozenHead.apply(hidden, matrix, targets, chunk_size))  # type: ignore[no-untyped-call]
