"""Laws of every sampler, slot policy and selection rule, over a toy that is known exactly."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers import selection
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.speculative import Speculative
from diffa.spec import registry
from diffa.testing import Chaos, Joint, ToyDenoise, toy_canvas
from diffa.testing.toy import CAUSAL, MASKED
from diffa.types import BlockAttention, Step

few = settings(
    max_examples=8, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
many = settings(few, max_examples=20)

# every sampler that diffa ships, and every policy and rule of those that have some
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("blockwise", {}),
    "steps": ("blockwise", {"steps": 3}),
    "margin": ("blockwise", {"ranking": "margin"}),
    "random order": ("blockwise", {"ranking": "random", "temperature": 1.0}),
    "warm": ("blockwise", {"temperature": 0.7}),
    "threshold": ("blockwise", {"threshold": 0.5}),
    "factor": ("blockwise", {"factor": 1.0}),
    "released factor": ("blockwise", {"factor": 1.0, "factor_rule": "released"}),
    "entropy bound": ("blockwise", {"entropy_bound": 1.0}),
    "local leap": ("blockwise", {"threshold": 0.7, "neighbor_threshold": 0.3}),
    "run threshold": ("blockwise", {"threshold": 0.7, "run_threshold": 0.3}),
    "KLASS": ("blockwise", {"threshold": 0.3, "kl_threshold": 0.5}),
    "credit": ("blockwise", {"threshold": 0.6, "credit_strength": 0.7}),
    "guidance": ("blockwise", {"cfg_scale": 1.5, "cfg_drop": "both"}),
    "prefix": ("blockwise", {"cache": "prefix"}),
    "dual": ("blockwise", {"cache": "dual"}),
    "vicinity": ("blockwise", {"cache": "dual", "vicinity_window": 2}),
    "drift": ("blockwise", {"cache": "dual", "drift_threshold": 0.35}),
    "suffix window": ("blockwise", {"suffix_window": 2}),
    "lazy audio": ("blockwise", {"audio_refresh_interval": 3}),
    "everything": (
        "blockwise",
        {
            "cache": "dual",
            "vicinity_window": 1,
            "suffix_window": 3,
            "audio_refresh_interval": 2,
            "threshold": 0.5,
        },
    ),
    "on": ("blockwise", {"stop_at_eos": False}),
    "steps per block": ("blockwise", {"steps_per_block": 2, "minimal_topk": 2}),
    "steps per block, threshold": ("blockwise", {"steps_per_block": 3, "threshold": 0.5}),
    "left to right": ("blockwise", {"ranking": "left_to_right", "merge_commit": False}),
    "after blocks": ("blockwise", {"eos_check": "block", "confidence_temperature": 0.8}),
    "after an EOS": ("blockwise", {"threshold": 0.5, "eos_check": "written"}),
    "edit": ("edit", {"threshold": 0.5, "edit_threshold": 0.6}),
    "speculative": ("speculative", {"draft_steps": 3}),
    "speculative, warm": ("speculative", {"draft_steps": 3, "temperature": 1.0, "threshold": 0.5}),
    "prophet": (
        "prophet",
        {"early_gap": 2.0, "middle_gap": 1.0, "late_gap": 0.5, "cache": "prefix"},
    ),
    "wino": ("wino", {"threshold": 0.3}),
    "remdm": ("remdm", {"eta": 0.4, "temperature": 1.0}),
    "remdm, confidence": (
        "remdm",
        {"eta": 0.9, "remasking_schedule": "confidence", "cache": "dual"},
    ),
    "revise": ("revise", {"threshold": 0.5}),
    "growing": (
        "growing",
        {
            "initial_length": 3,
            "expansion_length": 2,
            "eos_check_tokens": 2,
            "insert_length": 1,
            "insert_threshold": 0.5,
        },
    ),
    "cutting": ("growing", {"cut_threshold": 0.4}),
    "greedy": ("greedy", {}),
    "nucleus": ("greedy", {"temperature": 1.0, "top_p": 0.8}),
}


def make(way: str, block: int) -> Any:
    name, options = WAYS[way]
    if name != "greedy":
        options = {"block_length": block, **options}
    return registry.load_part("sampler", name)(CAUSAL if name == "greedy" else MASKED, **options)


def test_every_sampler_and_policy_is_under_these_laws() -> None:
    """A sampler or an option of ``blockwise`` that is added has to be added above."""
    shipped = {part.name for part in registry.list_parts("sampler") if part.is_builtin}
    assert {name for name, _ in WAYS.values()} == shipped
    used = {option for name, options in WAYS.values() if name == "blockwise" for option in options}
    from diffa.spec.schema import read_schema

    assert set(read_schema(Blockwise).options) - used == {"block_length"}


class Case(NamedTuple):
    prompts: list[list[int]]
    seeds: list[int]
    draft: Tensor
    block: int


@st.composite
def cases(draw: Any) -> Case:
    rows, length = draw(st.integers(2, 4)), draw(st.integers(1, 10))
    prompts = [draw(st.lists(st.integers(-1, 4), min_size=1, max_size=5)) for _ in range(rows)]
    draft = torch.full((rows, length), MASKED.mask or 0)
    if draw(st.booleans()):
        drawn = st.lists(st.integers(0, 30), min_size=rows * length, max_size=rows * length)
        tokens = torch.tensor(draw(drawn)).view(rows, length)
        draft = torch.where(tokens <= MASKED.eos, tokens, draft)
    seeds = draw(st.lists(st.integers(0, 2**40), min_size=rows, max_size=rows))
    return Case(prompts, seeds, draft, draw(st.integers(1, 6)))


def decode(way: str, case: Case, rows: slice = slice(None)) -> tuple[Tensor, list[Step]]:
    causal = WAYS[way][0] == "greedy"
    canvas = toy_canvas(
        case.prompts[rows],
        case.draft.shape[1],
        seeds=case.seeds[rows],
        draft=None if causal else case.draft[rows],
        vocab=CAUSAL if causal else MASKED,
    )
    denoise: Any = ToyDenoise(canvas, Chaos(), most=400)
    denoise.kv_cache = Moving(canvas)
    steps = list(make(way, case.block)(canvas, denoise))
    return canvas.answer[: canvas.count], steps


class Moving:
    """A memory whose keys move, or not, by how much of a row is decided."""

    probe: int | None = None

    def __init__(self, canvas: Any) -> None:
        self.canvas = canvas

    def drift(self, slots: Tensor) -> Tensor:
        decided = (~self.canvas.undecided()).sum(dim=1, keepdim=True)
        return (decided * 7 % 10 / 10).expand(slots.shape)


@pytest.mark.parametrize("way", list(WAYS))
@given(case=cases())
@few
def test_a_row_of_a_batch_is_the_row_alone_and_final_tokens_stay(way: str, case: Case) -> None:
    together, steps = decode(way, case)
    for row in range(len(case.prompts)):
        alone, _ = decode(way, case, slice(row, row + 1))
        assert torch.equal(alone[0], together[row]), f"row {row}"
    for before, after in itertools.pairwise(steps):
        assert not bool((before.final & ~after.final).any())
        assert torch.equal(before.tokens[before.final], after.tokens[before.final])
    if steps:
        assert bool(steps[-1].final.all()) and torch.equal(steps[-1].tokens, together)
    if WAYS[way][0] != "greedy":  # which has no mask: its vocabulary's last token is a word
        assert not bool((together == MASKED.mask).any())


# marginals

DRAWS: dict[str, tuple[str, dict[str, Any]]] = {
    # one token per forward, in an order that the values have no say in: draws from the joint
    "blockwise, random": ("blockwise", {"ranking": "random"}),
    "blockwise, entropy": ("blockwise", {"ranking": "entropy"}),
    "blockwise, margin": ("blockwise", {"ranking": "margin"}),
    "blockwise, prefix": ("blockwise", {"ranking": "random", "cache": "prefix", "block_length": 2}),
    "blockwise, dual": ("blockwise", {"ranking": "random", "cache": "dual", "vicinity_window": 1}),
    "blockwise, suffix": ("blockwise", {"ranking": "random", "suffix_window": 3}),
    "blockwise, lazy audio": ("blockwise", {"ranking": "random", "audio_refresh_interval": 2}),
    "speculative": ("speculative", {"ranking": "random", "draft_steps": 3}),
    "remdm, cap": ("remdm", {"ranking": "random", "eta": 0.5, "steps": 12}),
    "remdm, rescale": (
        "remdm",
        {"ranking": "random", "eta": 0.5, "remasking_schedule": "rescale", "steps": 12},
    ),
    "greedy": ("greedy", {}),
}


def samples(name: str, options: dict[str, Any], law: Joint, count: int) -> Tensor:
    vocab = CAUSAL if name == "greedy" else MASKED
    canvas = toy_canvas([[1]] * count, 3, seeds=range(count), vocab=vocab)
    sampler = registry.load_part("sampler", name)(vocab, temperature=1.0, **options)
    for _ in sampler(canvas, ToyDenoise(canvas, law)):
        pass
    return canvas.answer[:count]


@pytest.mark.parametrize("way", list(DRAWS))
def test_samples_at_temperature_one_follow_the_models_joint(way: str) -> None:
    """A chi-square test over all 27 answers of three tokens, and over each token's marginal."""
    law, count = Joint(), 3000
    found = samples(*DRAWS[way], law, count)
    codes = torch.bincount((found * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    assert len(codes) == 27, "a token came that has no probability"
    due = law.table.flatten() * count
    # 26 degrees of freedom: 54.05 is passed once in a thousand draws
    assert float(((codes - due).square() / due.clamp(min=1e-9)).sum()) < 54.05 * 1.3
    for place in range(3):
        marginal = law.table.sum(dim=[p for p in range(3) if p != place])
        share = torch.bincount(found[:, place], minlength=3) / count
        allowed = 4.5 * (marginal * (1 - marginal) / count).sqrt() + 1e-6
        assert bool(((share - marginal).abs() < allowed).all()), place


def test_several_tokens_at_once_do_not_follow_the_joint() -> None:
    """What the test above can tell: tokens drawn together are drawn as if independent."""
    law, count = Joint(), 3000
    found = samples("blockwise", {"steps": 1, "ranking": "random"}, law, count)
    codes = torch.bincount((found * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    due = law.table.flatten() * count
    assert float(((codes - due).square() / due).sum()) > 200


# speculation


@given(
    case=cases(),
    depth=st.integers(1, 5),
    rule=st.sampled_from([{}, {"steps": 3}, {"threshold": 0.4}, {"threshold": 0.8}]),
    warm=st.sampled_from([0.0, 1.0]),
    stop=st.booleans(),
)
@many
def test_speculation_is_token_identical_and_never_slower(
    case: Case, depth: int, rule: dict[str, Any], warm: float, stop: bool
) -> None:
    options = {"block_length": case.block, "temperature": warm, "stop_at_eos": stop, **rule}
    found, num_forwards = [], []
    for sampler in (
        Speculative(MASKED, draft_steps=depth, **options),
        Blockwise(MASKED, cache="dual", **options),
    ):
        canvas = toy_canvas(case.prompts, case.draft.shape[1], seeds=case.seeds, draft=case.draft)
        num_forwards.append(len(list(sampler(canvas, ToyDenoise(canvas, Chaos(2.0), most=400)))))
        found.append(canvas.answer)
    assert torch.equal(*found)
    assert num_forwards[0] <= num_forwards[1]


# selection rules


class Scores(NamedTuple):
    values: Tensor
    masked: Tensor
    places: Tensor
    moved: Tensor


@st.composite
def scores(draw: Any) -> Scores:
    """Distinct scores, so that ties have no say, with the places of masks among other tokens."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.stack([torch.randperm(width, generator=generator) for _ in range(rows)])
    masked = torch.rand(rows, width, generator=generator) < draw(st.floats(0.1, 1.0))
    gaps = torch.randint(1, 3, (rows, width), generator=generator)
    moved = torch.rand(rows, width, generator=generator)
    return Scores((values + 1) / (width + 1), masked, gaps.cumsum(1), moved)


def taken(rule: str, case: Scores, mild: float) -> Tensor:
    """What a rule takes; the larger ``mild`` in (0, 1), the more."""
    values, masked, places, moved = case
    strict = 1 - mild
    rules = {
        "fixed": lambda: selection.select_top_k(values, masked, _counts(values, mild)),
        "threshold": lambda: selection.select_threshold(values, masked, strict),
        "factor": lambda: selection.select_factor(values, masked, 4 * mild),
        "entropy bound": lambda: selection.select_entropy_bound(1 - values, masked, 3 * mild),
        "KLASS": lambda: selection.select_klass(values, masked, moved, 0.0, mild),
        "local leap": lambda: selection.select_local_leap(
            values, masked, places, 0.8, 0.8 * strict
        ),
        "run threshold": lambda: selection.select_runs(values, masked, places, 0.9, 0.9 * strict),
        "capped": lambda: selection.select_capped(values, masked, 0.2, _counts(values, mild)),
    }
    return rules[rule]()


def _counts(values: Tensor, mild: float) -> Tensor:
    return torch.full((len(values),), int(1 + mild * values.shape[1]))


RULES = [
    "fixed",
    "threshold",
    "factor",
    "entropy bound",
    "KLASS",
    "local leap",
    "run threshold",
    "capped",
]
mild = st.floats(0.0, 1.0)


@pytest.mark.parametrize("rule", RULES)
@given(case=scores(), much=mild)
@many
def test_a_rule_takes_some_of_what_is_masked_and_nothing_else(
    rule: str, case: Scores, much: float
) -> None:
    found = taken(rule, case, much)
    assert not bool((found & ~case.masked).any())
    assert torch.equal(found.any(dim=1), case.masked.any(dim=1))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "KLASS"])
@given(case=scores(), much=mild)
@many
def test_a_rule_always_takes_the_best(rule: str, case: Scores, much: float) -> None:
    """But for ``stable``, which prefers what has not moved."""
    found = taken(rule, case, much)
    best = case.values.masked_fill(~case.masked, -1).argmax(dim=1)
    took = found.gather(1, best[:, None])[:, 0]
    assert torch.equal(took, case.masked.any(dim=1))


@pytest.mark.parametrize("rule", RULES)
@given(case=scores(), much=mild, less=mild)
@many
def test_a_milder_rule_takes_no_less(rule: str, case: Scores, much: float, less: float) -> None:
    less, much = sorted([less, much])
    strict, loose = taken(rule, case, less), taken(rule, case, much)
    if rule == "KLASS":  # nothing calm: the best alone, which need not be calm later
        alone = (case.moved >= less).logical_or(~case.masked).all(dim=1, keepdim=True)
        strict = strict & ~alone
    assert not bool((strict & ~loose).any())


@pytest.mark.parametrize(
    "rule", ["fixed", "threshold", "factor", "entropy bound", "KLASS", "capped"]
)
@given(case=scores(), much=mild, seed=st.integers(0, 2**31))
@many
def test_where_a_slot_stands_has_no_say(rule: str, case: Scores, much: float, seed: int) -> None:
    """But for the rules that look at neighbours, ``leap`` and ``spread``."""
    order = torch.randperm(case.values.shape[1], generator=torch.Generator().manual_seed(seed))
    moved = Scores(*(part[:, order] for part in case))
    assert torch.equal(taken(rule, case, much)[:, order], taken(rule, moved, much))


@pytest.mark.parametrize("rule", RULES)
@given(case=scores(), much=mild)
@many
def test_rows_and_padding_have_no_say(rule: str, case: Scores, much: float) -> None:
    if rule in ("fixed", "capped"):
        return  # the count asked for depends on the width here
    pad = functools.partial(torch.nn.functional.pad, pad=(0, 3))
    whole = taken(rule, case, much)
    for row in range(len(case.values)):
        one = Scores(*(part[row : row + 1] for part in case))
        wide = Scores(pad(one.values), pad(one.masked), pad(one.places), pad(one.moved))
        assert torch.equal(taken(rule, wide, much)[0, : whole.shape[1]], whole[row])


@given(case=scores(), least=mild, low=mild)
@many
def test_refined_thresholds_take_what_the_threshold_takes(
    case: Scores, least: float, low: float
) -> None:
    values, masked, places, _ = case
    plain = selection.select_threshold(values, masked, least)
    assert not bool(
        (plain & ~selection.select_local_leap(values, masked, places, least, low * least)).any()
    )
    assert not bool(
        (plain & ~selection.select_runs(values, masked, places, least, low * least)).any()
    )
    assert torch.equal(selection.select_local_leap(values, masked, places, least, least), plain)


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][0] != "greedy"])
@pytest.mark.parametrize("from_prompt", [False, True])
def test_every_sampler_decodes_block_causal_models_or_says_why_not(
    way: str, from_prompt: bool
) -> None:
    """Blocks of a backbone that begin inside the prompt leave no token undecided."""
    canvas = toy_canvas([[1, 2, 3], [4]], 9, attention=BlockAttention(4, from_prompt, False))
    denoise = ToyDenoise(canvas, Chaos(), most=600)
    try:
        steps = list(make(way, 4)(canvas, denoise))
    except SpecError as error:
        assert "block-causal" in str(error)
        return
    assert not (steps[-1].tokens == MASKED.mask).any()
    assert steps[-1].final.all()
