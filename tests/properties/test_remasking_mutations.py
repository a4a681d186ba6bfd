"""Every property of unmasking fails when its rule is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from properties import test_remasking as properties
from torch import Tensor

from diffa.samplers import (
    acceptance as rules,
)
from diffa.samplers import (
    blocks,
    loop,
)
from diffa.samplers import (
    predictions as predictions,
)
from diffa.samplers import (
    rng as draws,
)
from diffa.samplers import (
    selection as select,
)
from diffa.samplers import (
    transfer_schedule as quota,
)
from diffa.testing import toy_canvas

BROKEN = settings(
    max_examples=150, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate),
    database=None,
)  # fmt: skip

_even, _fixed, _take, _end, _uniform = (
    quota.even, select.fixed, rules.Rule.take, blocks.end, draws.uniform,
)  # fmt: skip
_places, _read = blocks.Blocks.enter, predictions.read


def one_more(*where: Any, **options: Any) -> Tensor:
    """A schedule that reveals one token more than its share."""
    return _even(*where, **options) + 1


def remainder_last(block: Tensor, since: Tensor, due: Tensor, **options: Any) -> Tensor:
    """A schedule that rounds down first."""
    return _even(block, 10_000 - since, due, **options)


def take_nothing(self: Any, found: Any, place: Any, *more: Any) -> Tensor:
    """A rule that accepts nothing in its block's first step."""
    return _take(self, found, place, *more) & (place.since > 0)[:, None]


def open_everything(self: Any, canvas: Any, width: int) -> None:
    """Blocks as wide as the answer, whatever was asked."""
    _init(self, canvas, canvas.length)


_init = blocks.Blocks.__init__


def end_over_given(canvas: Any, given: Tensor) -> None:
    """An end that overwrites given tokens."""
    _end(canvas, torch.zeros_like(given))


def end_at_once(canvas: Any, given: Tensor) -> None:
    """An end that does not wait for what is before it."""
    ended = (canvas.answer == canvas.vocab.eos).cumsum(dim=1) > 0
    canvas.fill(ended & ~given, canvas.vocab.eos)


def never_end(canvas: Any, given: Tensor) -> None:
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
    return _fixed(scores, masked, counts - 1)


def above(scores: Tensor, masked: Tensor, least: float) -> Tensor:
    """Above the threshold, not at it."""
    best = scores.masked_fill(~masked, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores > least) | (scores == best)) & masked


def accept_the_failing(scores: Tensor, masked: Tensor, scale: float) -> Tensor:
    """Fast-dLLM's released loop: the last one that fails is accepted too."""
    found = _factor(scores, masked, scale)
    return found | select.fixed(scores, masked, found.sum(dim=1) + 1)


def bound_with_itself(entropies: Tensor, masked: Tensor, bound: float) -> Tensor:
    """The sum that must stay within the bound includes the candidate's own entropy."""
    first = select.fixed(-entropies, masked, torch.ones(len(masked), dtype=torch.long))
    costs = entropies.masked_fill(~masked, torch.inf)
    ordered, order = costs.sort(dim=1, stable=True)
    inside = torch.zeros_like(masked).scatter(1, order, ordered.cumsum(dim=1) <= bound)
    return (inside | first) & masked


def warm(logits: Tensor, temperature: float, numbers: Tensor) -> Tensor:
    """A temperature that is not the one asked for."""
    return _categorical(logits, 1.2 * temperature, numbers)


def unmasked_final(canvas: Any, revised: int | None = None, given: Any = None) -> Any:
    """Every decided token called final, though an end may replace it."""
    return _snapshot(canvas, revised)


_factor, _categorical, _snapshot = select.factor, draws.categorical, blocks.snapshot

P = properties
MUTATIONS: list[tuple[Any, str, Callable[..., Any], Callable[..., None]]] = [
    (rules, "even", one_more, P.test_a_step_reveals_the_schedules_share_to_rounding),
    (rules, "even", remainder_last, P.test_a_step_reveals_the_schedules_share_to_rounding),
    (rules.Rule, "take", take_nothing,
     P.test_every_step_reveals_at_least_one_token_of_every_open_row),
    (loop, "end", end_over_given, P.test_given_tokens_never_change),
    (loop, "end", end_at_once, P.test_an_end_closes_its_row_once_all_before_it_is_decided),
    (loop, "end", never_end, P.test_an_end_closes_its_row_once_all_before_it_is_decided),
    (loop, "snapshot", unmasked_final, P.test_final_tokens_never_change),
    (blocks.Blocks, "__init__", open_everything, P.test_blocks_finish_from_left_to_right),
    (predictions, "uniform", by_row, P.test_a_row_of_a_batch_is_the_row_alone_over_the_toy),
    (predictions, "uniform", by_row, P.test_a_row_of_a_batch_is_the_row_alone_over_a_real_llada),
    (P, "uniform", half, P.test_draws_are_uniform_and_independent_in_every_key),
    (P, "uniform", stepless, P.test_draws_are_keyed_by_seed_step_and_slot),
    (P, "uniform", by_row, P.test_draws_are_keyed_by_seed_step_and_slot),
    (select, "fixed", n_less_one, P.test_fixed_takes_the_n_highest),
    (select, "threshold", above, P.test_threshold_takes_what_reaches_it_and_the_best),
    (select, "factor", accept_the_failing, P.test_factor_takes_the_longest_run_that_passes),
    (select, "entropy_bound", bound_with_itself,
     P.test_the_entropy_bound_takes_while_the_sum_before_stays_within),
    (P, "categorical", warm, P.test_sampling_follows_the_softmax_of_the_temperature),
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
