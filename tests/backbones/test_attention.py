"""One place attends: packed rows see what the dense mask lets them see."""

import pytest
import torch

from diffa.backbones import attention
from diffa.backbones.attention import (
    AttentionPlan,
    compute_attention,
    plan_attention,
    resolve_attn_implementation,
    varlen_layout,
)
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import SpecError

xformers = pytest.importorskip("xformers.ops", reason="xformers is not installed")

VALID = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0]]).bool()
ALL = torch.arange(6).expand(3, 6)


def allowed(layout, shape, keys):
    """What the bias lets every place see, (B, K, S) bool; places without a real query see none."""
    bias = layout.bias.materialize((len(layout.query_index), len(layout.key_index)))
    flat = torch.zeros(shape[0] * shape[1], shape[0] * keys, dtype=torch.bool)
    flat[layout.query_index[:, None], layout.key_index] = bias == 0
    return flat.view(shape[0], shape[1], shape[0], keys)


def dense(context, positions, causal):
    mask = context.mask(positions, causal=causal)
    keys = positions.shape[1] if context.positions is None else context.positions.shape[1]
    mask = torch.ones(1, 1, keys, dtype=torch.bool) if mask is None else mask
    return mask.expand(len(positions), positions.shape[1], keys)


def agree(context, positions, *, causal, real):
    packed = allowed(
        varlen_layout(context, positions, causal=causal),
        positions.shape,
        dense(context, positions, causal).shape[2],
    )
    expected = dense(context, positions, causal)
    for row in range(len(positions)):
        for other in range(len(positions)):
            seen = packed[row, :, other][real[row]]
            wanted = expected[row][real[row]] if row == other else torch.zeros_like(seen)
            assert torch.equal(seen, wanted)


def test_packed_rows_see_their_own_valid_slots():
    agree(AttentionContext(valid=VALID), ALL, causal=False, real=VALID)
    layout = varlen_layout(AttentionContext(valid=VALID), ALL, causal=False)
    assert (
        len(layout.query_index) == len(layout.key_index) == int(VALID.sum())
    )  # no padding is carried


def test_rows_without_padding_pack_too():
    agree(AttentionContext(), ALL, causal=False, real=torch.ones_like(VALID))


def test_packed_queries_over_a_memory_see_all_valid_slots():
    slots = torch.tensor([[4, 5], [1, 2], [2, 3]])
    context = AttentionContext(valid=VALID, positions=ALL, query_slots=slots)
    real = torch.ones(3, 2, dtype=torch.bool)
    agree(context, ALL.gather(1, slots), causal=False, real=real)


def test_packed_causal_rows_see_no_later_slot():
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    positions = torch.arange(4).expand(2, 4)
    agree(AttentionContext(valid=valid), positions, causal=True, real=valid)


def test_packed_attention_equals_masked_attention():
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = (torch.randn(3, 6, 2, 8, generator=generator) for _ in range(3))
    context = AttentionContext(valid=VALID)
    mask = context.mask(ALL, causal=False)
    reference = compute_attention(queries, keys, values, AttentionPlan(mask[:, None]))
    layout = varlen_layout(context, ALL, causal=False)
    bias = layout.bias.materialize((len(layout.query_index), len(layout.key_index)))
    flat = [
        x.flatten(0, 1)[i] for x, i in ((queries, layout.query_index), (keys, layout.key_index))
    ]
    scores = torch.einsum("qhd,khd->hqk", *flat) / 8**0.5 + bias
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.flatten(0, 1)[layout.key_index])
    assert torch.allclose(mixed.flatten(1), reference.flatten(0, 1)[layout.query_index], atol=1e-5)


def test_grouped_queries_share_their_keys():
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(1, 5, 4, 8, generator=generator)
    keys, values = (torch.randn(1, 5, 2, 8, generator=generator) for _ in range(2))
    grouped = compute_attention(queries, keys, values, AttentionPlan())
    wide = compute_attention(
        queries,
        keys.repeat_interleave(2, 2),
        values.repeat_interleave(2, 2),
        AttentionPlan(),
    )
    assert torch.allclose(grouped, wide, atol=1e-6)


def test_the_plain_cases_write_no_mask():
    assert plan_attention(AttentionContext(), ALL, causal=False, implementation="auto").mask is None
    causal = plan_attention(AttentionContext(), ALL, causal=True, implementation="auto")
    assert causal.mask is None and causal.causal
    assert plan_attention(
        AttentionContext(valid=VALID), ALL, causal=True, implementation="auto"
    ).mask.shape == (
        3,
        1,
        6,
        6,
    )


def test_xformers_is_refused_where_it_has_no_kernels():
    assert resolve_attn_implementation("auto", torch.device("cpu")) == "sdpa"
    with pytest.raises(SpecError, match="needs a CUDA device"):
        resolve_attn_implementation("xformers", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_packed_rows_equal_masked_rows_on_a_gpu():
    generator = torch.Generator().manual_seed(3)
    sizes = [(3, 6, 4, 64), (3, 6, 2, 64), (3, 6, 2, 64)]
    made = [torch.randn(s, generator=generator).cuda().half() for s in sizes]
    context = AttentionContext(valid=VALID.cuda())
    packed = compute_attention(
        *made, plan_attention(context, ALL.cuda(), causal=False, implementation="xformers")
    )
    masked = compute_attention(
        *made, plan_attention(context, ALL.cuda(), causal=False, implementation="sdpa")
    )
    assert (packed - masked).abs()[VALID.cuda()].max() < 5e-3


@pytest.mark.parametrize("grad", [False, True])
def test_auto_takes_sdpa_where_xformers_has_no_kernel(monkeypatch, grad):
    """The dispatcher is asked with the dtype and the width at hand, on any device."""
    fmha = pytest.importorskip("xformers.ops.fmha")
    seen = []

    def dispatch(inputs, *_):
        seen.append((inputs.query.dtype, inputs.query.shape[-1]))
        if inputs.query.dtype == torch.float64:
            raise KeyError(torch.float64)
        if inputs.query.shape[-1] % 8:
            raise NotImplementedError("query.shape[-1] % 8 != 0")

    monkeypatch.setattr(fmha, "_dispatch_fw", dispatch)
    monkeypatch.setattr(fmha, "_dispatch_bw", dispatch)
    attention._missing_kernel.cache_clear()
    device = torch.device("cpu")
    assert attention._missing_kernel(device, torch.bfloat16, 64, grad) == ""
    assert "% 8" in attention._missing_kernel(device, torch.bfloat16, 60, grad)
    assert "float64" in attention._missing_kernel(device, torch.float64, 64, grad)
    assert (torch.bfloat16, 60) in seen
    attention._missing_kernel.cache_clear()


def test_without_a_kernel_xformers_is_refused_and_auto_falls_back(monkeypatch):
    pytest.importorskip("xformers.ops")
    monkeypatch.setattr(attention, "_missing_kernel", lambda *_: "of this kind")
    device = torch.device("cuda")
    assert resolve_attn_implementation("auto", device, torch.float32, 64) == "sdpa"
    with pytest.raises(SpecError, match=r"no kernel for torch.float32 .*width 64.*of this kind"):
        resolve_attn_implementation("xformers", device, torch.float32, 64)
    monkeypatch.setattr(attention, "_missing_kernel", lambda *_: "")
    assert resolve_attn_implementation("auto", device, torch.float32, 64) == "xformers"
