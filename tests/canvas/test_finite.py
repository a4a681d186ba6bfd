"""Logits that are no numbers, and samplers that do not end, are errors of their rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffa
from diffa.canvas import denoiser
from diffa.errors import DecodingError
from diffa.evaluation.batched_model import BatchedModel
from diffa.evaluation.items import Question
from diffa.model import Model
from diffa.samplers import selection

SAMPLERS: list[dict[str, Any]] = [
    {"name": "blockwise", "threshold": 0.9},
    {"name": "blockwise", "factor": 1.0, "cache": "dual"},
    {"name": "blockwise", "entropy_bound": 0.5, "cache": "prefix"},
    {"name": "blockwise", "steps": 4},
    {"name": "speculative", "threshold": 0.9},
    {"name": "wino"},
    {"name": "growing"},
]
WAVE = torch.sin(torch.arange(8000) / 7.0) * 0.3


@pytest.fixture(scope="module")
def damaged() -> Model:
    """The smallest model with one weight that is no number."""
    model = diffa.build("nano")
    with torch.no_grad():
        model.backbone.transformer.blocks[0].attn_out.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda one: str(one))
def test_logits_that_are_no_numbers_end_every_sampler(
    damaged: Model, sampler: dict[str, Any]
) -> None:
    model = diffa.swap(damaged, sampler=sampler)
    with pytest.raises(DecodingError, match="NaN or infinite numbers after 1 forward"):
        model.answer(WAVE, "What can you hear?", max_tokens=16)


def test_no_step_of_such_logits_is_yielded(damaged: Model) -> None:
    steps = damaged.stream(torch.tensor([5, 6, 7]), WAVE, max_tokens=8)
    with pytest.raises(DecodingError, match="NaN or infinite"):
        next(steps)


def test_scores_that_are_no_numbers_are_told(damaged: Model) -> None:
    with pytest.raises(DecodingError, match="not finite"):
        damaged.score(WAVE, "What can you hear?", ["one", "two"], samples=2)


def test_extreme_samples_concern_their_own_row() -> None:
    model = BatchedModel(diffa.build("nano"))
    questions = [Question("What can you hear?", max_tokens=8)] * 3
    results = model(questions, [WAVE, WAVE * 1e38, WAVE])
    assert results[0].error is None and results[0].text == results[2].text
    assert results[1].text is not None or "finite" in str(results[1].error).lower()


def test_any_error_of_a_row_is_that_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffa.build("nano")
    listen = Model.listen

    def listening(self: Model, audio: torch.Tensor, lengths: torch.Tensor) -> Any:
        if bool((audio == 0.25).all(dim=1).any()):
            raise ZeroDivisionError("of a part")
        if len(audio) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return listen(self, audio, lengths)

    monkeypatch.setattr(Model, "listen", listening)
    waves = [WAVE, WAVE, torch.full((8000,), 0.25), WAVE]
    results = BatchedModel(model)([Question("What can you hear?", max_tokens=8)] * 4, waves)
    assert [result.error for result in results] == [
        None, None, "ZeroDivisionError: of a part", None,
    ]  # fmt: skip


def test_a_sampler_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser, "_MORE_PASSES", 10)
    monkeypatch.setattr(denoiser, "_PASSES_PER_TOKEN", 1)
    monkeypatch.setattr(
        selection, "select_threshold", lambda scores, masked, _: torch.zeros_like(masked)
    )
    model = diffa.swap(diffa.build("nano"), sampler={"name": "blockwise", "threshold": 0.9})
    with pytest.raises(DecodingError, match=r"not ended after 18 forward passes over 8 tokens"):
        model.answer(WAVE, "What can you hear?", max_tokens=8)


@given(
    st.lists(st.floats(width=32, allow_infinity=False), min_size=1, max_size=6),
    st.data(),
)
def test_every_rule_accepts_a_token_whatever_the_scores(scores: list[float], data: Any) -> None:
    row = torch.tensor([scores])
    masked = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))]
    )
    if not bool(masked.any()):
        return
    places = torch.arange(len(scores))[None]
    rules = [
        selection.select_top_k(row, masked, torch.ones(1, dtype=torch.long)),
        selection.select_threshold(row, masked, 0.9),
        selection.select_factor(row, masked, 1.0),
        selection.select_factor(row, masked, 1.0, released=True),
        selection.select_entropy_bound(row, masked, 0.5),
        selection.select_klass(row, masked, row, 0.9, 0.01),
        selection.select_local_leap(row, masked, places, 0.9, 0.5),
        selection.select_runs(row, masked, places, 0.9, 0.5),
    ]
    for accepted in rules:
        assert bool((accepted & masked).any()) and not bool((accepted & ~masked).any())


def test_klass_decodes_a_model_in_float64() -> None:
    model = diffa.build("nano", dtype="float64")
    model = diffa.swap(model, sampler={"name": "blockwise", "threshold": 0.9, "kl_threshold": 0.01})
    assert model.answer(WAVE, "What can you hear?", max_tokens=8).text
