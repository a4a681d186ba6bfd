"""Preference optimisation repeats the reference code's bounds, margins and loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import diffa
from diffa.canvas.batch import forward_rows, unpad_embeds
from diffa.objectives.vrpo import VRPO
from diffa.types import Noised

AUDIO_AT, PROMPTS = 5, (12, 9)


def recorded(values: dict[str, torch.Tensor], name: str, prompt: int, mask: int) -> Noised:
    """The four recorded corruptions of one answer, k of its L tokens hidden at weight L / k."""
    tokens, masked = values[f"{name}.tokens"], values[f"{name}.masks"].bool()
    answer = (torch.arange(len(tokens)) >= prompt).expand(masked.shape)
    share = masked.sum(1, keepdim=True) / answer.sum(1, keepdim=True)
    noisy = torch.where(masked, mask, tokens)
    return Noised(noisy, masked, masked / share.clamp(min=1e-3), answer)


@contextmanager
def louder_queries(model: Any) -> Iterator[None]:
    """The recorded reference: every query projection multiplied by 1.1."""
    layers = [block.q_proj.weight for block in model.backbone.transformer.blocks]
    kept = [weight.clone() for weight in layers]
    for weight in layers:
        weight.mul_(1.1)
    yield
    for weight, old in zip(layers, kept, strict=True):
        weight.copy_(old)


@torch.no_grad()
def bounds(
    model: Any, values: dict[str, torch.Tensor], rule: VRPO, clip: int, heard: torch.Tensor
) -> torch.Tensor:
    """The bounds of a clip's chosen and rejected answer under the model as it is."""
    found = []
    for side in ("chosen", "rejected"):
        name = f"vrpo.clip{clip}.{side}"
        noised = recorded(values, name, PROMPTS[clip], model.backbone.vocab.mask)
        rows, size = noised.tokens.shape
        lengths, at = torch.full((rows,), size), torch.full((rows,), AUDIO_AT)
        hidden = forward_rows(model.backbone, noised.tokens, lengths, [heard] * rows, at)
        tokens = values[f"{name}.tokens"][None]
        found.append(rule.bounds(hidden, model.backbone.head, tokens, noised))
    return torch.cat(found)


def test_bounds_margins_and_loss_are_the_references(
    golden: tuple[str, diffa.Model, dict[str, torch.Tensor]],
) -> None:
    _, model, values = golden
    rule = VRPO(model.backbone.vocab, samples=4, beta=0.2)
    waves = [values[f"clip{clip}.waveform"].float() / 32768 for clip in (0, 1)]
    with torch.no_grad():
        heard = [unpad_embeds(model.listen(wave))[0] for wave in waves]
    policy = torch.cat([bounds(model, values, rule, clip, heard[clip]) for clip in (0, 1)])
    with torch.no_grad(), louder_queries(model):
        reference = torch.cat([bounds(model, values, rule, clip, heard[clip]) for clip in (0, 1)])
    names = [f"vrpo.clip{clip}.{side}" for clip in (0, 1) for side in ("chosen", "rejected")]
    for found, kind in ((policy, "policy"), (reference, "reference")):
        expected = [float(values[f"{name}.elbo_{kind}"]) for name in names]
        assert found.tolist() == pytest.approx(expected, rel=1e-3)
    preference = rule.compare(policy, reference)
    assert float(preference.loss.mean()) == pytest.approx(float(values["vrpo.loss"]), rel=1e-3)
    # a margin is a small difference of bounds of about -100
    assert preference.margin.tolist() == pytest.approx(values["vrpo.margins"].tolist(), abs=1e-3)
