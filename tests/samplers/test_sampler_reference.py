"""The mathematics of the samplers against slow references: one row, one slot, one token at a time.

benchmarks/mutants.py calls these functions without pytest, so they take no arguments.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from diffa.canvas.canvas import NO_TOKEN, Canvas
from diffa.samplers import selection
from diffa.samplers.blocks import (
    BlockState,
    BlockTracker,
    block_slots,
    drop_padding,
    fill_after_eos,
    make_step,
)
from diffa.samplers.predictions import (
    apply_cfg,
    entropy_of,
    exclude_mask,
    predict,
    token_probability,
)
from diffa.samplers.recompute import (
    AudioRefresh,
    BlockCache,
    DriftRefresh,
    RecomputeSlots,
    SuffixWindow,
)
from diffa.samplers.rng import sample_categorical, slot_uniform
from diffa.samplers.transfer_schedule import num_transfer_tokens, steps_per_block
from diffa.testing import toy_canvas
from diffa.testing.toy import MASKED

RANKINGS = ("confidence", "margin", "entropy", "random")
PROMPTS = ([1, 2, 3], [4], [-1, -1, 0, 2, -1, 3, 3])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# predictions


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def slow_prediction(
    logits: list[float], draw: float, order: float, ranking: str, temperature: float
) -> tuple[int, float, float]:
    """Return token, confidence and score of one slot."""
    p = softmax(logits)
    token = max(range(len(p)), key=lambda i: p[i])
    if temperature:
        warm, spent = softmax([x / temperature for x in logits]), 0.0
        for token, share in enumerate(warm):  # noqa: B007 (the token at which the sum passes)
            spent += share
            if spent > draw:
                break
    first, second = sorted(p, reverse=True)[:2]
    score = {
        "confidence": p[token],
        "margin": first - second,
        "entropy": sum(x * math.log(x) for x in p if x > 0),
        "random": order,
    }[ranking]
    return token, p[token], score


def raw_logits(seed: int, shape: tuple[int, ...] = (3, 4, 6)) -> Tensor:
    return 2 * torch.randn(shape, generator=generator(seed))


def test_predictions_are_those_of_one_slot_at_a_time() -> None:
    seeds, step = torch.tensor([7, 8, 9]), torch.tensor([0, 3, 5])
    places = torch.tensor([[0, 1, 2, 3], [4, 6, 7, 9], [1, 2, 8, 5]])
    for ranking, temperature in itertools.product(RANKINGS, (0.0, 0.6, 1.7)):
        logits = exclude_mask(raw_logits(1), 5)
        predictions = predict(
            logits, seeds=seeds, step=step, places=places, ranking=ranking, temperature=temperature
        )
        draws = slot_uniform(seeds, step, places, stream=1)
        orders = slot_uniform(seeds, step, places, stream=2)
        for row, slot in itertools.product(range(3), range(4)):
            token, confidence, score = slow_prediction(
                logits[row, slot].tolist(), float(draws[row, slot]), float(orders[row, slot]),
                ranking, temperature,
            )  # fmt: skip
            assert int(predictions.tokens[row, slot]) == token
            assert math.isclose(predictions.confidence[row, slot], confidence, rel_tol=1e-4)
            assert math.isclose(predictions.score[row, slot], score, rel_tol=1e-4, abs_tol=1e-6)


def test_predictions_choose_by_confidence_at_temperature_0_by_default() -> None:
    options = {
        "seeds": torch.arange(3),
        "step": torch.arange(3),
        "places": torch.zeros(3, 4).long(),
    }
    logits = exclude_mask(raw_logits(2), 5)
    predictions = predict(logits, **options)
    explicit = predict(logits, **options, ranking="confidence", temperature=0.0)
    assert all(map(torch.equal, predictions, explicit))


def test_the_mask_is_excluded_in_float32() -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        logits = raw_logits(3).to(dtype)
        excluded = exclude_mask(logits.clone(), 2)
        assert excluded.dtype == wide and bool((excluded[..., 2] == -torch.inf).all())
        others = [0, 1, 3, 4, 5]
        assert torch.equal(excluded[..., others], logits[..., others].to(wide))
        assert torch.equal(exclude_mask(logits.clone(), None), logits.to(wide))


def test_entropy_and_token_probability_are_their_sums() -> None:
    logits = exclude_mask(raw_logits(4), 1)
    log_total = logits.logsumexp(-1)
    tokens = torch.randint(0, 6, (3, 4), generator=generator(5))
    entropy, probability = entropy_of(logits, log_total), token_probability(logits, tokens)
    for row, slot in itertools.product(range(3), range(4)):
        p = softmax(logits[row, slot].tolist())
        expected = -sum(x * math.log(x) for x in p if x > 0)
        assert math.isclose(entropy[row, slot], expected, rel_tol=1e-4)
        assert math.isclose(
            probability[row, slot], p[int(tokens[row, slot])], rel_tol=1e-4, abs_tol=1e-9
        )


def test_sampling_inverts_the_cumulative_probability() -> None:
    logits = exclude_mask(raw_logits(6, (2, 5, 7)), 6)
    draws = torch.rand(2, 5, generator=generator(7), dtype=torch.float64)
    draws[0, 0], draws[1, 4] = 1 - 1e-17, 1e-12
    for temperature in (0.3, 1.0, 2.0):
        tokens = sample_categorical(logits, temperature, draws)
        for row, slot in itertools.product(range(2), range(5)):
            p, spent, token = softmax((logits[row, slot] / temperature).tolist()), 0.0, 0
            for token, share in enumerate(p):  # noqa: B007
                spent += share
                if spent > float(draws[row, slot]):
                    break
            if (row, slot) != (0, 0):  # the sum's own rounding decides
                assert int(tokens[row, slot]) == token
        assert int(tokens[0, 0]) in (5, 6)
    # A draw at the very end stays within the vocabulary.
    even = torch.zeros(1, 1, 4)
    assert int(sample_categorical(even, 1.0, torch.ones(1, 1, dtype=torch.float64))) == 3
    assert int(sample_categorical(even, 1.0, torch.full((1, 1), 0.5, dtype=torch.float64))) == 2


def test_sampling_never_draws_an_excluded_token() -> None:
    """Sums of float32 probabilities end a little below or above 1: draws follow the sum."""
    logits = exclude_mask(raw_logits(9, (8, 50, 7)), 6)
    draws = torch.full((8, 50), 1 - 1e-12, dtype=torch.float64)
    assert bool((sample_categorical(logits, 1.0, draws) < 6).all())


def test_guidance_moves_away_from_the_unconditional_logits() -> None:
    logits = raw_logits(8, (6, 3, 5))
    for scale in (0.0, 0.5, 2.0):
        guided = apply_cfg(logits, scale)
        assert guided.shape == (3, 3, 5)
        for row, slot, token in itertools.product(range(3), range(3), range(5)):
            c, u = float(logits[row, slot, token]), float(logits[row + 3, slot, token])
            assert math.isclose(
                guided[row, slot, token], u + (scale + 1) * (c - u), rel_tol=1e-4, abs_tol=1e-5
            )


def test_the_unconditional_twin_hides_text_audio_or_both() -> None:
    for hide in ("text", "audio", "both"):
        draft = torch.tensor([[2, 7, 7], [1, 7, 3], [7, 4, 7]])
        canvas, plain = toy_canvas(PROMPTS, 3, draft=draft), toy_canvas(PROMPTS, 3, draft=draft)
        scratch = canvas.add_scratch(2, branch=1)
        plain.add_scratch(2, branch=1)
        canvas.add_unconditional(hide)
        assert canvas.twins and len(canvas.tokens) == len(canvas.valid) == len(canvas.content) == 6
        for name in ("tokens", "positions", "branches"):
            assert torch.equal(getattr(canvas, name), getattr(plain, name).repeat(2, 1))
        for name in ("valid", "content"):
            assert torch.equal(getattr(canvas, name)[:3], getattr(plain, name))
        mask = torch.nn.functional.one_hot(torch.tensor(MASKED.mask), MASKED.size).float()
        for row, slot in itertools.product(range(3), range(plain.size)):
            is_prompt = slot < plain.start
            is_audio = bool(plain.tokens[row, slot] == NO_TOKEN and plain.valid[row, slot])
            is_text = is_prompt and bool(plain.tokens[row, slot] != NO_TOKEN)
            replaced = is_text and hide in ("text", "both")
            content = mask if replaced else plain.content[row, slot]
            assert torch.equal(canvas.content[row + 3, slot], content)
            valid = bool(plain.valid[row, slot]) and not (is_audio and hide in ("audio", "both"))
            assert bool(canvas.valid[row + 3, slot]) == valid
        # Showing all slots brings back neither padding nor the twin's audio, nor empty scratch.
        before = canvas.valid.clone()
        canvas.hide(torch.ones(3, canvas.size, dtype=torch.bool))
        canvas.show(torch.ones(3, canvas.size, dtype=torch.bool))
        assert torch.equal(canvas.valid, before) and not canvas.valid[:, scratch].any()
        with pytest.raises(ValueError):
            canvas.add_unconditional(hide)
    for prompts, hide, ragged in (
        ([[1, 2]], "text", False), ([[-1, 2]], "text", False), ([[1, 2]], "audio", False),
        ([[-1, 2]], "audio", True), ([[-1, 2]], "both", True), ([[1], [1, 2]], "audio", True),
    ):  # fmt: skip
        canvas = toy_canvas(prompts, 2)
        canvas.add_unconditional(hide)
        assert canvas.ragged == ragged and canvas.branches is None


# selection


def slow_select(
    rule: str, scores: list[float], masked: list[bool], places: list[int], moved: list[float],
    value: float, other: float,
) -> set[int]:  # fmt: skip
    """Return the accepted slots of one row."""
    order = sorted((i for i, m in enumerate(masked) if m), key=lambda i: (-scores[i], i))
    if not order:
        return set()
    best = {order[0]}
    if rule == "top_k":
        return set(order[: max(1, int(value))])
    if rule == "threshold":
        return {i for i in order if scores[i] >= min(value, scores[order[0]])}
    if rule == "factor":
        n = 1
        while n < len(order) and (n + 2) * (1 - scores[order[n]]) < value:
            n += 1
        return set(order[:n])
    if rule == "released factor":
        # Up to the rank before the first that fails, but all where only the last-ranked fails.
        fails = [k for k in range(1, len(order)) if not scores[order[k]] >= 1 - value / (k + 2)]
        first = fails[0] if fails else len(order)
        return set(order) if first == len(order) - 1 else set(order[:first])
    if rule == "entropy":
        taken, spent = set(), 0.0
        for i in order:  # scores are negative entropies
            if spent > value:
                break
            taken.add(i)
            spent -= scores[i]
        return taken
    if rule == "klass":
        return {i for i in order if scores[i] >= value and moved[i] < other} or best
    if rule == "leap":
        anchors = {i for i in order if scores[i] >= value}
        near = {i for i in order if any(abs(places[i] - places[a]) <= 4 for a in anchors)}
        return best | anchors | {i for i in near if scores[i] >= other}
    if rule == "runs":
        runs: list[list[int]] = []
        for i in (i for i, m in enumerate(masked) if m):
            follows = runs and masked[i - 1] and places[i] == places[i - 1] + 1
            runs = runs if follows else [*runs, []]
            runs[-1].append(i)
        tops = {max(run, key=lambda i: (scores[i], -i)) for run in runs}
        return best | {i for i in order if scores[i] >= value or (i in tops and scores[i] >= other)}
    assert rule == "capped"
    return best | {i for i in order[: max(1, int(other))] if scores[i] > value}


def fast_select(
    rule: str, scores: Tensor, masked: Tensor, places: Tensor, moved: Tensor, value: float,
    other: float,
) -> Tensor:  # fmt: skip
    counts = torch.full((len(scores),), int(value))
    most = torch.full((len(scores),), int(other))
    return {
        "top_k": lambda: selection.select_top_k(scores, masked, counts),
        "threshold": lambda: selection.select_threshold(scores, masked, value),
        "factor": lambda: selection.select_factor(scores, masked, value),
        "released factor": lambda: selection.select_factor(scores, masked, value, released=True),
        "entropy": lambda: selection.select_entropy_bound(-scores, masked, value),
        "klass": lambda: selection.select_klass(scores, masked, moved, value, other),
        "leap": lambda: selection.select_local_leap(scores, masked, places, value, other),
        "runs": lambda: selection.select_runs(scores, masked, places, value, other),
        "capped": lambda: selection.select_capped(scores, masked, value, most),
    }[rule]()


RULES: dict[str, list[tuple[float, float]]] = {
    "top_k": [(0, 0), (1, 0), (2, 0), (5, 0), (20, 0)],
    "threshold": [(0.0, 0), (0.5, 0), (0.75, 0), (1.0, 0)],
    "factor": [(0.0, 0), (0.25, 0), (0.5, 0), (0.75, 0), (1.0, 0), (1.5, 0), (3.0, 0), (9.0, 0)],
    "released factor": [(0.0, 0), (0.25, 0), (0.5, 0), (1.0, 0), (1.5, 0), (3.0, 0), (9.0, 0)],
    "entropy": [(0.0, 0), (0.25, 0), (0.5, 0), (1.0, 0), (2.5, 0), (9.0, 0)],
    "klass": [(0.5, 0.5), (0.75, 0.25), (0.25, 0.75), (0.0, 1.0), (1.0, 0.5)],
    "leap": [(0.25, 0.75), (0.875, 0.25), (0.75, 0.5), (0.5, 0.25), (1.0, 0.0)],
    "runs": [(0.875, 0.25), (0.75, 0.5), (1.0, 0.75), (0.5, 0.25)],
    "capped": [(0.5, 2), (0.25, 4), (0.75, 3), (0.0, 1), (0.5, 9)],
}


def cases(rule: str, seed: int, count: int = 40, width: int = 9) -> tuple[Tensor, ...]:
    """Scores in eighths: exact in binary, with many ties and values at the limits."""
    g = generator(seed)
    scores = torch.randint(0, 9, (count, width), generator=g) / 8
    if rule == "entropy":
        scores = -scores
    masked = torch.rand(count, width, generator=g) < torch.rand(count, 1, generator=g)
    masked[0], masked[1] = True, False
    places = torch.randint(1, 3, (count, width), generator=g).cumsum(1)
    return scores, masked, places, torch.randint(0, 9, (count, width), generator=g) / 8


def test_acceptance_rules_are_those_of_one_row_at_a_time() -> None:
    for rule, options in RULES.items():
        for seed, (value, other) in enumerate(options):
            scores, masked, places, moved = cases(rule, seed)
            accepted = fast_select(rule, scores, masked, places, moved, value, other)
            for row in range(len(scores)):
                expected = slow_select(
                    rule, scores[row].tolist(), masked[row].tolist(), places[row].tolist(),
                    moved[row].tolist(), value, other,
                )  # fmt: skip
                assert set(accepted[row].nonzero()[:, 0].tolist()) == expected, (rule, value, row)


def test_a_threshold_accepts_no_score_that_is_no_number() -> None:
    nan = float("nan")
    scores = torch.tensor([[nan, 0.5, 0.3], [nan, 0.95, 0.99], [nan, nan, 0.2]])
    masked = torch.tensor([[True, True, True], [True, True, True], [True, False, False]])
    accepted = selection.select_threshold(scores, masked, 0.9)
    expected = [[False, True, False], [False, True, True], [True, False, False]]
    assert accepted.tolist() == expected  # a row of nothing else ends nevertheless


def test_the_rules_of_the_papers_are_the_defaults() -> None:
    """The factor rule is the paper's; LocalLeap reaches four places."""
    scores = torch.tensor([[0.9, 0.1]])
    both = torch.tensor([[True, True]])
    assert selection.select_factor(scores, both, 1.0).tolist() == [[True, False]]
    assert selection.select_factor(scores, both, 1.0, released=True).tolist() == [[True, True]]
    for gap, reached in ((4, True), (5, False)):
        places = torch.tensor([[0, gap]])
        found = selection.select_local_leap(
            torch.tensor([[0.95, 0.5]]), both, places, threshold=0.9, neighbor_threshold=0.4
        )
        assert found.tolist() == [[True, reached]]


def test_predictions_and_selection_together_accept_what_the_logits_say() -> None:
    """From raw logits to accepted slots, for every ranking: guards both against the same error."""
    seeds, step = torch.arange(3), torch.zeros(3).long()
    places = torch.arange(6).expand(3, 6)
    masked = torch.rand(3, 6, generator=generator(11)) < 0.8
    for ranking, temperature, seed in itertools.product(RANKINGS, (0.0, 0.9), range(4)):
        logits = exclude_mask(raw_logits(20 + seed, (3, 6, 7)), 6)
        options = {"seeds": seeds, "step": step, "places": places}
        predictions = predict(logits, **options, ranking=ranking, temperature=temperature)
        draws = slot_uniform(seeds, step, places, stream=1)
        orders = slot_uniform(seeds, step, places, stream=2)
        for rule, value in (("top_k", 2.0), ("threshold", 0.6), ("factor", 1.0)):
            if ranking == "entropy" and rule != "top_k":
                continue
            accepted = fast_select(rule, predictions.score, masked, places, masked, value, 0)
            for row in range(3):
                scores = [
                    slow_prediction(
                        logits[row, slot].tolist(), float(draws[row, slot]),
                        float(orders[row, slot]), ranking, temperature,
                    )[2]
                    for slot in range(6)
                ]  # fmt: skip
                expected = slow_select(rule, scores, masked[row].tolist(), [], [], value, 0)
                assert set(accepted[row].nonzero()[:, 0].tolist()) == expected


# schedule and blocks


def slow_schedule(steps: int | None, length: int, width: int) -> list[int]:
    total = length if steps is None else min(steps, length)
    blocks, used = [], 0
    for end in [*range(width, length, width), length]:
        share = end * total // length
        blocks.append(max(1, share - used))
        used = share
    return blocks


def test_steps_are_divided_among_blocks_by_length() -> None:
    for length, width, steps in itertools.product(range(1, 14), (1, 3, 4, 20), (None, 1, 2, 5, 30)):
        assert steps_per_block(steps, length, width) == slow_schedule(steps, length, width)


def test_a_block_accepts_its_masks_evenly_the_remainder_first() -> None:
    state = entered_state(toy_canvas([[1]], 4), 4)
    for steps, masks in itertools.product((None, 1, 2, 3, 7, 10), range(1, 5)):
        schedule = slow_schedule(steps, 10, 4)
        for block, step in itertools.product((-1, 0, 1, 2), range(5)):
            count = num_transfer_tokens(
                state._replace(
                    block=torch.tensor([block]), block_step=torch.tensor([step]),
                    initial_masks=torch.tensor([masks]), answer_length=10,
                ),
                steps, 4,
            )  # fmt: skip
            n = schedule[max(block, 0)]
            due = 1 if steps is None else masks // n + (step < masks % n)
            assert count.tolist() == [due]


def entered_state(canvas: Canvas, width: int) -> BlockState:
    state = BlockTracker(canvas, width).current()
    assert state is not None
    return state


def drafted_canvas(seed: int, length: int = 9, eos: bool = False) -> Canvas:
    """A canvas of three rows, some tokens given; one row is complete from the start."""
    g = generator(seed)
    draft = torch.full((3, length), MASKED.mask or 0)
    tokens = torch.randint(0, 6 if eos else 5, (3, length), generator=g)
    given = torch.rand(3, length, generator=g) < 0.3
    given[seed % 3] |= seed % 4 == 0
    return toy_canvas(PROMPTS, length, draft=torch.where(given, tokens, draft))


def decide(canvas: Canvas, state: BlockState, g: torch.Generator) -> None:
    """Write a random part of the block's masks, at least one."""
    pick = torch.rand(state.masked_slots.shape, generator=g) < 0.5
    pick[:, 0] = True
    slots = torch.where(pick & state.masked, state.masked_slots, -1)
    canvas.write(slots, torch.zeros_like(slots), torch.full(slots.shape, 0.5))


def test_rows_follow_their_blocks_at_their_own_pace() -> None:
    for seed, width in itertools.product(range(8), (1, 2, 4, 9, 12)):
        canvas, g = drafted_canvas(seed), generator(seed)
        tracker = BlockTracker(canvas, width)
        steps, last = 0, [-1] * 3
        entry, initial = [0] * 3, [0] * 3
        while (state := tracker.current()) is not None:
            masks = [
                [p for p in range(9) if canvas.answer[row, p] == MASKED.mask] for row in range(3)
            ]
            widest = 0
            for row in range(3):
                active = bool(masks[row])
                assert bool(state.active[row]) == active
                block = masks[row][0] // width if active else last[row]
                own = [p for p in masks[row] if p // width == block]
                widest = max(widest, len(own))
                entered = active and block != last[row]
                if entered:
                    entry[row], initial[row] = steps, len(own)
                last[row] = block
                first = canvas.start + max(block, 0) * width
                assert int(state.block[row]) == block
                assert int(state.start[row]) == first
                assert int(state.end[row]) == min(first + width, canvas.start + 9)
                assert bool(state.entered[row]) == entered
                assert int(state.step[row]) == steps
                assert int(state.block_step[row]) == steps - entry[row]
                assert int(state.initial_masks[row]) == initial[row]
                slots = state.masked_slots[row].tolist()
                assert slots == [canvas.start + p for p in own] + [-1] * (len(slots) - len(own))
                places = state.places[row][state.masked[row]].tolist()
                assert places == own
                all_slots, exists = block_slots(canvas, state, min(width, 9))
                expected = list(range(first, min(first + width, canvas.start + 9)))
                assert all_slots[row][exists[row]].tolist() == (expected if active else [])
                assert int(all_slots.max()) < canvas.start + 9
            assert state.masked_slots.shape[1] == widest and state.answer_length == 9
            decide(canvas, state, g)
            steps += 1
            tracker.advance()
        assert not bool((canvas.answer == MASKED.mask).any())


def test_padding_is_dropped_and_moved_to_the_right() -> None:
    slots = torch.tensor([[-1, 4, -1, 6], [2, -1, -1, -1], [-1, -1, -1, -1]])
    assert drop_padding(slots).tolist() == [[4, 6], [2, -1], [-1, -1]]
    assert drop_padding(torch.tensor([[3, 1, 2]])).tolist() == [[3, 1, 2]]
    assert drop_padding(torch.tensor([[-1, 0, 4], [0, -1, -1]])).tolist() == [[0, 4], [0, -1]]


def test_an_eos_fills_the_rest_once_no_mask_is_left_before_it() -> None:
    eos, filled = MASKED.eos, 0
    for seed in range(60):
        canvas, g = drafted_canvas(seed, eos=True), generator(seed)
        draft = ~canvas.undecided()
        written = torch.rand(3, 9, generator=g) < 0.6
        written[:, :3] = True
        tokens = torch.randint(3, 6, (3, 9), generator=g)
        slots = torch.where(written & ~draft, torch.arange(9) + canvas.start, -1)
        canvas.write(slots, tokens, torch.full((3, 9), 0.5))
        before = canvas.answer.clone()
        fill_after_eos(canvas, draft)
        for row in range(3):
            tokens_before = before[row].tolist()
            first = tokens_before.index(eos) if eos in tokens_before else 9
            settled = MASKED.mask not in tokens_before[:first]
            expected = [
                eos if settled and p > first and not bool(draft[row, p]) else tokens_before[p]
                for p in range(9)
            ]
            filled += expected != tokens_before
            assert canvas.answer[row].tolist() == expected
            for p in range(9):
                if expected[p] != tokens_before[p]:
                    assert float(canvas.confidence[row, p]) == 1.0
                else:
                    assert float(canvas.confidence[row, p]) in (0.0, 0.5)
    assert filled > 10


def test_steps_mark_as_final_what_cannot_change() -> None:
    for seed, width in itertools.product(range(10), (2, 4)):
        canvas = drafted_canvas(seed)
        draft = ~canvas.undecided()
        decide(canvas, state, generator(seed)) if (
            state := BlockTracker(canvas, width).current()
        ) else None
        plain = make_step(canvas).final
        with_draft = make_step(canvas, draft=draft).final
        revisable = make_step(canvas, revisable_block_length=width).final
        for row in range(3):
            masked = [bool(m) for m in canvas.answer[row] == MASKED.mask]
            first = masked.index(True) if any(masked) else 9
            complete = 9 if not any(masked) else first // width * width
            for p in range(9):
                assert bool(plain[row, p]) == (not masked[p])
                assert bool(with_draft[row, p]) == (bool(draft[row, p]) or p < first)
                assert bool(revisable[row, p]) == (p < complete)
        step = make_step(canvas)
        assert torch.equal(step.tokens, canvas.answer)
        assert torch.equal(step.confidence, canvas.confidence)
        canvas.fill(torch.ones(3, 9, dtype=torch.bool), 0)
        assert not torch.equal(step.tokens, canvas.answer)  # a copy


# caches


class Keys:
    """A KV cache whose keys have moved by a known distance per slot."""

    def __init__(self, distance: Tensor) -> None:
        self.distance, self.probe, self.calls = distance, 0, 0

    def drift(self, slots: Tensor) -> Tensor:
        self.calls += 1
        return self.distance.gather(1, slots)


def as_sets(recompute: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in recompute]


def valid_sets(canvas: Canvas, state: BlockState) -> list[set[int]]:
    valid = canvas.valid[: canvas.count] & state.active[:, None]
    return as_sets(valid)


def test_block_caches_recompute_the_block_and_its_vicinity() -> None:
    for seed, cache, vicinity in itertools.product(range(6), ("prefix", "dual"), (0, 1, 3)):
        canvas, g = drafted_canvas(seed), generator(seed)
        tracker, policy = BlockTracker(canvas, 4), BlockCache(cache, vicinity)
        while (state := tracker.current()) is not None:
            everything = canvas.valid[:3] & state.active[:, None]
            found = as_sets(policy(everything, canvas, state))
            for row in range(3):
                expected = as_sets(everything)[row]
                if not bool(state.entered[row]):
                    position = canvas.positions[row]
                    first = int(position[int(state.start[row])]) - vicinity
                    last = int(position[int(state.end[row]) - 1]) + vicinity
                    expected = {
                        s for s in expected
                        if int(position[s]) >= first
                        and (cache == "prefix" or int(position[s]) <= last)
                    }  # fmt: skip
                assert found[row] == expected
            decide(canvas, state, g)
            tracker.advance()


def test_a_suffix_window_shows_the_block_the_next_slots_and_the_last() -> None:
    for seed, count, twins in itertools.product(range(6), (0, 1, 3), (False, True)):
        canvas, g = drafted_canvas(seed), generator(seed)
        if twins:
            canvas.add_unconditional("audio")
        initial = canvas.valid.clone()
        tracker, policy = BlockTracker(canvas, 2), SuffixWindow(count)
        narrow = BlockCache("dual", 0)
        while (state := tracker.current()) is not None:
            before = canvas.valid.clone()
            chosen = narrow(canvas.valid[:3] & state.active[:, None], canvas, state)
            found = as_sets(policy(chosen, canvas, state))
            for row in range(3):
                for twin in (row, row + 3) if twins else (row,):
                    for slot in range(canvas.size):
                        near = slot < int(state.end[row]) + count or slot == canvas.size - 1
                        if not bool(state.active[row]):
                            near = bool(before[row, slot])
                        expected = bool(initial[twin, slot]) and near
                        assert bool(canvas.valid[twin, slot]) == expected
                visible = as_sets(canvas.valid)[row]
                shown = visible - as_sets(before)[row]
                assert found[row] == (as_sets(chosen)[row] | shown) & visible
            decide(canvas, state, g)
            tracker.advance()


def test_audio_is_recomputed_at_most_every_interval() -> None:
    for seed, interval in itertools.product(range(6), (1, 2, 3)):
        canvas, g = drafted_canvas(seed), generator(seed)
        tracker, policy = BlockTracker(canvas, 3), AudioRefresh(interval, canvas)
        narrow, last, step = BlockCache("prefix", 0), [-interval] * 3, 0
        audio = as_sets((canvas.tokens == NO_TOKEN) & canvas.valid)
        while (state := tracker.current()) is not None:
            chosen = canvas.valid[:3] & state.active[:, None]
            chosen = narrow(chosen, canvas, state) if seed % 2 else chosen
            found = as_sets(policy(chosen, canvas, state))
            for row in range(3):
                wanted = as_sets(chosen)[row]
                due = step - last[row] >= interval
                assert found[row] == (wanted if due else wanted - audio[row])
                if due and wanted & audio[row]:
                    last[row] = step
            decide(canvas, state, g)
            tracker.advance()
            step += 1


def test_drift_refreshes_the_prompt_where_its_keys_have_moved() -> None:
    refreshed = 0
    for seed, probes, width in itertools.product(range(12), (1, 16), (2, 4)):
        canvas, g = drafted_canvas(seed), generator(seed)
        keys = Keys(torch.rand(3, canvas.size, generator=g))
        threshold = 0.5 if seed else float(keys.distance[1, 0])
        policy = DriftRefresh(threshold, canvas, keys, probes)  # type: ignore[arg-type]
        assert keys.probe == -1
        tracker, narrow, probed = BlockTracker(canvas, width), BlockCache("dual", 0), [False] * 3
        called = 0
        while (state := tracker.current()) is not None:
            chosen = narrow(canvas.valid[:3] & state.active[:, None], canvas, state)
            found = as_sets(policy(chosen, canvas, state))
            assert keys.calls == called + any(probed)
            called = keys.calls
            for row, prompt in enumerate(PROMPTS):
                own, expected = set(range(len(prompt))), as_sets(chosen)[row]
                at = [int((i + 0.5) / probes * len(prompt)) for i in range(probes)]
                if probed[row] and bool(state.active[row]):
                    moved = sum(float(keys.distance[row, p]) for p in at) / probes > threshold
                    expected = expected | own if moved else expected
                    refreshed += moved
                probed[row] = bool(state.entered[row]) and int(state.step[row]) > 0
                if probed[row]:
                    expected = {s for s in expected if s not in own or s in at}
                assert found[row] == expected
            decide(canvas, state, g)
            tracker.advance()
    assert refreshed > 10
    defaults = DriftRefresh(0.1, toy_canvas(PROMPTS, 2), Keys(torch.zeros(3, 9)))  # type: ignore[arg-type]
    assert defaults._probes.shape == (3, 16)


def test_drift_leaves_canvases_without_prompts_alone() -> None:
    canvas = toy_canvas([[], []], 4)
    policy = DriftRefresh(0.1, canvas, Keys(torch.ones(2, 4)))  # type: ignore[arg-type]
    tracker = BlockTracker(canvas, 2)
    for _ in range(4):
        state = tracker.current()
        assert state is not None
        chosen = canvas.valid & state.active[:, None]
        assert torch.equal(policy(chosen, canvas, state), chosen)
        canvas.write(state.masked_slots[:, :1], torch.zeros(2, 1).long(), torch.ones(2, 1))
        tracker.advance()


def test_a_pass_recomputes_the_slots_that_its_policies_leave() -> None:
    partial = 0
    for seed, kind in itertools.product(range(8), ("none", "dual", "suffix", "both", "nothing")):
        canvas, g = drafted_canvas(seed), generator(seed)
        policies = {
            "none": [],
            "dual": [BlockCache("dual", 1)],
            "suffix": [SuffixWindow(1)],
            "both": [BlockCache("prefix", 0), SuffixWindow(1)],
            "nothing": [lambda chosen, canvas, state: chosen],
        }[kind]
        tracker, recompute = BlockTracker(canvas, 3), RecomputeSlots(policies)
        again = RecomputeSlots(policies)
        while (state := tracker.current()) is not None:
            shadow = drafted_canvas(seed)
            shadow.tokens, shadow.valid = canvas.tokens.clone(), canvas.valid.clone()
            slots, write = recompute(canvas, state)
            chosen = shadow.valid[:3] & state.active[:, None]
            for policy in again.policies:
                chosen = policy(chosen, shadow, state)
            everything = shadow.valid[:3] & state.active[:, None]
            answers = bool(shadow.valid[:3, shadow.start :].all())
            if answers and torch.equal(chosen, everything):
                assert slots is None and write == bool(policies)
            else:
                partial += 1
                assert slots is not None and write is True
                for row in range(3):
                    expected = sorted(as_sets(chosen)[row])
                    longest = max(len(own) for own in as_sets(chosen))
                    padded = expected + [-1] * (longest - len(expected))
                    assert slots[row].tolist() == padded
            decide(canvas, state, g)
            tracker.advance()
    assert partial > 20
