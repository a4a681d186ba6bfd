"""Muon (Jordan et al. 2024): orthogonalised momentum for matrices, AdamW for all others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients of the quintic iteration that brings singular values near 1 in few steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return matrices (N, R, C) with all singular values near 1 (Newton-Schulz, float32)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (torch.linalg.matrix_norm(x)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    result: Tensor = x.transpose(1, 2) if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Take orthogonalised steps in groups with ``matrices: True``, AdamW's in all others.

    Matrices of one shape are orthogonalised as one batch in float32: torch.optim.Muon takes
    them one by one in bfloat16, three times slower on a CPU.

    Args:
        groups: Parameter groups with ``lr``, ``weight_decay`` and ``matrices``.
        momentum: Momentum of matrices.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, {"lr": 1e-3, "matrices": False, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; return the loss of ``closure``, which is called with gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"]) if params else None
            if group["matrices"]:
                self._step_matrices(params, group)
            else:
                self._step_adamw(params, group)
        return loss

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Step along orthogonalised Nesterov momentum, scaled by the matrix's aspect ratio."""
        shapes: dict[torch.Size, list[Tensor]] = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        for shape, same in shapes.items():
            for p in same:
                self.state[p].setdefault("momentum", torch.zeros_like(p))
            momenta = [self.state[p]["momentum"] for p in same]
            grads = [p.grad for p in same if p.grad is not None]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
            updates = orthogonalize(torch.stack(list(nesterov)).float())
            scale = -group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_add_(same, [u.to(p.dtype) for u, p in zip(updates, same)], alpha=scale)  # noqa: B905

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Step as Adam does (Kingma and Ba 2015); weight decay is already applied."""
        first, second = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - first)
            state["square"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
            scale = math.sqrt(1 - second ** state["step"])
            bound = state["square"].sqrt().div_(scale).add_(group["eps"])
            p.addcdiv_(state["mean"], bound, value=-group["lr"] / (1 - first ** state["step"]))
