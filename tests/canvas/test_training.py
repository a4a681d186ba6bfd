"""Objectives that ask more of the backbone than one pass over a corrupted row."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from helpers import small
from test_combinations import QWEN
from torch import nn

from diffa.backbones.dream import Dream
from diffa.backbones.fast_dllm import FastDLLM2
from diffa.backbones.llada import LLaDA
from diffa.backbones.sdar import SDAR
from diffa.canvas.batch import forward_rows
from diffa.canvas.kv_cache import AttentionContext
from diffa.canvas.training import block_layout, compute_loss, forward_blocks
from diffa.errors import SpecError
from diffa.objectives.masked import Masked

ROWS = [  # tokens before the answer, of it, audio embeddings, index before which they go
    (4, 5, 3, 1),
    (2, 4, 0, 0),
    (6, 3, 5, 6),
]


@cache
def batch() -> dict[str, Any]:
    """Rows of different lengths whose answers end them."""
    g = torch.Generator().manual_seed(3)
    width = max(before + size for before, size, _, _ in ROWS)
    tokens = torch.randint(0, 30, (len(ROWS), width), generator=g)
    columns = torch.arange(width)
    begin = torch.tensor([row[0] for row in ROWS])[:, None]
    lengths = torch.tensor([row[0] + row[1] for row in ROWS])
    return {
        "tokens": tokens,
        "answer": (columns >= begin) & (columns < lengths[:, None]),
        "lengths": lengths,
        "audio_embeds": [torch.randn(row[2], 32, generator=g) if row[2] else None for row in ROWS],
        "audio_at": torch.tensor([row[3] for row in ROWS]),
    }


def dream() -> Dream:
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": small.VOCAB,
        "mask_token_id": small.MASK, "eos_token_id": small.EOS, "pad_token_id": small.EOS,
    }  # fmt: skip
    model = Dream(config=config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(weight.shape[1] ** -0.5 * drawn)
    return model


@pytest.mark.parametrize("make", [small.backbone, dream])
@pytest.mark.parametrize("block", [1, 2, 9])
def test_a_block_is_read_as_if_only_the_blocks_before_it_were_there(make, block):
    """Each block's hidden states are those of a row that ends with that block: plain before it,
    corrupted in it, and its plain part read block by block."""
    model, given = make(), batch()
    tokens, answer = given["tokens"], given["answer"]
    noisy = torch.where(answer & (torch.rand(tokens.shape) < 0.6), small.MASK, tokens)
    rest = {key: given[key] for key in ("lengths", "audio_embeds", "audio_at")}
    with torch.no_grad():
        found = forward_blocks(
            model, noisy, *rest.values(), clean=tokens, answer=answer, block_length=block
        )
        for row, (before, size, heard, at) in enumerate(ROWS):
            for first in range(0, size, block):
                last = min(first + block, size)
                ids = torch.cat([tokens[row, : before + first],
                                 noisy[row, before + first : before + last]])[None]  # fmt: skip
                words = model.embed(ids)
                sound = [] if not heard else [rest["audio_embeds"][row][None]]
                embeds = torch.cat([words[:, :at], *sound, words[:, at:]], dim=1)
                place = torch.arange(embeds.shape[1])
                # the prompt is block 0; plain blocks do not look ahead
                number = (place - before - heard).div(block, rounding_mode="floor").clamp(min=-1)
                attn_mask = number[None, None] <= number[None, :, None]
                alone = model(embeds, place[None], AttentionContext(attn_mask=attn_mask))
                own = slice(before + first, before + last)
                expected = alone[0, -(last - first) :]
                assert torch.allclose(found[row, own], expected, atol=1e-5), (row, first)


def test_one_block_reads_the_answer_whole():
    """With one block the copies see the prompt and each other, as a diffusion model's answer."""
    index = torch.arange(5)[None]
    layout = block_layout(index, index >= 2, torch.tensor([5]), None, 3)
    attn_mask = layout.attn_mask
    assert layout.states.tolist() == [[0, 1, 5, 6, 7]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    assert attn_mask[0, 6].tolist() == [True, True, False, False, False, True, True, True]
    assert attn_mask[0, 3].tolist() == [True] * 5 + [False] * 3
    assert attn_mask[0, 1].tolist() == [True, True] + [False] * 6


@pytest.mark.parametrize("maker", [SDAR, FastDLLM2, LLaDA])
def test_rows_that_are_laid_out_alike_share_one_mask(maker):
    """A batch without padding builds no mask for each row, and its states are those of its rows."""
    config = small.CONFIG if maker is LLaDA else QWEN | {"mask_token_id": small.MASK}
    model = maker(config=config, block_length=4).eval()
    tokens = torch.randint(0, 30, (3, 14), generator=torch.Generator().manual_seed(4))
    answer = (torch.arange(14) >= 6).expand(3, -1)
    noisy = torch.where(answer & (torch.arange(14) % 3 == 0), small.MASK, tokens)
    lengths, masks = torch.full((3,), 14), []
    model.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[2].attn_mask))
    with torch.no_grad():
        states = forward_blocks(model, noisy, lengths, clean=tokens, answer=answer)
        for row in range(3):
            one = slice(row, row + 1)
            alone = forward_blocks(
                model, noisy[one], lengths[one], clean=tokens[one], answer=answer[one]
            )
            assert torch.allclose(states[one], alone, atol=1e-5)
    assert masks[0].shape[0] == 1


def loss(objective: Masked, model: nn.Module, seeds: torch.Tensor) -> torch.Tensor:
    given = dict(batch())
    found = compute_loss(model, objective, given.pop("tokens"), given.pop("answer"), seeds, **given)
    return found.sum / found.weight


def test_complementary_masks_add_up_to_the_whole_answer():
    model = small.backbone()
    objective = Masked(model.vocab, masking="count", complementary_masking=True)
    given = batch()
    first = objective.corrupt(given["tokens"], given["answer"], torch.arange(3))
    second = objective.second(given["tokens"], first, torch.arange(3))
    assert torch.equal(first.masked ^ second.masked, given["answer"])
    assert not (first.masked & second.masked).any()
    assert (second.tokens[second.masked] == small.MASK).all()
    parts = []
    for view in (first, second):
        hidden = forward_rows(
            model, view.tokens, given["lengths"], given["audio_embeds"], given["audio_at"]
        )
        parts.append(objective.loss(hidden, model.head, given["tokens"], view))
    expected = (parts[0][0] + parts[1][0]) / (parts[0][1] + parts[1][1])
    assert torch.allclose(loss(objective, model, torch.arange(3)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masking": "count", "complementary_masking": True},
        {"masking": "count", "block_length": 2},
    ],
)
def test_the_loss_of_a_batch_is_the_sum_of_its_rows(options):
    model, given = small.backbone(), batch()
    objective = Masked(model.vocab, **options)
    seeds = torch.tensor([5, 6, 7])
    whole = compute_loss(
        model, objective, given["tokens"], given["answer"], seeds,
        **{key: given[key] for key in ("lengths", "audio_embeds", "audio_at")},
    )  # fmt: skip
    total, weight = 0.0, 0.0
    for row in range(len(ROWS)):
        one, size = slice(row, row + 1), int(given["lengths"][row])
        part = compute_loss(
            model, objective, given["tokens"][one, :size], given["answer"][one, :size], seeds[one],
            lengths=given["lengths"][one], audio_embeds=given["audio_embeds"][one],
            audio_at=given["audio_at"][one],
        )  # fmt: skip
        total, weight = total + part.sum, weight + part.weight
    assert torch.allclose(whole.sum, total, rtol=1e-4) and whole.weight == weight


def exact(model: nn.Module, block: int) -> float:
    """The bound of blocks of the second row (no audio), every set of masks enumerated."""
    before, size, _, _ = ROWS[1]
    tokens = batch()["tokens"][1:2, : before + size]
    total = 0.0
    for first in range(0, size, block):
        width = min(block, size - first)
        for count in range(1, width + 1):
            sets = list(itertools.combinations(range(width), count))
            sums = 0.0
            for chosen in sets:
                noisy = tokens.clone()
                hidden_at = [before + first + i for i in chosen]
                noisy[0, hidden_at] = small.MASK
                answer = torch.arange(before + size)[None] >= before
                with torch.no_grad():
                    hidden = forward_blocks(
                        model, noisy, torch.tensor([before + size]), clean=tokens, answer=answer,
                        block_length=block,
                    )  # fmt: skip
                logs = model.head(hidden[0, hidden_at]).log_softmax(-1)
                sums -= float(logs.gather(1, tokens[0, hidden_at][:, None]).sum())
            total += sums / len(sets) / count
    return total


@pytest.mark.parametrize("block", [1, 2, 3])
def test_block_diffusion_is_unbiased(block):
    model = small.backbone()
    before, size, _, _ = ROWS[1]
    many = 600
    tokens = batch()["tokens"][1:2, : before + size].repeat(many, 1)
    answer = (torch.arange(before + size) >= before).repeat(many, 1)
    objective = Masked(model.vocab, masking="count", block_length=block)
    noised = objective.corrupt(tokens, answer, torch.arange(many))
    with torch.no_grad():
        hidden = forward_blocks(
            model, noised.tokens, torch.full((many,), before + size), clean=tokens,
            answer=answer, block_length=block,
        )  # fmt: skip
    nll = nn.functional.cross_entropy(model.head(hidden).transpose(1, 2), tokens, reduction="none")
    rows = (nll * noised.weights).sum(1).double()
    due, error = exact(model, block), float(rows.std()) / many**0.5
    assert abs(float(rows.mean()) - due) < 4 * error + 1e-4 * due
    if block == 1:  # every block is one mask: plain autoregression, nothing is drawn
        assert error < 1e-5


def test_blocks_and_packing_do_not_combine():
    model = small.backbone()
    given = {key: batch()[key] for key in ("tokens", "answer", "lengths")}
    objective = Masked(model.vocab, masking="count", block_length=2)
    with pytest.raises(SpecError, match="leave packing out"):
        compute_loss(
            model, objective, given["tokens"], given["answer"], torch.arange(3),
            lengths=given["lengths"], forward=lambda *_: torch.zeros(()),
        )  # fmt: skip


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("block", [2, 5])
def test_copies_begin_with_the_block_that_the_answer_begins_in(shifted, block):
    """Block by block, the noisy block behind the clean ones, the prompt's tail included."""
    config = QWEN | {"hidden_size": 32, "mask_token_id": small.MASK}
    model = (FastDLLM2 if shifted else SDAR)(config=config, block_length=block).eval()
    given = batch()
    tokens, answer = given["tokens"], given["answer"]
    noisy = torch.where(answer & (torch.rand(tokens.shape) < 0.6), small.MASK, tokens)
    rest = {key: given[key] for key in ("lengths", "audio_embeds", "audio_at")}
    with torch.no_grad():
        states = forward_blocks(model, noisy, *rest.values(), clean=tokens, answer=answer)
        for row, (before, size, heard, at) in enumerate(ROWS):
            sound = [] if not heard else [rest["audio_embeds"][row][None]]
            halves = []
            for ids in (tokens, noisy):
                words = model.embed(ids[row, : before + size][None])
                halves.append(torch.cat([words[:, :at], *sound, words[:, at:]], dim=1))
            clean, dirty = halves
            for place in range(before, before + size):
                slot = place + heard - shifted
                first = slot // block * block
                end = min(first + block, clean.shape[1])
                one = torch.cat([clean[:, :first], dirty[:, first:end]], dim=1)
                alone = model(one, torch.arange(end)[None], AttentionContext())[0, slot]
                assert torch.allclose(states[row, place], alone, atol=1e-5), (row, place)


@pytest.mark.parametrize("kind", ["masked", "complementary"])
def test_a_block_causal_model_learns_from_its_loss(kind):
    model = SDAR(config=QWEN | {"hidden_size": 32, "mask_token_id": small.MASK}).train()
    options = {"normalization": "masked", "eps": 0.3, "max_level": 0.8}
    if kind == "complementary":
        options = {"normalization": "masked", "complementary_masking": True}
    objective, optimizer = (
        Masked(model.vocab, **options),
        torch.optim.Adam(model.parameters(), 3e-3),
    )
    values = []
    for step in range(40):
        value = loss(objective, model, torch.arange(3) + 3 * (step % 4))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value))
    assert sum(values[-4:]) < 0.5 * sum(values[:4])
