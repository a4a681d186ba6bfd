"""Choices scored with block-causal models: each block after the choice's own tokens."""

import itertools

import pytest
import torch
from test_combinations import BACKBONES

import diffa
from diffa.canvas.kv_cache import AttentionContext
from diffa.canvas.likelihood import score_choices

PROMPT = torch.tensor([5, 6, 7, 8, 9])


def stirred(name):
    backbone = diffa.build(
        {"backbone": BACKBONES[name] | {"block_length": 2}, "sampler": "blockwise"}
    ).backbone
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in backbone.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 2 * weight.shape[1] ** -0.5, generator=generator)
    return backbone


def exact_bound(backbone, choice):
    """The bound with every set of masks enumerated, each block in a row of its own."""
    mask, shift = backbone.vocab.mask, int(backbone.shifted)
    size, total = len(choice), 0.0
    for count in range(1, size + 1):
        sets = list(itertools.combinations(range(size), count))
        for places in sets:
            for place in places:
                noisy = choice.clone()
                # only the block of the token is masked; blocks before it are clean
                slot = len(PROMPT) + place
                first = slot // 2 * 2 - len(PROMPT)
                for other in places:
                    # the state before a block's first token belongs to the block before
                    if other >= first - 2 * shift * (slot % 2 == 0):
                        noisy[other] = mask
                row = torch.cat([PROMPT, noisy])[None]
                embeds = backbone.embed(row)
                positions = torch.arange(row.shape[1])[None]
                hidden = backbone(embeds, positions, AttentionContext())
                logs = backbone.head(hidden[0, slot - shift]).log_softmax(-1)
                total += float(logs[choice[place]]) * size / count / len(sets) / size
    return total


@pytest.mark.parametrize("name", ["sdar", "llada2", "fastdllm2"])
@torch.no_grad()
def test_scores_estimate_the_bound_of_block_diffusion(name):
    backbone = stirred(name)
    choices = [torch.tensor([3, 4, 2]), torch.tensor([9, 1, 12])]
    scores = score_choices(backbone, PROMPT, None, 0, choices, samples=4000, seed=0, batch=64)
    for choice, value in zip(choices, scores.values, strict=True):
        due = exact_bound(backbone, choice)
        assert abs(float(value) - due) < 0.05 * abs(due)


@torch.no_grad()
def test_one_token_is_scored_exactly():
    backbone = stirred("sdar")
    choices = [torch.tensor([3]), torch.tensor([4])]
    scores = score_choices(backbone, PROMPT, None, 0, choices, samples=8, seed=0, batch=4)
    assert scores.values.tolist() == pytest.approx(
        [exact_bound(backbone, torch.tensor([token])) for token in (3, 4)], abs=1e-4
    )
