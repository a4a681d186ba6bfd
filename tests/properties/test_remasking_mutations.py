"""Every property of unmasking fails when its rule is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from properties import test_remasking as properties
from torch import Tensor

from diffa.samplers import acceptance, blocks, blockwise, predictions, rng, selection
from diffa.samplers import transfer_schedule as schedule
from diffa.samplers.blocks import BlockState
from diffa.testing import toy_canvas

BROKEN = settings(
    max_examples=150, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate),
    database=None,
)  # fmt: skip

_transfer, _top_k, _accept, _fill_after_eos, _uniform = (
    schedule.num_transfer_tokens, selection.select_top_k, acceptance.AcceptanceRule.accept,
    blocks.fill_after_eos, rng.slot_uniform,
)  # fmt: skip


def one_more(state: BlockState, *more: Any) -> Tensor:
    """A schedule that accepts one token more than its share."""
    return _transfer(state, *more) + 1


def remainder_last(state: BlockState, *more: Any) -> Tensor:
    """A schedule that rounds down first."""
    return _transfer(state._replace(block_step=10_000 - state.block_step), *more)


def take_nothing(self: Any, found: Any, state: BlockState, *more: Any) -> Tensor:
    """A rule that accepts nothing in its block's first step."""
    return _accept(self, found, state, *more) & (state.block_step > 0)[:, None]


def open_everything(self: Any, canvas: Any, width: int) -> None:
    """Blocks as wide as the answer, whatever was asked."""
    _init(self, canvas, canvas.length)


_init = blocks.BlockTracker.__init__


def end_over_given(canvas: Any, draft: Tensor) -> None:
    """An end that overwrites given tokens."""
    _fill_after_eos(canvas, torch.zeros_like(draft))


def end_at_once(canvas: Any, draft: Tensor) -> None:
    """An end that does not wait for what is before it."""
    ended = (canvas.answer == canvas.vocab.eos).cumsum(dim=1) > 0
    canvas.fill(ended & ~draft, canvas.vocab.eos)


def never_end(canvas: Any, draft: Tensor) -> None:
    """No end at all."""


def by_row(seeds: Tensor, step: Tensor, slots: Tensor, *, stream: int) -> Tensor:
    """Draws that depend on a row's place in the batch."""
    return _uniform(seeds + torch.arange(len(seeds)), step, slots, stream=stream)


def half(seeds: Tensor, step: Tensor, slots: Tensor, *, stream: int) -> Tensor:
    """Draws that are not uniform."""
    return _uniform(seeds, step, slots, stream=stream) ** 1.1


def stepless(seeds: Tensor, step: Tensor, slots: Tensor, *, stream: int) -> Tensor:
    """Draws that forget the step."""
    return _uniform(seeds, step * 0, slots, stream=stream)


def n_less_one(scores: Tensor, masked: Tensor, counts: Tensor) -> Tensor:
    """One fewer than asked."""
    return _top_k(scores, masked, counts - 1)


def above(scores: Tensor, masked: Tensor, least: float) -> Tensor:
    """Above the threshold, not at it."""
    best = scores.masked_fill(~masked, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores > least) | (scores == best)) & masked


def accept_the_failing(scores: Tensor, masked: Tensor, scale: float, **_: Any) -> Tensor:
    """Fast-dLLM's released loop: the last one that fails is accepted too."""
    found = _factor(scores, masked, scale)
    return found | selection.select_top_k(scores, masked, found.sum(dim=1) + 1)


def bound_with_itself(entropies: Tensor, masked: Tensor, bound: float) -> Tensor:
    """The sum that must stay within the bound includes the candidate's own entropy."""
    first = selection.select_top_k(-entropies, masked, torch.ones(len(masked), dtype=torch.long))
    costs = entropies.masked_fill(~masked, torch.inf)
    ordered, order = costs.sort(dim=1, stable=True)
    inside = torch.zeros_like(masked).scatter(1, order, ordered.cumsum(dim=1) <= bound)
    return (inside | first) & masked


def warm(logits: Tensor, temperature: float, numbers: Tensor) -> Tensor:
    """A temperature that is not the one asked for."""
    return _categorical(logits, 1.2 * temperature, numbers)


def unmasked_final(canvas: Any, **_: Any) -> Any:
    """Every decided token called final, though an end may replace it."""
    return _make_step(canvas)


_factor, _categorical, _make_step = (
    selection.select_factor, rng.sample_categorical, blocks.make_step,
)  # fmt: skip

P = properties
MUTATIONS: list[tuple[Any, str, Callable[..., Any], Callable[..., None]]] = [
    (acceptance, "num_transfer_tokens", one_more,
     P.test_a_step_reveals_the_schedules_share_to_rounding),
    (acceptance, "num_transfer_tokens", remainder_last,
     P.test_a_step_reveals_the_schedules_share_to_rounding),
    (acceptance.AcceptanceRule, "accept", take_nothing,
     P.test_every_step_reveals_at_least_one_token_of_every_open_row),
    (blockwise, "fill_after_eos", end_over_given, P.test_given_tokens_never_change),
    (blockwise, "fill_after_eos", end_at_once,
     P.test_an_end_closes_its_row_once_all_before_it_is_decided),
    (blockwise, "fill_after_eos", never_end,
     P.test_an_end_closes_its_row_once_all_before_it_is_decided),
    (blockwise, "make_step", unmasked_final, P.test_final_tokens_never_change),
    (blocks.BlockTracker, "__init__", open_everything, P.test_blocks_finish_from_left_to_right),
    (predictions, "slot_uniform", by_row, P.test_a_row_of_a_batch_is_the_row_alone_over_the_toy),
    (predictions, "slot_uniform", by_row,
     P.test_a_row_of_a_batch_is_the_row_alone_over_a_real_llada),
    (P, "slot_uniform", half, P.test_draws_are_uniform_and_independent_in_every_key),
    (P, "slot_uniform", stepless, P.test_draws_are_keyed_by_seed_step_and_slot),
    (P, "slot_uniform", by_row, P.test_draws_are_keyed_by_seed_step_and_slot),
    (selection, "select_top_k", n_less_one, P.test_fixed_takes_the_n_highest),
    (selection, "select_threshold", above,
     P.test_threshold_takes_what_reaches_it_and_the_best),
    (selection, "select_factor", accept_the_failing,
     P.test_factor_takes_the_longest_run_that_passes),
    (selection, "select_entropy_bound", bound_with_itself,
     P.test_the_entropy_bound_takes_while_the_sum_before_stays_within),
    (P, "sample_categorical", warm, P.test_sampling_follows_the_softmax_of_the_temperature),
]  # fmt: skip


@pytest.mark.parametrize(
    "place, name, broken, prove", MUTATIONS, ids=[f"{m[2].__name__}-{m[1]}" for m in MUTATIONS]
)
def test_a_broken_rule_is_noticed(
    place: Any,
    name: str,
    broken: Callable[..., Any],
    prove: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(BaseException):  # noqa: B017 (several failures come as a group)
        (BROKEN(prove) if hasattr(prove, "hypothesis") else prove)()


@pytest.mark.parametrize("fault", ["prompt", "twice", "mask"])
def test_a_canvas_that_writes_wrongly_is_noticed(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas = type(toy_canvas([[1]], 1))
    write = canvas.write

    def broken(self: Any, slots: Tensor, tokens: Tensor, *confidence: Any) -> None:
        if fault == "prompt":  # one slot too far to the left
            slots = torch.where(slots > 0, slots - 1, slots)
        if fault == "twice":  # the neighbour to the right as well
            right = torch.where((slots >= 0) & (slots < self.size - 1), slots + 1, -1)
            write(self, right, tokens)
        if fault == "mask":  # a given token is masked again
            write(self, torch.full_like(slots, self.start), slots * 0 + (self.vocab.mask or 0))
        write(self, slots, tokens, *confidence)

    monkeypatch.setattr(canvas, "write", broken)
    with pytest.raises(BaseException):  # noqa: B017
        P.test_given_tokens_never_change()
