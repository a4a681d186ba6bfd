"""The one place that attends: SDPA everywhere, xformers over packed rows on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffa.errors import SpecError

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext

Kernel = Literal["auto", "sdpa", "xformers"]


class Packing(NamedTuple):
    """Rows of different lengths laid end to end: which elements, and the bias between them.

    Attributes:
        queries: flat indices of the real queries among B * K, in order.
        keys: flat indices of the valid keys among B * S, in order.
        bias: an xformers bias that keeps each row to itself.
    """

    queries: Tensor
    keys: Tensor
    bias: Any


class Plan(NamedTuple):
    """How one forward attends, the same in every layer.

    Attributes:
        mask: what each query may see, (B, 1, K or 1, S) bool; None for everything.
        causal: the mask is the plain causal one and need not be written out.
        packing: set when rows are packed for xformers.
        lengths: queries and keys of each row where rows stand end to end in one; None elsewhere.
    """

    mask: Tensor | None
    causal: bool
    packing: Packing | None
    lengths: tuple[list[int], list[int]] | None = None


def plan(context: AttentionContext, positions: Tensor, *, causal: bool, kernel: Kernel) -> Plan:
    """Prepare a forward with queries at ``positions`` (B, K).

    Raises:
        SpecError: xformers is asked for where it cannot run.
    """
    if context.row_lengths is not None:
        return Plan(
            None, causal=False, packing=None, lengths=(context.row_lengths, context.row_lengths)
        )
    alone = context.query_slots is None and context.branch is None and context.attn_mask is None
    if chosen(kernel, positions.device) == "xformers" and context.branch is None:
        simple = context.attn_mask is None and (alone or not causal)
        if simple:
            return Plan(None, causal=causal, packing=pack(context, positions, causal=causal))
    if causal and alone and context.valid is None:
        return Plan(None, causal=True, packing=None)
    mask = context.mask(positions, causal=causal)
    return Plan(None if mask is None else mask[:, None], causal=False, packing=None)


def narrow(how: Plan, rows: Tensor) -> Plan | None:
    """Keep the queries at ``rows`` (B, R) alone; None where this plan cannot."""
    if how.packing is not None or how.causal:
        return None
    if how.lengths is not None:
        each = rows.shape[1] // len(how.lengths[1])
        return how._replace(lengths=([each] * len(how.lengths[1]), how.lengths[1]))
    if how.mask is None or how.mask.shape[2] == 1:
        return how
    wide = (len(rows), 1, rows.shape[1], how.mask.shape[3])
    mask = how.mask.expand(len(rows), -1, -1, -1)
    return how._replace(mask=mask.gather(2, rows[:, None, :, None].expand(wide)))


def chosen(kernel: Kernel, device: torch.device) -> Literal["sdpa", "xformers"]:
    """Return the kernel to use on a device; ``auto`` takes xformers where it can run.

    Raises:
        SpecError: ``xformers`` is asked for on a device that it has no kernels for.
    """
    if kernel == "sdpa" or (kernel == "auto" and device.type != "cuda"):
        return "sdpa"
    if device.type != "cuda":
        raise SpecError(
            f"attn_implementation 'xformers' needs a CUDA device, not {device}; use 'auto'"
        )
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:
        if kernel == "xformers":
            hint = "pip install 'diffa-audio[xformers]'"
            raise SpecError(
                f"attn_implementation 'xformers' does not load ({error}): {hint}"
            ) from error
        return "sdpa"
    return "xformers"


def pack(context: AttentionContext, positions: Tensor, *, causal: bool) -> Packing:
    """Lay the real slots of all rows end to end under a block-diagonal bias.

    Works without a GPU: tests materialise the bias and compare it with ``AttentionContext.mask``.
    """
    from xformers.ops.fmha import attn_bias

    count, wide = positions.shape
    size = wide if context.positions is None else context.positions.shape[1]
    valid = context.valid
    if valid is None:
        valid = torch.ones(count, size, dtype=torch.bool, device=positions.device)
    real = valid if context.query_slots is None else torch.ones_like(positions, dtype=torch.bool)
    q_lengths, k_lengths = real.sum(dim=1).tolist(), valid.sum(dim=1).tolist()
    if causal:
        bias = attn_bias.BlockDiagonalCausalMask.from_seqlens(q_lengths, k_lengths)
    else:
        bias = attn_bias.BlockDiagonalMask.from_seqlens(q_lengths, k_lengths)
    queries = real.flatten().nonzero()[:, 0]
    return Packing(queries, valid.flatten().nonzero()[:, 0], bias)


def attend(queries: Tensor, keys: Tensor, values: Tensor, how: Plan) -> Tensor:
    """Attend with queries (B, K, H, D) over keys and values (B, S, G, D), H a multiple of G.

    Returns:
        (B, K, H * D)
    """
    if how.packing is not None:
        return _packed(queries, keys, values, how.packing)
    if how.lengths is not None:
        return _end_to_end(queries[0], keys[0], values[0], *how.lengths)
    heads, groups = queries.shape[2], keys.shape[2]
    mixed = scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=how.mask,
        is_causal=how.causal,
        enable_gqa=heads != groups,
    )
    return mixed.transpose(1, 2).flatten(2)


def _end_to_end(
    queries: Tensor, keys: Tensor, values: Tensor, asking: list[int], seen: list[int]
) -> Tensor:
    """One row after another; their lengths sum up to the queries' and the keys' first axis."""
    whole = Plan(None, causal=False, packing=None)
    rows = zip(
        torch.split(queries, asking),
        torch.split(keys, seen),
        torch.split(values, seen),
        strict=True,
    )
    return torch.cat([attend(q[None], k[None], v[None], whole) for q, k, v in rows], dim=1)


def _packed(queries: Tensor, keys: Tensor, values: Tensor, packing: Packing) -> Tensor:
    from xformers.ops import memory_efficient_attention

    repeat = queries.shape[2] // keys.shape[2]
    if repeat > 1:
        keys, values = keys.repeat_interleave(repeat, 2), values.repeat_interleave(repeat, 2)
    mixed = memory_efficient_attention(
        queries.flatten(0, 1)[packing.queries][None],
        keys.flatten(0, 1)[packing.keys][None],
        values.flatten(0, 1)[packing.keys][None],
        attn_bias=packing.bias,
    )
    # Places that hold no real query stay zero; nothing reads them.
    out = queries.new_zeros(queries.flatten(0, 1).shape)
    out[packing.queries] = mixed[0].to(out.dtype)
    return out.view(queries.shape).flatten(2)
