"""Attention for every backbone of diffa's own: SDPA everywhere, xformers on CUDA.

Shapes: B rows, K queries, S keys (slots of the canvas), H query heads, G key/value heads, D width
of a head. Three layouts reach the kernel:

    masked    queries (B, K, H, D), keys (B, S, G, D), mask (B, 1, K or 1, S)
    varlen    real queries and keys of all rows in one sequence, under a block-diagonal bias:

                  keys     row 0  row 1
                  row 0  [  xxx    ...  ]
                  row 1  [  ...    xxx  ]

    lengths   rows packed into one by ``diffa.backbones.ragged``; one SDPA call per row
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffa.errors import SpecError

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext

AttnImplementation = Literal["auto", "sdpa", "xformers"]


class VarlenLayout(NamedTuple):
    """Real queries and keys of a batch in one sequence, for xformers' variable-length kernel.

    Attributes:
        query_index: indices of the real queries among B * K, in order.
        key_index: indices of the valid keys among B * S, in order.
        bias: xformers bias under which each row attends to itself alone.
    """

    query_index: Tensor
    key_index: Tensor
    bias: Any


class AttentionPlan(NamedTuple):
    """How one forward pass attends, the same in every layer.

    Attributes:
        mask: (B, 1, K or 1, S) bool. None: no mask is needed.
        causal: use the kernel's own causal mask instead of ``mask``.
        varlen: layout for xformers. None: use SDPA.
        row_lengths: queries and keys of each row where rows are packed into one. None elsewhere.
    """

    mask: Tensor | None = None
    causal: bool = False
    varlen: VarlenLayout | None = None
    row_lengths: tuple[list[int], list[int]] | None = None


def plan_attention(
    context: AttentionContext,
    positions: Tensor,
    *,
    causal: bool,
    implementation: AttnImplementation,
    block_length: int = 1,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
) -> AttentionPlan:
    """Return the plan of a forward pass with queries at ``positions`` (B, K).

    ``causal`` and ``block_length`` are those of ``AttentionContext.mask``. ``dtype`` and
    ``head_dim`` are those of queries and keys: kernels differ in what they take.

    Raises:
        SpecError: xformers is requested where it cannot run.
    """
    lengths = context.row_lengths
    if lengths is not None:
        return AttentionPlan(row_lengths=(lengths, lengths))
    all_slots = context.query_slots is None
    unrestricted = context.branch is None and context.attn_mask is None
    # A block-diagonal bias cannot express branches or masks. It is causal by place, not by
    # position, so it needs all slots where attention is causal. It knows no blocks.
    plain = block_length == 1 and context.block_origin is None
    if (
        unrestricted
        and (not causal or (all_slots and plain))
        and resolve_attn_implementation(implementation, positions.device, dtype, head_dim)
        == "xformers"
    ):
        return AttentionPlan(causal=causal, varlen=varlen_layout(context, positions, causal=causal))
    if causal and plain and all_slots and unrestricted and context.valid is None:
        return AttentionPlan(causal=True)
    mask = context.mask(positions, causal=causal, block_length=block_length)
    return AttentionPlan(None if mask is None else mask[:, None])


def select_queries(plan: AttentionPlan, index: Tensor) -> AttentionPlan | None:
    """Restrict a plan to the queries at ``index`` (B, R); return None where it cannot be."""
    if plan.varlen is not None or plan.causal:
        return None
    if plan.row_lengths is not None:
        keys = plan.row_lengths[1]
        return plan._replace(row_lengths=([index.shape[1] // len(keys)] * len(keys), keys))
    if plan.mask is None or plan.mask.shape[2] == 1:
        return plan
    rows, selected = index.shape
    mask = plan.mask.expand(rows, -1, -1, -1)
    index = index[:, None, :, None].expand(rows, 1, selected, mask.shape[3])
    return plan._replace(mask=mask.gather(2, index))


def resolve_attn_implementation(
    implementation: AttnImplementation,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
) -> Literal["sdpa", "xformers"]:
    """Return the kernel to use; ``auto`` takes xformers on CUDA where it has a kernel.

    Raises:
        SpecError: ``xformers`` is requested and does not load, or has no kernel for the device,
            the dtype or the width of a head.
    """
    if implementation == "sdpa" or (implementation == "auto" and device.type != "cuda"):
        return "sdpa"
    if device.type != "cuda":
        raise SpecError(
            f"attn_implementation 'xformers' needs a CUDA device, not {device}; use 'auto'"
        )
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:
        if implementation == "xformers":
            hint = "pip install 'diffa-audio[xformers]'"
            raise SpecError(
                f"attn_implementation 'xformers' does not load ({error}): {hint}"
            ) from error
        return "sdpa"
    if reason := _missing_kernel(device, dtype, head_dim, torch.is_grad_enabled()):
        if implementation == "xformers":
            raise SpecError(
                f"attn_implementation 'xformers' has no kernel for {dtype} and heads of width "
                f"{head_dim} on {device} ({reason}); use 'auto'"
            )
        return "sdpa"
    return "xformers"


@functools.cache
def _missing_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, grad: bool) -> str:
    """Return why xformers has no kernel under a block-diagonal bias; empty if it has one.

    Its dispatcher is asked with an input of this kind: bfloat16 on sm_75, float32 on sm_100,
    float64, and widths that are no multiple of 8 have none.
    """
    from xformers.ops import fmha

    try:
        sample = torch.empty(1, 2, 1, head_dim, device=device, dtype=dtype)
        bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens([1, 1], device=device)
        inputs = fmha.Inputs(sample, sample, sample, attn_bias=bias)
        fmha._dispatch_fw(inputs, grad)
        if grad:
            fmha._dispatch_bw(inputs, False)
    except Exception as error:  # NotImplementedError without a kernel, KeyError for some dtypes
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def varlen_layout(context: AttentionContext, positions: Tensor, *, causal: bool) -> VarlenLayout:
    """Return the layout of the real queries at ``positions`` (B, K) and of all valid slots.

    Works without a GPU: tests materialise the bias and compare it with ``AttentionContext.mask``.
    """
    from xformers.ops.fmha import attn_bias

    rows, queries = positions.shape
    size = queries if context.positions is None else context.positions.shape[1]
    valid = context.valid
    if valid is None:
        valid = torch.ones(rows, size, dtype=torch.bool, device=positions.device)
    real = valid if context.query_slots is None else torch.ones_like(positions, dtype=torch.bool)
    kind = attn_bias.BlockDiagonalCausalMask if causal else attn_bias.BlockDiagonalMask
    lengths = real.sum(dim=1).tolist(), valid.sum(dim=1).tolist()
    bias = kind.from_seqlens(*lengths, device=positions.device)
    return VarlenLayout(real.flatten().nonzero()[:, 0], valid.flatten().nonzero()[:, 0], bias)


def compute_attention(queries: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan) -> Tensor:
    """Attend with queries (B, K, H, D) over keys and values (B, S, G, D), H a multiple of G.

    Returns:
        (B, K, H * D)
    """
    if plan.varlen is not None:
        return _xformers_attention(queries, keys, values, plan.varlen)
    if plan.row_lengths is not None:
        return _attention_by_row(queries[0], keys[0], values[0], *plan.row_lengths)
    mixed = scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=plan.mask,
        is_causal=plan.causal,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return mixed.transpose(1, 2).flatten(2)


def _attention_by_row(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
) -> Tensor:
    """Attend row by row in packed rows (sum of lengths, heads, D); return (1, sum, H * D)."""
    rows = zip(
        torch.split(queries, query_lengths),
        torch.split(keys, key_lengths),
        torch.split(values, key_lengths),
        strict=True,
    )
    plan = AttentionPlan()
    return torch.cat([compute_attention(q[None], k[None], v[None], plan) for q, k, v in rows], 1)


def _xformers_attention(
    queries: Tensor, keys: Tensor, values: Tensor, layout: VarlenLayout
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    repeat = queries.shape[2] // keys.shape[2]
    if repeat > 1:
        keys, values = keys.repeat_interleave(repeat, 2), values.repeat_interleave(repeat, 2)
    mixed = memory_efficient_attention(
        queries.flatten(0, 1)[layout.query_index][None],
        keys.flatten(0, 1)[layout.key_index][None],
        values.flatten(0, 1)[layout.key_index][None],
        attn_bias=layout.bias,
    )
    # Queries of padding stay zero; nothing reads them.
    out = queries.new_zeros(queries.flatten(0, 1).shape)
    out[layout.query_index] = mixed[0].to(out.dtype)
    return out.view(queries.shape).flatten(2)
