"""Properties of unmasking: how many, which, where and when; over a toy and over a real LLaDA."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffa.backbones.llada import LLaDA
from diffa.canvas.canvas import Canvas, insert_audio
from diffa.canvas.denoiser import Denoiser
from diffa.samplers import selection
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.rng import sample_categorical, slot_uniform
from diffa.testing import Chaos, ToyDenoise, toy_canvas
from diffa.testing.parts import noise
from diffa.testing.toy import MASKED as VOCAB
from diffa.types import Step

# The same examples in every run, and no deadline: the machines are noisy. No shrinking either.
few = settings(
    max_examples=30, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
some = settings(few, max_examples=60)
many = settings(few, max_examples=150)

RULES: list[dict[str, Any]] = [
    {},
    {"steps": 3},
    {"threshold": 0.5},
    {"factor": 1.0},
    {"entropy_bound": 1.0},
]
caches = st.sampled_from(["none", "prefix", "dual"])


class Case(NamedTuple):
    """A canvas to be and the sampler to fill it with."""

    prompts: list[list[int]]
    draft: Tensor
    seeds: list[int]
    options: dict[str, Any]

    def decode(self, rows: slice = slice(None), end: bool = True) -> tuple[Canvas, list[Step]]:
        canvas = toy_canvas(
            self.prompts[rows],
            self.draft.shape[1],
            seeds=self.seeds[rows],
            draft=self.draft[rows],
        )
        denoise = ToyDenoise(canvas, Chaos(end=end), most=100)
        return canvas, list(Blockwise(VOCAB, **self.options)(canvas, denoise))


@st.composite
def cases(draw: Any, drafted: bool = True) -> Case:
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 13))
    words = st.lists(st.integers(-1, 4), min_size=1, max_size=6)
    prompts = [draw(words) for _ in range(rows)]
    draft = torch.full((rows, length), VOCAB.mask or 0)
    if drafted:
        given_ = st.lists(st.integers(0, 30), min_size=rows * length, max_size=rows * length)
        tokens = torch.tensor(draw(given_)).view(rows, length)
        draft = torch.where(tokens <= VOCAB.eos, tokens, draft)  # a fifth is given, EOS too
    options = {
        **draw(st.sampled_from(RULES)),
        "block_length": draw(st.integers(1, 6)),
        "cache": draw(caches),
        "stop_at_eos": draw(st.booleans()),
        "temperature": draw(st.sampled_from([0.0, 1.0])),
    }
    if not {"threshold", "factor", "entropy_bound"} & set(options):
        options["ranking"] = draw(st.sampled_from(["confidence", "margin", "entropy", "random"]))
    seeds = draw(st.lists(st.integers(0, 99), min_size=rows, max_size=rows))
    return Case(prompts, draft, seeds, options)


def revealed(case: Case, steps: list[Step]) -> list[Tensor]:
    """Which tokens (B, A) each step decided."""
    before, found = case.draft == VOCAB.mask, []
    for step in steps:
        after = step.tokens == VOCAB.mask
        found.append(before & ~after)
        assert not bool((after & ~before).any()), "a decided token was masked again"
        before = after
    return found


# how many


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 12))
@some
def test_a_step_reveals_the_schedules_share_to_rounding(
    length: int, steps: int, block: int
) -> None:
    """From t to s a block of m masks loses m (t - s), rounded up in its first steps."""
    sampler = Blockwise(VOCAB, steps=steps, block_length=block, stop_at_eos=False)
    canvas = toy_canvas([[1]], length)
    taken = list(sampler(canvas, ToyDenoise(canvas, Chaos(end=False))))
    masked = [length, *(int((step.tokens == VOCAB.mask).sum()) for step in taken)]
    counts = [before - after for before, after in itertools.pairwise(masked)]
    total, used = min(steps, length), 0
    for first in range(0, length, block):
        m = min(block, length - first)
        n = max(1, (first + m) * total // length - first * total // length)
        inside = counts[used : used + n]
        assert sum(inside) == m, "a block is not done when its steps are"
        assert all(abs(count - m / n) < 1 for count in inside), "a step is not its share"
        assert inside == sorted(inside, reverse=True), "the remainder does not come first"
        for step in range(n + 1):  # the share still masked, to the even split's own rounding
            left = m - sum(inside[:step])
            assert left == m - (m // n) * step - min(step, m % n)
        used += n
    assert used == len(counts), "there are more steps than the schedule has"


@given(cases())
@some
def test_every_step_reveals_at_least_one_token_of_every_open_row(case: Case) -> None:
    _, steps = case.decode()
    open_ = (case.draft == VOCAB.mask).any(1)
    for step, found in zip(steps, revealed(case, steps), strict=True):
        assert bool(found.any(1)[open_].all())
        open_ = (step.tokens == VOCAB.mask).any(1)
    assert not bool(open_.any())


@given(cases(drafted=False))
@some
def test_exactly_max_tokens_slots_end_revealed(case: Case) -> None:
    canvas, steps = case.decode()
    found = torch.stack(revealed(case, steps)).long().sum(0)
    assert bool((found == 1).all()), "a slot was revealed twice or never"
    assert torch.equal(steps[-1].tokens, canvas.answer) and bool(steps[-1].final.all())
    fresh = toy_canvas(case.prompts, case.draft.shape[1])
    prompt = slice(0, fresh.start)
    assert torch.equal(canvas.tokens[:, prompt], fresh.tokens[:, prompt])


@given(cases())
@some
def test_given_tokens_never_change(case: Case) -> None:
    canvas, steps = case.decode()
    fixed = case.draft != VOCAB.mask
    for tokens in (*(step.tokens for step in steps), canvas.answer):
        assert torch.equal(tokens[fixed], case.draft[fixed])
    fresh = toy_canvas(case.prompts, case.draft.shape[1], draft=case.draft)
    prompt = slice(0, fresh.start)
    for name in ("tokens", "content", "positions", "valid"):
        assert torch.equal(getattr(canvas, name)[:, prompt], getattr(fresh, name)[:, prompt])


@given(cases())
@some
def test_final_tokens_never_change(case: Case) -> None:
    canvas, steps = case.decode()
    for step in steps:
        assert torch.equal(step.tokens[step.final], canvas.answer[step.final])


@given(cases())
@some
def test_blocks_finish_from_left_to_right(case: Case) -> None:
    _, steps = case.decode(end=False)
    before, width = case.draft, case.options["block_length"]
    given_end = (case.draft == VOCAB.eos).any()
    assume(not (given_end and case.options["stop_at_eos"]))  # an end fills what stands behind it
    for step, found in zip(steps, revealed(case, steps), strict=True):
        for row in range(len(found)):
            if bool(found[row].any()):
                block = int((before[row] == VOCAB.mask).nonzero()[0]) // width
                places = found[row].nonzero()[:, 0]
                assert bool((places // width == block).all()), "a later block was opened"
        before = step.tokens


@given(cases())
@some
def test_an_end_closes_its_row_once_all_before_it_is_decided(case: Case) -> None:
    canvas, steps = case.decode()
    for step in steps:
        for tokens, fixed in zip(step.tokens, case.draft != VOCAB.mask, strict=True):
            ends = (tokens == VOCAB.eos).nonzero()[:, 0]
            if case.options["stop_at_eos"] and len(ends):
                first = int(ends[0])
                settled = not bool((tokens[:first] == VOCAB.mask).any())
                closed = bool(((tokens == VOCAB.eos) | fixed)[first:].all())
                assert closed or not settled
    assert not bool((canvas.answer == VOCAB.mask).any())


# which


@st.composite
def scores(draw: Any) -> tuple[Tensor, Tensor]:
    """Scores in [0, 1], many of them equal, and which places are masked."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.rand(shape, generator=generator)
    if draw(st.booleans()):
        values = (values * 8).round() / 8  # exact in binary, so that ties and limits are exact
    return values, torch.rand(shape, generator=generator) < draw(st.floats(0, 1))


def ranked(values: list[float], masked: list[bool]) -> list[int]:
    """Masked places by falling value, ties from the left."""
    return sorted((i for i, m in enumerate(masked) if m), key=lambda i: (-values[i], i))


def agrees(found: Tensor, values: Tensor, masked: Tensor, rule: Any) -> None:
    for row in range(len(values)):
        order = ranked(values[row].tolist(), masked[row].tolist())
        chosen = rule(values[row].tolist(), order) if order else set()
        assert set(found[row].nonzero()[:, 0].tolist()) == chosen


@given(scores(), st.lists(st.integers(0, 12), min_size=4, max_size=4))
@many
def test_fixed_takes_the_n_highest(case: tuple[Tensor, Tensor], counts: list[int]) -> None:
    values, masked = case
    for row in range(len(values)):
        one = slice(row, row + 1)
        found = selection.select_top_k(
            values[one], masked[one], torch.tensor(counts[row : row + 1])
        )
        n = max(1, counts[row])
        agrees(found, values[one], masked[one], lambda _, order, n=n: set(order[:n]))
    together = selection.select_top_k(values, masked, torch.tensor(counts[: len(values)]))
    for row in range(len(values)):
        n = max(1, counts[row])
        assert int(together[row].sum()) == min(n, int(masked[row].sum()))


@given(scores(), st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.875, 0.9, 1.0]))
@many
def test_threshold_takes_what_reaches_it_and_the_best(
    case: tuple[Tensor, Tensor], least: float
) -> None:
    """c >= min(max c, tau)."""

    def rule(row: list[float], order: list[int]) -> set[int]:
        best = max(row[i] for i in order)
        return {i for i in order if row[i] >= min(best, torch.tensor(least).item())}

    agrees(selection.select_threshold(*case, least), *case, rule)


@given(scores(), st.sampled_from([0.25, 0.5, 0.8, 1.0, 1.5, 3.0]))
@many
def test_factor_takes_the_longest_run_that_passes(
    case: tuple[Tensor, Tensor], scale: float
) -> None:
    """The largest n whose every k in 2..n has (k + 1)(1 - c_k) < f."""

    def rule(row: list[float], order: list[int]) -> set[int]:
        n = 1
        while n < len(order) and (n + 2) * (1 - row[order[n]]) < scale:
            n += 1
        return set(order[:n])

    values, masked = case
    # at the limit itself float32 decides: stay away from it unless the numbers are exact
    ranks = torch.arange(2, values.shape[1] + 3)
    gap = ((ranks * (1 - values[..., None])) - scale).abs()
    assume(bool(((gap > 1e-5) | (values * 8 == (values * 8).round())[..., None]).all()))
    agrees(selection.select_factor(values, masked, scale), values, masked, rule)


@given(scores(), st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.5]))
@many
def test_the_entropy_bound_takes_while_the_sum_before_stays_within(
    case: tuple[Tensor, Tensor], bound: float
) -> None:
    """Entropies ascending, cumsum(H) - H <= gamma."""
    values, masked = case
    costs = 1 - values

    def rule(row: list[float], order: list[int]) -> set[int]:
        taken: set[int] = set()
        spent = 0.0
        for place in order:
            if spent > bound and taken:
                break
            taken.add(place)
            spent += 1 - row[place]
        return taken

    exact = bool((values * 8 == (values * 8).round()).all())
    assume(exact or bool(((costs.sort(1).values.cumsum(1) - bound).abs() > 1e-5).all()))
    agrees(selection.select_entropy_bound(costs, masked, bound), values, masked, rule)


@given(scores())
@many
def test_every_rule_takes_something_where_anything_is_masked(case: tuple[Tensor, Tensor]) -> None:
    values, masked = case
    nothing = torch.zeros(len(values), dtype=torch.long)
    for found in (
        selection.select_top_k(values, masked, nothing),
        selection.select_threshold(values, masked, 1.0),
        selection.select_factor(values, masked, 0.0),
        selection.select_entropy_bound(values, masked, 0.0),
    ):
        assert torch.equal(found.any(1), masked.any(1))
        assert not bool((found & ~masked).any())


# alone and in a batch


@given(cases())
@some
def test_a_row_of_a_batch_is_the_row_alone_over_the_toy(case: Case) -> None:
    together = case.decode()[0].answer
    for row in range(len(case.prompts)):
        alone = case.decode(slice(row, row + 1))[0].answer
        assert torch.equal(alone[0], together[row])


@functools.lru_cache
def llada() -> LLaDA:
    """A real backbone with loud random weights, so that its answers vary."""
    config = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "mlp_hidden_size": 24,
        "vocab_size": 12,
        "eos_token_id": 9,
        "pad_token_id": 10,
        "mask_token_id": 11,
    }
    model = LLaDA(config=config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.mul_(60 if name.endswith(("wte.weight", "transformer.ff_out.weight")) else 12)
    return model


@torch.no_grad()
def written(
    prompts: list[Tensor], audio: list[Tensor | None], options: dict[str, Any], seeds: list[int]
) -> tuple[Tensor, int]:
    """Answers (B, 8) of the real backbone, and how many forwards they took."""
    model = llada()
    embeds, text = insert_audio(prompts, audio, [min(1, len(p)) for p in prompts], model.embed)
    answer = torch.full((len(prompts), 8), model.vocab.mask or 0)
    canvas = Canvas(
        embeds, text, answer, embed=model.embed, vocab=model.vocab, seeds=torch.tensor(seeds)
    )
    denoise = Denoiser(model, canvas)
    for _ in Blockwise(model.vocab, **options)(canvas, denoise):
        pass
    return canvas.answer.clone(), denoise.num_forwards


@given(
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=7), min_size=2, max_size=3),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
    caches,
    st.sampled_from(RULES),
    st.integers(1, 5),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.5]),
)
@example([[1], [2, 3, 4, 5, 6, 7, 8]], [3, 0, 0], "dual", {}, 4, 0.0, 0.5)
@few
def test_a_row_of_a_batch_is_the_row_alone_over_a_real_llada(
    prompts: list[list[int]],
    heard: list[int],
    cache: str,
    rule: dict[str, Any],
    block: int,
    temperature: float,
    guidance: float,
) -> None:
    options = {"cache": cache, "block_length": block, "temperature": temperature, **rule}
    options |= {"cfg_scale": guidance, "cfg_drop": "both"}
    texts = [torch.tensor(prompt) for prompt in prompts]
    width = llada().width
    audio = [
        2 * noise(count, width, seed=row) if count else None
        for row, count in zip(range(len(texts)), heard, strict=False)
    ]
    seeds = [5, 6, 7][: len(texts)]
    together, num_forwards = written(texts, audio, options, seeds)
    most = 0
    for row in range(len(texts)):
        one = slice(row, row + 1)
        alone, count = written(texts[one], audio[one], options, seeds[one])
        assert torch.equal(alone[0], together[row])
        most = max(most, count)
    assert num_forwards == most, "a batch takes as many forwards as its slowest row"


def test_the_real_backbone_has_something_to_say() -> None:
    """The comparison above is worth nothing if all answers are alike."""
    prompts = [torch.tensor([n, (3 * n) % 9]) for n in range(9)]
    answers, _ = written(prompts, [None] * 9, {"block_length": 4}, [0] * 9)
    assert len(answers.unique(dim=0)) >= 5


# chance


@given(st.integers(0, 2**40), st.integers(0, 500), st.integers(1, 3))
@few
def test_draws_are_keyed_by_seed_step_and_slot(seed: int, step: int, stream: int) -> None:
    seeds, steps = torch.tensor([seed, seed + 1]), torch.tensor([step, step])
    slots = torch.tensor([[3, 1, 2], [3, 1, 2]])
    draws = slot_uniform(seeds, steps, slots, stream=stream)
    assert bool(((draws > 0) & (draws < 1)).all()) and draws.dtype == torch.float64
    alone = slot_uniform(seeds[1:], steps[1:], slots[1:, 1:], stream=stream)
    assert torch.equal(alone[0], draws[1, 1:]), "a draw depends on what is drawn beside it"
    other = [
        slot_uniform(seeds + 2, steps, slots, stream=stream),
        slot_uniform(seeds, steps + 1, slots, stream=stream),
        slot_uniform(seeds, steps, slots + 1, stream=stream)[:, 1:],
        slot_uniform(seeds, steps, slots, stream=stream + 1),
    ]
    everything = torch.cat([draws.flatten(), *(draw.flatten() for draw in other[:2]),
                            other[3].flatten()])  # fmt: skip
    assert len(everything.unique()) == len(everything), "different keys draw the same"


def test_draws_are_uniform_and_independent_in_every_key() -> None:
    count = 300
    grid = torch.arange(count)
    by_slot = slot_uniform(grid, torch.zeros_like(grid), grid.expand(count, -1), stream=1)
    by_step = torch.stack(
        [slot_uniform(grid, torch.full_like(grid, s), grid[:1].expand(count, 1), stream=1)[:, 0]
         for s in range(count)]
    )  # fmt: skip
    for draws in (by_slot, by_step):
        share = torch.histc(draws.float(), 50, 0, 1) / draws.numel()
        assert (share - 0.02).abs().max() < 5 * (0.02 / draws.numel()) ** 0.5
        for axis in (0, 1):
            near = draws.narrow(axis, 0, count - 1).flatten()
            far = draws.narrow(axis, 1, count - 1).flatten()
            assert abs(torch.corrcoef(torch.stack([near, far]))[0, 1]) < 0.02


@given(st.integers(0, 2**31), st.sampled_from([0.3, 1.0, 2.0]))
@few
def test_sampling_follows_the_softmax_of_the_temperature(seed: int, temperature: float) -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(seed)) * 2
    rows = 3000
    draws = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows  # an even grid: no noise at all
    tokens = sample_categorical(logits.expand(1, rows, 5), temperature, draws[None])[0]
    found = torch.bincount(tokens, minlength=5) / rows
    assert torch.allclose(found, (logits / temperature).softmax(0), atol=2 / rows)


def test_a_row_that_is_given_whole_waits_beside_the_others() -> None:
    draft = torch.tensor([[VOCAB.mask], [3]])
    for cache in ("none", "prefix", "dual"):
        case = Case([[-1, 2, 3], [0]], draft, [53, 95], {"block_length": 4, "cache": cache})
        canvas, _ = case.decode()
        assert canvas.answer[1].tolist() == [3] and not bool(canvas.undecided().any())
