"""Every sampler passes the conformance suite; policies and rules do what they are defined to."""

import itertools
from typing import ClassVar

import pytest
import torch

from diffa.canvas.canvas import NO_TOKEN
from diffa.errors import SpecError
from diffa.samplers import selection
from diffa.samplers.blocks import BlockTracker
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.credit import Credit
from diffa.samplers.growing import Growing
from diffa.samplers.lengths import insert_masks, resize_answers
from diffa.samplers.prophet import Prophet
from diffa.samplers.recompute import AudioRefresh, BlockCache, RecomputeSlots, SuffixWindow
from diffa.samplers.remdm import ReMDM
from diffa.samplers.revise import Revise
from diffa.samplers.speculative import Speculative
from diffa.samplers.stability import coarse_kl_divergence
from diffa.samplers.transfer_schedule import steps_per_block
from diffa.samplers.wino import Wino
from diffa.testing import SamplerSuite
from diffa.testing.toy import MASKED, Chaos, Joint, Sure, ToyDenoise, toy_canvas

PROMPTS = ([1, 2, 3], [4], [-1, -1, 0, 2, -1, 3, 3])
RANDOM = {"ranking": "random", "temperature": 1.0}


class TestBlockwise(SamplerSuite):
    name, options, exact = "blockwise", {"block_length": 4}, RANDOM


class TestDual(SamplerSuite):
    name, options = "blockwise", {"block_length": 4, "cache": "dual", "vicinity_window": 1}
    exact: ClassVar = {"ranking": "entropy", "temperature": 1.0}


class TestPrefixAndSuffix(SamplerSuite):
    name, options = "blockwise", {"block_length": 4, "cache": "prefix", "suffix_window": 2}
    exact: ClassVar = {"suffix_window": 12, **RANDOM}


class TestAudioRefresh(SamplerSuite):
    name, options, exact = "blockwise", {"block_length": 4, "audio_refresh_interval": 3}, RANDOM


class TestLocalLeap(SamplerSuite):
    name, options = "blockwise", {"block_length": 4, "threshold": 0.7, "neighbor_threshold": 0.3}
    exact: ClassVar = {"threshold": None, "neighbor_threshold": None, **RANDOM}


class TestRunThreshold(SamplerSuite):
    name, options = "blockwise", {"block_length": 4, "threshold": 0.7, "run_threshold": 0.3}
    exact: ClassVar = {"threshold": None, "run_threshold": None, **RANDOM}


class TestKLASS(SamplerSuite):
    name, options = "blockwise", {"block_length": 4, "threshold": 0.3, "kl_threshold": 0.5}
    exact: ClassVar = {"threshold": None, "kl_threshold": None, **RANDOM}


class TestCredit(SamplerSuite):
    name, options = "blockwise", {"block_length": 4, "threshold": 0.6, "credit_strength": 0.7}
    exact: ClassVar = {"threshold": None, "credit_strength": 0.0, **RANDOM}


class TestStepsPerBlock(SamplerSuite):
    name, options = "blockwise", {"block_length": 5, "steps_per_block": 2}
    exact: ClassVar = {"steps_per_block": None, **RANDOM}


class TestLeftToRight(SamplerSuite):
    name, options = "blockwise", {"block_length": 4, "ranking": "left_to_right"}
    exact: ClassVar = {"temperature": 1.0}


class TestEosCheckedAfterBlocks(SamplerSuite):
    name, options = "blockwise", {"block_length": 4, "threshold": 0.5, "eos_check": "block"}
    exact: ClassVar = {"threshold": None, **RANDOM}


class TestEdit(SamplerSuite):
    name, options = "edit", {"block_length": 5, "threshold": 0.5, "edit_threshold": 0.4}


class TestSpeculative(SamplerSuite):
    name, options, exact = "speculative", {"block_length": 5}, RANDOM


class TestProphet(SamplerSuite):
    name, options = "prophet", {"block_length": 4, "early_gap": 2.0, "middle_gap": 1.0}


class TestWino(SamplerSuite):
    name, options, edits = "wino", {"block_length": 6, "threshold": 0.3}, False


class TestRemdm(SamplerSuite):
    name, options = "remdm", {"block_length": 5, "eta": 0.4}
    exact: ClassVar = {"eta": 0.0, **RANDOM}


class TestRevise(SamplerSuite):
    name, options, edits = "revise", {"block_length": 4}, True


class TestGrowing(SamplerSuite):
    name, options = (
        "growing",
        {"block_length": 4, "initial_length": 4, "expansion_length": 3, "eos_check_tokens": 3},
    )


def decode(sampler, law, *, seeds=(3, 4, 5), length=12, draft=None):
    canvas = toy_canvas(PROMPTS, length, seeds=seeds, draft=draft)
    denoise = ToyDenoise(canvas, law, most=20 * length)
    steps = list(sampler(canvas, denoise))
    return canvas.answer, steps


@pytest.mark.parametrize("options", [{}, {"steps": 6}, {"threshold": 0.5}, RANDOM], ids=str)
@pytest.mark.parametrize("law", [Chaos(), Chaos(3.0, end=False), Sure()], ids=["end", "on", "sure"])
def test_speculation_writes_the_tokens_of_the_decoder_it_speeds_up(options, law):
    fast, steps = decode(Speculative(MASKED, block_length=5, **options), law)
    slow, more = decode(Blockwise(MASKED, block_length=5, cache="dual", **options), law)
    assert fast.tolist() == slow.tolist()
    assert len(steps) <= len(more)


def test_speculation_needs_fewer_passes_when_predictions_are_certain():
    assert len(decode(Speculative(MASKED, block_length=12, draft_steps=4), Sure())[1]) == 1 + 3
    assert len(decode(Speculative(MASKED, block_length=12, draft_steps=1), Sure())[1]) == 12


def test_prophet_commits_the_whole_block_of_a_certain_model():
    assert len(decode(Prophet(MASKED, block_length=12), Sure())[1]) == 1
    assert (
        len(
            decode(
                Prophet(MASKED, block_length=12, early_gap=99, middle_gap=99, late_gap=99), Sure()
            )[1]
        )
        == 12
    )


def test_wino_masks_tokens_again_that_leave_one_out_refutes():
    answer, steps = decode(
        Wino(MASKED, block_length=12, threshold=0.2, remask_threshold=0.9), Chaos(end=False)
    )
    taken_back = sum(
        int(((before.tokens != MASKED.mask) & (after.tokens == MASKED.mask)).sum())
        for before, after in itertools.pairwise(steps)
    )
    assert taken_back > 0
    assert not (answer == MASKED.mask).any()
    _, sure = decode(Wino(MASKED, block_length=12, threshold=0.2, remask_threshold=0.9), Sure())
    assert len(sure) < 4


def test_a_wino_shadow_sees_everything_but_the_token_it_checks():
    canvas = toy_canvas(PROMPTS, 6)
    wino, blocks = Wino(MASKED, block_length=6), BlockTracker(canvas, 6)
    shadows = canvas.add_scratch(6, branch=1)
    checked, _ = wino._place_shadows(canvas, blocks.current(), ~canvas.undecided(), shadows)
    attn_mask = wino._attn_mask(canvas, checked, shadows)
    for column, shadow in enumerate(shadows.tolist()):
        hidden = (~attn_mask[0, shadow]).nonzero()[:, 0].tolist()
        others = [other for other in shadows.tolist() if other != shadow]
        assert hidden == sorted([int(checked[0, column]), *others])


@pytest.mark.parametrize("scale", ["cap", "rescale", "confidence"])
def test_remdm_masks_tokens_again_and_still_ends(scale):
    sampler = ReMDM(MASKED, block_length=12, eta=0.5, remasking_schedule=scale, steps=24)
    _, steps = decode(sampler, Chaos(end=False))
    masks = [int((step.tokens == MASKED.mask).sum()) for step in steps]
    assert any(later > earlier for earlier, later in itertools.pairwise(masks))
    assert masks[-1] == 0
    assert len(steps) <= 24


def test_revise_changes_doubtful_tokens_and_keeps_the_rest():
    truth, _ = decode(Blockwise(MASKED), Sure())
    draft = truth.clone()
    draft[:, 3] = (draft[:, 3] + 1) % 5
    answer, steps = decode(Revise(MASKED, remask_threshold=0.5), Sure(), draft=draft)
    assert answer.tolist() == truth.tolist()
    assert len(steps) == 2


def test_growing_stops_when_the_tail_expects_eos():
    def ends(known, place, prompt):
        wanted = torch.where(place >= 5, MASKED.eos, 1)
        return 30.0 * torch.nn.functional.one_hot(wanted, MASKED.size).float()

    answer, _ = decode(
        Growing(MASKED, initial_length=2, expansion_length=2, eos_check_tokens=2, block_length=4),
        ends,
    )
    assert answer.tolist() == [[1] * 5 + [MASKED.eos] * 7] * 3
    _, steps = decode(Growing(MASKED, cut_threshold=0.5, block_length=4), ends)
    used = [int((step.tokens == MASKED.mask).sum()) for step in steps]
    assert used[0] == 3 * 6  # one slot for the EOS itself


def test_growing_inserts_masks_for_an_uncertain_model():
    def unsure(known, place, prompt):
        return torch.zeros(len(place), MASKED.size)

    sampler = Growing(
        MASKED,
        initial_length=4,
        expansion_length=1,
        eos_check_tokens=1,
        eos_threshold=0.0,
        insert_length=2,
        insert_threshold=0.5,
        stop_at_eos=False,
    )
    _, steps = decode(sampler, unsure)
    masks = [int((step.tokens == MASKED.mask).sum()) for step in steps]
    assert any(later > earlier for earlier, later in itertools.pairwise(masks))


def test_inserted_masks_push_the_rest_of_the_answer_back():
    canvas = toy_canvas([[1], [2]], 8)
    ours = canvas.undecided()
    size = torch.tensor([5, 5])
    resize_answers(canvas, ours, size)
    canvas.write(torch.tensor([[1, 4], [1, 4]]), torch.tensor([[2, 3], [2, 3]]))
    size = insert_masks(
        canvas, ours, size, torch.tensor([1, 8]), 2
    )  # the second row has no such place
    gap, rest = MASKED.mask, MASKED.eos
    assert canvas.answer.tolist() == [
        [2, gap, gap, gap, gap, 3, gap, rest],
        [2, gap, gap, 3, gap, rest, rest, rest],
    ]
    assert size.tolist() == [7, 5]
    assert canvas.valid[:, canvas.start :].sum(1).tolist() == [7, 5]


def chosen(policies, place, canvas):
    recompute, write = RecomputeSlots(policies)(canvas, place)
    if recompute is None:
        return None, write
    return [sorted(row[row >= 0].tolist()) for row in recompute], write


def entered(canvas, width=4, fresh=False):
    place = BlockTracker(canvas, width).current()
    return place if fresh else place._replace(entered=torch.zeros_like(place.entered))


def test_policies_recompute_the_slots_they_are_named_for():
    canvas = toy_canvas([[1, 2, 3]], 12)
    canvas.write(torch.tensor([[3, 4, 5, 6]]), torch.zeros(1, 4, dtype=torch.long))
    place = entered(canvas)  # the second block: slots 7 to 10 of 15
    assert chosen([], place, canvas) == (None, False)
    assert chosen([BlockCache("dual", 0)], place, canvas) == ([[7, 8, 9, 10]], True)
    assert chosen([BlockCache("dual", 2)], place, canvas) == ([list(range(5, 13))], True)
    assert chosen([BlockCache("prefix", 0)], place, canvas) == ([list(range(7, 15))], True)
    assert chosen([BlockCache("dual", 0)], entered(canvas, fresh=True), canvas) == (None, True)


def test_vicinity_counts_positions_not_the_padding_between_prompt_and_answer():
    canvas = toy_canvas(PROMPTS, 12)
    rows, _ = chosen([BlockCache("dual", 2)], entered(canvas), canvas)
    assert [row[:2] for row in rows] == [[1, 2], [0, 7], [5, 6]]


def test_a_suffix_window_keeps_the_next_slots_and_the_last():
    canvas = toy_canvas([[1, 2, 3]], 12)
    rows, _ = chosen([SuffixWindow(2)], entered(canvas), canvas)
    assert rows == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 14]]
    assert (~canvas.valid[0]).nonzero()[:, 0].tolist() == [9, 10, 11, 12, 13]


def test_audio_is_recomputed_every_third_pass():
    canvas = toy_canvas([[-1, -1, 2]], 6)
    policy, blocks, heard = AudioRefresh(3, canvas), BlockTracker(canvas, 6), []
    for _ in range(7):
        rows, _ = chosen([policy], blocks.current(), canvas)
        heard.append(rows is None or 0 in rows[0])
        blocks.advance()
    assert heard == [True, False, False, True, False, False, True]
    assert (canvas.tokens[0, :2] == NO_TOKEN).all()


def scores(count=40, width=9):
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(count, width, generator=generator)
    masked = torch.rand(count, width, generator=generator) < 0.7
    masked[:, 0] = True
    return values, masked, torch.arange(width).expand(count, -1)


def test_local_leap_accepts_neighbors_of_confident_tokens():
    values, masked, places = scores()
    taken = selection.select_local_leap(values, masked, places, 0.9, 0.6, reach=2)
    for row in range(len(values)):
        open_ = masked[row].nonzero()[:, 0].tolist()
        anchors = [i for i in open_ if values[row, i] >= 0.9]
        near = [i for i in open_ if values[row, i] >= 0.6 and any(abs(i - a) <= 2 for a in anchors)]
        best = max(open_, key=lambda i: float(values[row, i]))
        assert taken[row].nonzero()[:, 0].tolist() == sorted({*anchors, *near, best})


def test_run_threshold_accepts_the_best_of_each_run_of_masks():
    values, masked, places = scores()
    taken = selection.select_runs(values, masked, places, 0.9, 0.4)
    for row in range(len(values)):
        open_ = masked[row].nonzero()[:, 0].tolist()
        runs = [
            [i for _, i in group]
            for _, group in itertools.groupby(enumerate(open_), lambda pair: pair[1] - pair[0])
        ]
        tops = [max(run, key=lambda i: float(values[row, i])) for run in runs]
        wanted = {i for i in tops if values[row, i] >= 0.4}
        wanted |= {i for i in open_ if values[row, i] >= 0.9}
        wanted.add(max(open_, key=lambda i: float(values[row, i])))
        assert taken[row].nonzero()[:, 0].tolist() == sorted(wanted)


def test_klass_accepts_only_confident_tokens_that_have_not_moved():
    values, masked, _ = scores()
    moved = torch.rand(values.shape, generator=torch.Generator().manual_seed(2))
    taken = selection.select_klass(values, masked, moved, 0.8, 0.3)
    for row in range(len(values)):
        open_ = masked[row].nonzero()[:, 0].tolist()
        calm = [i for i in open_ if values[row, i] >= 0.8 and moved[row, i] < 0.3]
        best = max(open_, key=lambda i: float(values[row, i]))
        assert taken[row].nonzero()[:, 0].tolist() == (calm or [best])


def test_a_capped_rule_accepts_at_most_its_cap():
    values, masked, _ = scores()
    taken = selection.select_capped(values, masked, 0.5, torch.full((len(values),), 2))
    assert ((taken.sum(1) <= 2) & (taken.sum(1) >= 1)).all()
    assert ((values > 0.5) | (taken.sum(1, keepdim=True) == 1))[taken].all()


def test_divergence_is_kullback_leibler_where_all_tokens_are_kept():
    generator = torch.Generator().manual_seed(3)
    now = torch.randn(5, 8, generator=generator).double().log_softmax(-1)
    before = torch.randn(5, 8, generator=generator).double().log_softmax(-1)
    exact = (now.exp() * (now - before)).sum(-1)
    assert torch.allclose(coarse_kl_divergence(now, before), exact, atol=1e-6)
    assert (coarse_kl_divergence(now[:, :3], before[:, :3]) <= exact + 1e-9).all()


def test_credit_decays_and_grows_where_a_token_ranks_first():
    canvas = toy_canvas([[1]], 4)
    credit = Credit(canvas, strength=0.7, tokens_per_slot=8)
    place = BlockTracker(canvas, 4).current()
    energy = torch.zeros(1, 4, 8)
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        logits = 3 * torch.randn(1, 4, 8, generator=generator)
        best, leader = logits.softmax(-1).max(-1, keepdim=True)
        energy = 0.8 * energy
        energy.scatter_add_(-1, leader, best**0.2)
        expected = logits + 0.7 * energy.log1p()
        assert torch.allclose(credit.boost(logits.clone(), place), expected, atol=1e-5)


def test_steps_are_divided_among_blocks_by_length():
    assert steps_per_block(None, 32, 8) == [8, 8, 8, 8]
    assert steps_per_block(15, 24, 8) == [5, 5, 5]
    assert steps_per_block(2, 10, 4) == [1, 1, 1]
    assert sum(steps_per_block(7, 10, 4)) == 7


@pytest.mark.parametrize("ranking", ["random", "entropy", "margin"])
def test_samples_at_temperature_one_follow_the_joint_distribution(ranking):
    law, count = Joint(), 3000
    canvas = toy_canvas([[1]] * count, 3, seeds=range(count))
    for _ in Blockwise(MASKED, temperature=1.0, ranking=ranking)(canvas, ToyDenoise(canvas, law)):
        pass
    codes = (canvas.answer * torch.tensor([9, 3, 1])).sum(1)
    found = torch.bincount(codes, minlength=27) / count
    assert (found - law.table.flatten()).abs().max() < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbor_threshold": 0.5}, "neighbor_threshold refines a threshold"),
        (
            {"threshold": 0.9, "neighbor_threshold": 0.5, "run_threshold": 0.5},
            "choose one of neighbor_threshold and run_threshold",
        ),
        ({"vicinity_window": 2}, "set cache to prefix or dual"),
        ({"audio_refresh_interval": 0}, "audio_refresh_interval must be at least 1"),
        ({"threshold": 1.5}, "threshold must lie between 0 and 1"),
        ({"credit_strength": -1.0}, "credit_strength must be 0 or more"),
        ({"cache": "dual", "drift_threshold": 0.1, "cfg_scale": 1.0}, "do not combine"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(SpecError, match=message):
        Blockwise(MASKED, **options)
