"""The mathematics of the objectives against slow references: one row, one token at a time.

benchmarks/mutants.py calls these functions without pytest, so they take no arguments.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from diffa.objectives.cart import cart_weights
from diffa.objectives.likelihood import TokenLosses
from diffa.objectives.masked import Masked
from diffa.objectives.masking import (
    answer_blocks,
    mask_bernoulli,
    mask_complementary,
    mask_count,
    rank_in_block,
)
from diffa.objectives.measure import reduce_losses
from diffa.objectives.rng import row_uniform
from diffa.objectives.schedules import floor_level, noise_schedule
from diffa.objectives.time_sampling import sample_times
from diffa.types import Noised, Vocab

VOCAB = Vocab(size=11, eos=8, pad=9, mask=10)
GOLDEN_RATIO = 0.6180339887498949


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int, rows: int = 6, width: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, scattered answers (one row has none), and seeds."""
    g = generator(seed)
    tokens = torch.randint(0, 10, (rows, width), generator=g)
    answer = torch.rand(rows, width, generator=g) < 0.7
    answer[seed % rows] = False
    answer[(seed + 1) % rows] = True
    return tokens, answer, torch.randint(0, 2**60, (rows,), generator=g)


def slow_blocks(answer: list[bool], block_length: int | None) -> list[list[int]]:
    """The columns of each block of a row."""
    columns = [c for c, is_answer in enumerate(answer) if is_answer]
    width = block_length or max(len(columns), 1)
    return [columns[i : i + width] for i in range(0, len(columns), width)]


# schedules


def slow_level(name: str, t: float, power: float) -> float:
    if name == "linear":
        return t
    if name == "cosine":
        return 1 - (1 - math.cos(math.pi / 2 * (1 - t)))
    if name == "polynomial":
        return t**power
    low, high = 1e-5, 20.0
    alpha = math.exp(-(low ** (1 - t)) * high**t)
    first, last = math.exp(-low), math.exp(-high)
    return 1 - (alpha - last) / (first - last)


def test_schedules_are_their_formulas_and_slopes_their_derivatives() -> None:
    for name, power in (("linear", 2.0), ("cosine", 2.0), ("geometric", 2.0),
                        ("polynomial", 2.0), ("polynomial", 0.5), ("polynomial", 3.0)):  # fmt: skip
        schedule, h = noise_schedule(name, power), 1e-6
        for at in (0.05, 0.2, 0.5, 0.77, 0.95):
            t = torch.tensor(at, dtype=torch.float64)
            level = slow_level(name, at, power)
            assert math.isclose(schedule.level(t), level, rel_tol=1e-9, abs_tol=1e-12), name
            slope = (slow_level(name, at + h, power) - slow_level(name, at - h, power)) / (2 * h)
            assert math.isclose(schedule.slope(t), slope, rel_tol=1e-4, abs_tol=1e-6), name
    t = torch.tensor([0.3, 0.6])
    level = noise_schedule("linear").level(t)
    assert torch.equal(level, t) and level is not t  # callers may change it in place
    assert torch.equal(noise_schedule("polynomial").level(t), t**2)


def test_the_noise_floor_is_lladas() -> None:
    for level, eps in itertools.product((0.0, 0.25, 0.9, 1.0), (0.0, 1e-3, 0.25)):
        found = floor_level(torch.tensor(level, dtype=torch.float64), eps)
        assert math.isclose(found, (1 - eps) * level + eps, abs_tol=1e-12)


# masking


def test_answers_are_divided_into_blocks() -> None:
    for seed, width in itertools.product(range(4), (None, 1, 2, 4, 20)):
        _, answer, _ = batch(seed)
        blocks = answer_blocks(answer, width)
        for row in range(len(answer)):
            own = slow_blocks(answer[row].tolist(), width)
            for number, columns in enumerate(own):
                for column in columns:
                    assert int(blocks.number[row, column]) == number
                    assert int(blocks.size[row, column]) == len(columns)
                    assert int(blocks.first[row, column]) == sum(map(len, own[:number]))


def test_masks_and_weights_are_those_of_one_block_at_a_time() -> None:
    for seed, width in itertools.product(range(6), (None, 1, 2, 4)):
        _, answer, _ = batch(seed)
        g = generator(100 + seed)
        draws = torch.randint(0, 64, answer.shape, generator=g) / 64
        blocks = answer_blocks(answer, width)
        # One level per block, at sixteenths: count and complement meet their limits exactly.
        by_block = torch.randint(1, 16, (len(answer), 10), generator=g) / 16
        level = by_block.gather(1, blocks.number)
        ranks = rank_in_block(draws, answer, blocks)
        free, free_weight = mask_bernoulli(level, draws, answer)
        counted, weight = mask_count(level, draws, answer, blocks)
        first, one, other = mask_complementary(level, draws, answer, blocks)
        for row in range(len(answer)):
            for number, columns in enumerate(slow_blocks(answer[row].tolist(), width)):
                share, size = float(by_block[row, number]), len(columns)
                order = sorted(columns, key=lambda c: (float(draws[row, c]), c))
                count = max(1, math.ceil(share * size))
                half = min(math.floor(share * (size + 1)), size)
                for column in columns:
                    place = row, column
                    assert int(ranks[place]) == order.index(column)
                    assert bool(free[place]) == (float(draws[place]) < share)
                    assert math.isclose(free_weight[place], 1 / share, rel_tol=1e-6)
                    assert bool(counted[place]) == (column in order[:count])
                    assert math.isclose(weight[place], size / count, rel_tol=1e-6)
                    assert bool(first[place]) == (column in order[:half])
                    assert math.isclose(one[place], (size + 1) / max(half, 1), rel_tol=1e-6)
                    rest = max(size - half, 1)
                    assert math.isclose(other[place], (size + 1) / rest, rel_tol=1e-6)
            outside = ~answer[row]
            assert not bool((free[row] | counted[row] | first[row])[outside].any())
    # At the ends of the level: at least one token is counted, and the complement may be empty.
    answer, draws = torch.ones(1, 4).bool(), torch.rand(1, 4, generator=generator(1))
    blocks = answer_blocks(answer, None)
    for share, count, half in ((0.0, 1, 0), (1e-9, 1, 0), (1.0, 4, 4)):
        level = torch.tensor([[share]])
        assert int(mask_count(level, draws, answer, blocks)[0].sum()) == count
        assert int(mask_complementary(level, draws, answer, blocks)[0].sum()) == half


# times


def test_times_are_their_schemes() -> None:
    seeds = torch.tensor([[0], [1], [2], [3], [2**40 + 6], [2**40 + 7]])
    block = torch.tensor([[0, 1, 2, 5]]).expand(6, -1)
    for own in (None, block):
        independent = sample_times("independent", seeds, own)
        antithetic = sample_times("antithetic", seeds, own)
        counter = torch.full_like(seeds, -1) if own is None else -16 - block
        assert torch.equal(independent, row_uniform(seeds, counter))
        for row in range(0, 6, 2):
            assert torch.equal(
                antithetic[row], row_uniform(seeds[row : row + 1] // 2, counter[:1])[0]
            )
            assert torch.equal(antithetic[row] + antithetic[row + 1], torch.ones(counter.shape[1]))
    spread = sample_times("low_discrepancy", seeds[:4])
    for row in range(4):
        expected = (0.5 + row * GOLDEN_RATIO) % 1
        assert math.isclose(spread[row, 0], expected, abs_tol=2.0**-24 + 1e-12)
        # 23 bits and a half, so that no time is 0 or 1
        assert float(spread[row, 0] * 2**23) % 1 == 0.5
    blocks = sample_times("low_discrepancy", seeds, block)
    base = sample_times("low_discrepancy", seeds)
    for row, (column, number) in itertools.product(range(6), enumerate((0, 1, 2, 5))):
        expected = (float(base[row, 0]) + number * 0.7548776662466927) % 1
        assert math.isclose(blocks[row, column], expected, abs_tol=1e-6)
    assert bool((blocks > 0).all()) and blocks.dtype == spread.dtype == torch.float32


def test_a_low_discrepancy_time_is_never_zero() -> None:
    """A fraction near 0 becomes the smallest time: weights are one over it."""
    seeds = torch.tensor([[0], [5]])
    base = sample_times("low_discrepancy", seeds).double()
    near_zero = (1 + 1e-9 - base) / 0.7548776662466927
    times = sample_times("low_discrepancy", seeds, near_zero)
    assert times.tolist() == [[2.0**-24], [2.0**-24]]


# weights


def test_cart_weights_are_sums_over_visible_tokens() -> None:
    for seed, p in itertools.product(range(5), (0.1, 0.3, 0.8)):
        _, answer, _ = batch(seed)
        masked = answer & (torch.rand(answer.shape, generator=generator(seed)) < 0.5)
        weights = cart_weights(masked, answer, p)
        for row in range(len(answer)):
            columns = slow_blocks(answer[row].tolist(), None)
            columns = columns[0] if columns else []
            for n, column in enumerate(columns):
                total = (1 - p) ** n  # the prompt: visible tokens at all distances from n + 1 on
                for i, other in enumerate(columns):
                    if i != n and not bool(masked[row, other]):
                        total += p * (1 - p) ** (abs(n - i) - 1)
                assert math.isclose(weights[row, column], total / 2, rel_tol=1e-4)
    none = torch.zeros(2, 3).bool()
    assert cart_weights(none, none, 0.3).shape == (2, 3)


def slow_corruption(
    options: dict[str, Any], tokens: list[int], answer: list[bool], seed: int, *, second: bool
) -> tuple[list[bool], list[float]]:
    """Masks and weights of one row by LLaDA's definition, options included."""
    width, masking = options.get("block_length"), options.get("masking", "bernoulli")
    schedule = noise_schedule(options.get("schedule", "linear"))
    scheme, complement = (
        options.get("time_sampling", "independent"),
        options.get("complementary_masking", False),
    )
    row_seed = torch.tensor([[seed]])
    masked, weights = [False] * len(tokens), [0.0] * len(tokens)
    columns = [c for c, a in enumerate(answer) if a]
    full = float(row_uniform(row_seed, torch.tensor([[-2]]))) < options.get("full_mask_prob", 0.0)
    draw = {c: float(row_uniform(row_seed, torch.tensor([[n + 1]]))) for n, c in enumerate(columns)}
    for number, own in enumerate(slow_blocks(answer, width)):
        block = None if width is None else torch.tensor([[number]])
        t = sample_times(scheme, row_seed, block)
        level, slope = float(schedule.level(t)), float(schedule.slope(t))
        order, size = sorted(own, key=lambda c: draw[c]), len(own)
        if complement:
            count = min(math.floor(level * (size + 1)), size)
            first = order[:count]
            hidden = [c for c in own if c not in first] if second else first
            weight = slope * (size + 1) / max(len(hidden), 1)
        elif masking == "count":
            count = max(1, math.ceil(level * size))
            hidden, weight = order[:count], slope * size / count
        else:
            eps = options.get("eps", 1e-3)
            level = (1 - eps) * level + eps
            hidden, weight = [c for c in own if draw[c] < level], slope / level
        if full:
            hidden, weight = ([] if second else own), (2.0 if complement else 1.0)
        for c in hidden:
            masked[c], weights[c] = True, weight
    if options.get("cart_p"):
        by_place = cart_weights(torch.tensor([masked]), torch.tensor([answer]), options["cart_p"])[
            0
        ].tolist()
        weights = [w if m else 0.0 for w, m in zip(by_place, masked, strict=True)]
    elif options.get("normalization") in ("masked", "row"):
        weights = [float(m) for m in masked]
    heavy = options.get("eos_weight", 1.0)
    weights = [w * heavy if x == VOCAB.eos else w for w, x in zip(weights, tokens, strict=True)]
    return masked, weights


OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 0.5},
    {"eps": 0.0, "schedule": "cosine"},
    {"masking": "count"},
    {"masking": "count", "block_length": 2, "time_sampling": "low_discrepancy"},
    {"block_length": 3, "time_sampling": "antithetic", "schedule": "polynomial"},
    {"masking": "count", "complementary_masking": True, "schedule": "polynomial"},
    {"masking": "count", "complementary_masking": True, "block_length": 2, "full_mask_prob": 0.5},
    {"full_mask_prob": 0.5, "eos_weight": 0.25},
    {"full_mask_prob": 1.0, "masking": "count", "normalization": "sample"},
    {"cart_p": 0.3, "eos_weight": 2.0},
    {"normalization": "masked", "masking": "count"},
    {"normalization": "row", "cart_p": 0.2},
    {"normalization": "row", "eos_weight": 0.1},
    # Exactly the number that the last row draws: it is not below itself.
    {"full_mask_prob": float(row_uniform(batch(0)[2], torch.full((6,), -2))[5])},
]


def test_corruption_is_that_of_one_row_at_a_time() -> None:
    for options, seed in itertools.product(OPTIONS, range(3)):
        tokens, answer, seeds = batch(seed)
        objective = Masked(VOCAB, **options)
        noised = objective.corrupt(tokens, answer, seeds)
        other = objective.second(tokens, noised, seeds)
        assert (other is not None) == bool(options.get("complementary_masking"))
        for copy, is_second in ((noised, False), (other, True)):
            if copy is None:
                continue
            assert torch.equal(copy.answer, answer)
            for row in range(len(tokens)):
                masked, weights = slow_corruption(
                    options, tokens[row].tolist(), answer[row].tolist(), int(seeds[row]),
                    second=is_second,
                )  # fmt: skip
                assert copy.masked[row].tolist() == masked, options
                torch.testing.assert_close(
                    copy.weights[row], torch.tensor(weights), rtol=1e-4, atol=1e-5
                )
                expected = [
                    VOCAB.mask if m else x
                    for m, x in zip(masked, tokens[row].tolist(), strict=True)
                ]
                assert copy.tokens[row].tolist() == expected


# losses


def test_losses_are_reduced_row_by_row() -> None:
    for seed, normalization in itertools.product(range(5), ("batch", "sample", "masked", "row")):
        _, answer, _ = batch(seed)
        g = generator(50 + seed)
        masked = answer & (torch.rand(answer.shape, generator=g) < 0.5)
        masked[(seed + 2) % 6] = False
        answer[(seed + 3) % 6] = torch.arange(9) == 4  # one token alone
        masked[(seed + 3) % 6] = answer[(seed + 3) % 6]
        weights = torch.rand(answer.shape, generator=g) * masked
        noised = Noised(torch.zeros_like(answer).long(), masked, weights, answer)
        count = int(masked.sum())
        nll = 3 * torch.rand(count, generator=g)
        correct = torch.rand(count, generator=g) < 0.4
        found = reduce_losses(TokenLosses(nll, correct), noised, normalization)
        total, divisor, place = 0.0, 0, 0
        for row in range(len(answer)):
            own = masked[row].nonzero()[:, 0].tolist()
            losses = [float(nll[place + i]) for i in range(len(own))]
            place += len(own)
            size = int(answer[row].sum())
            shares = [float(weights[row, c]) for c in own]
            if normalization == "sample":
                shares = [w / max(size, 1) for w in shares]
                divisor += size > 0
            if normalization == "row":
                shares = [w / sum(shares) for w in shares]
                divisor += bool(own)
            if normalization == "batch":
                divisor += size
            if normalization == "masked":
                divisor += len(own)
            total += sum(w * x for w, x in zip(shares, losses, strict=True))
        assert math.isclose(found.sum, total, rel_tol=1e-4, abs_tol=1e-6)
        assert float(found.weight) == divisor and found.weight.dtype == found.sum.dtype
        assert int(found.correct) == int(correct.sum()) and int(found.masked) == count


@torch.no_grad()
def test_certainty_adds_the_entropy_of_correct_tokens() -> None:
    tokens, answer, seeds = batch(3)
    hidden = 2 * torch.randn(*tokens.shape, VOCAB.size, generator=generator(4))
    head = torch.nn.Identity()
    for weight, temperature in ((0.0, 0.5), (1.0, 0.5), (2.5, 1.0)):
        objective = Masked(
            VOCAB, certainty_weight=weight, certainty_temperature=temperature, chunk_size=2
        )
        noised = objective.corrupt(tokens, answer, seeds)
        measured = objective.measure(hidden, head, tokens, noised)
        total, entropies, correct = 0.0, 0.0, 0
        for row, column in noised.masked.nonzero().tolist():
            logits, token = hidden[row, column], int(tokens[row, column])
            total -= float(noised.weights[row, column] * logits.log_softmax(0)[token])
            if int(logits.argmax()) == token:
                p = (logits / temperature).softmax(0)
                entropies -= float((p * p.log()).sum())
                correct += 1
        assert correct and int(measured.correct) == correct
        assert math.isclose(measured.sum, total + weight * entropies, rel_tol=1e-4)
        assert int(measured.weight) == int(answer.sum())
        pair = objective.loss(hidden, head, tokens, noised)
        assert torch.equal(torch.stack(pair), torch.stack([measured.sum, measured.weight]))
