"""A linear map that reads its weights once when few rows meet it, as in a cached decoding step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Measured on AVX-512 with MKL in float32: between these, weight @ rows is up to 1.9 times as fast
# as rows @ weight (benchmarks/cpu_linear.py), below and above them slower or the same.
_FEWEST, _MOST = 8, 64
_WEIGHTS = 1 << 20


class Linear(nn.Linear):
    """``nn.Linear`` that on a CPU multiplies from the weight's side where rows are few.

    Used without gradients and in float32 only; rounding differs in the last digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        rows = x.numel() // max(x.shape[-1], 1)
        if not (_FEWEST <= rows <= _MOST and self.weight.numel() >= _WEIGHTS and _plain(x)):
            return super().forward(x)
        out = torch.mm(self.weight, x.reshape(rows, -1).T.contiguous()).T.contiguous()
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def _plain(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
