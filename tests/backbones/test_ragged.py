"""Rows laid end to end get the hidden states of padded ones, and padding costs nothing."""

import pytest
import torch
from helpers.small import CONFIG, backbone
from hypothesis import given
from hypothesis import strategies as st

from diffa.backbones import transformer
from diffa.backbones.llada import LLaDA
from diffa.backbones.llama import Llama
from diffa.backbones.ragged import pack_rows
from diffa.canvas.kv_cache import AttentionContext, KVCache

FIRST = torch.zeros(3, 1, dtype=torch.long)


@pytest.fixture(scope="module")
def model():
    return backbone().double()


@st.composite
def rows(draw):
    """Which slots are real, anywhere in a row but one at least, and places among them to ask."""
    count, wide = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    cells = st.lists(st.booleans(), min_size=wide, max_size=wide).filter(any)
    valid = torch.tensor(draw(st.lists(cells, min_size=count, max_size=count)))
    asking = draw(st.integers(0, wide))
    picks = [
        draw(
            st.lists(
                st.sampled_from(row.nonzero()[:, 0].tolist()), min_size=asking, max_size=asking
            )
        )
        for row in valid
    ]
    return valid, torch.tensor(picks, dtype=torch.long) if asking else None


def inputs(valid, seed=3):
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(*valid.shape, 32, generator=generator, dtype=torch.float64)
    return embeds, (valid.cumsum(1) - 1).clamp(min=0)


def padded(model, *given):
    """The hidden states without packing."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(transformer, "pack_rows", lambda context, embeds: None)
        return model(*given)


@given(found=rows(), remembered=st.booleans())
def test_packed_rows_are_the_padded_ones(model, found, remembered):
    valid, asked = found
    embeds, positions = inputs(valid)
    memories = [KVCache() if remembered else None for _ in range(2)]
    for memory in filter(None, memories):
        memory.reserve(*valid.shape)
    contexts = [
        AttentionContext(
            valid=valid, positions=positions, kv_cache=memory, write=remembered, output_slots=asked
        )
        for memory in memories
    ]
    with torch.no_grad():
        got = model(embeds, positions, contexts[0])
    expected = padded(model, embeds, positions, contexts[1])
    if asked is None:
        assert torch.allclose(got[valid], expected[valid], atol=1e-9)
    else:
        wide = asked[:, :, None].expand(-1, -1, 32)
        assert torch.allclose(got.gather(1, wide), expected.gather(1, wide), atol=1e-9)
    if remembered:
        for mine, theirs in zip(memories[0]._keys, memories[1]._keys, strict=True):
            assert torch.allclose(mine[valid], theirs[valid], atol=1e-9)
        for mine, theirs in zip(memories[0]._values, memories[1]._values, strict=True):
            assert torch.allclose(mine[valid], theirs[valid], atol=1e-9)


def test_padding_meets_no_weight(model):
    valid = torch.arange(10) < torch.tensor([[10], [3], [6]])
    embeds, positions = inputs(valid)
    seen = []
    hook = model.transformer.blocks[0].ff_proj.register_forward_hook(
        lambda _, given, out: seen.append(out.shape[:-1].numel())
    )
    with torch.no_grad():
        model(embeds, positions, AttentionContext(valid=valid, output_slots=FIRST))
        model(
            embeds, positions, AttentionContext(valid=valid)
        )  # every state may be read, or watched
    padded(model, embeds, positions, AttentionContext(valid=valid, output_slots=FIRST))
    hook.remove()
    assert seen == [19, 30, 30]


GAP = torch.tensor([[True] * 4, [True, False, True, True]])
SOME = torch.zeros(2, 1, dtype=torch.long)


@pytest.mark.parametrize(
    "context",
    [
        AttentionContext(output_slots=SOME),
        AttentionContext(valid=torch.ones(2, 4, dtype=torch.bool), output_slots=SOME),
        AttentionContext(valid=torch.tensor([[True] * 4, [False] * 4]), output_slots=SOME),
        AttentionContext(valid=GAP, output_slots=SOME, query_slots=torch.zeros(2, 4)),
        AttentionContext(valid=GAP, output_slots=SOME, branch=torch.zeros(2, 4)),
        AttentionContext(valid=GAP, output_slots=SOME, attn_mask=torch.zeros(2, 4)),
        AttentionContext(valid=GAP),
    ],
    ids=["unknown", "full", "an empty row", "slots", "branches", "sees", "all are read"],
)
def test_what_cannot_be_packed_or_need_not_be_is_left_alone(context):
    with torch.no_grad():
        assert (
            pack_rows(AttentionContext(valid=GAP, output_slots=SOME), torch.zeros(2, 4, 8))
            is not None
        )
        assert pack_rows(context, torch.zeros(2, 4, 8)) is None


def test_training_and_other_devices_keep_their_batches():
    context = AttentionContext(valid=torch.tensor([[True, True], [True, False]]), output_slots=SOME)
    assert pack_rows(context, torch.zeros(2, 2, 8)) is None  # gradients are wanted
    with torch.no_grad():
        assert pack_rows(context, torch.zeros(2, 2, 8)) is not None
        assert pack_rows(context, torch.zeros(2, 2, 8, device="meta")) is None


def test_a_causal_transformer_keeps_its_mask():
    model = Llama(
        config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 64, "vocab_size": 40, "eos_token_id": 38,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        }
    ).double().eval()  # fmt: skip
    valid = torch.arange(5) < torch.tensor([[5], [3]])
    ask = torch.arange(3).expand(2, -1)
    embeds, positions = inputs(valid)
    with torch.no_grad():
        both = model(embeds, positions, AttentionContext(valid=valid, output_slots=ask))
        embeds[:, 4] += 1  # the future
        later = model(embeds, positions, AttentionContext(valid=valid, output_slots=ask))
    assert torch.equal(both[:, :3], later[:, :3])


def test_a_batch_of_ragged_rows_is_each_row_alone():
    model = LLaDA(config=CONFIG, seed=5).double().eval()
    valid = torch.arange(9) < torch.tensor([[4], [9], [7]])
    embeds, positions = inputs(valid)
    ask = torch.tensor([[0, 3], [8, 2], [6, 6]])
    with torch.no_grad():
        together = model(embeds, positions, AttentionContext(valid=valid, output_slots=ask))
        for row, length in enumerate([4, 9, 7]):
            mine = slice(row, row + 1), slice(length)
            alone = model(embeds[mine], positions[mine], AttentionContext())
            assert torch.allclose(together[row, ask[row]], alone[0, ask[row]], atol=1e-10)
