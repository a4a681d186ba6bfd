"""Slots, memory and batches: what is remembered is what was computed, and rows do not mix."""

import pytest
import torch
from helpers import small
from hypothesis import given, settings
from hypothesis import strategies as st

from diffa.samplers.blockwise import Blockwise
from diffa.samplers.growing import Growing
from diffa.samplers.prophet import Prophet
from diffa.samplers.remdm import ReMDM
from diffa.samplers.revise import Revise
from diffa.samplers.speculative import Speculative
from diffa.samplers.wino import Wino

MODEL = small.backbone()
VOCAB = MODEL.vocab
SAMPLERS = {
    "exact": lambda: Blockwise(VOCAB, block_length=4),
    "prefix": lambda: Blockwise(VOCAB, block_length=4, cache="prefix", threshold=0.5),
    "dual": lambda: Blockwise(VOCAB, block_length=4, cache="dual", factor=1.0),
    "vicinity": lambda: Blockwise(VOCAB, block_length=4, cache="dual", vicinity_window=2),
    "suffix window": lambda: Blockwise(VOCAB, block_length=4, suffix_window=2),
    "suffix-prefix": lambda: Blockwise(VOCAB, block_length=4, cache="prefix", suffix_window=2),
    "lazy": lambda: Blockwise(VOCAB, block_length=4, audio_refresh_interval=3),
    "drift": lambda: Blockwise(VOCAB, block_length=3, cache="dual", drift_threshold=0.05),
    "guided": lambda: Blockwise(
        VOCAB, block_length=4, cache="dual", cfg_scale=1.0, cfg_drop="audio"
    ),
    "sampled": lambda: Blockwise(VOCAB, block_length=4, temperature=1.0, cache="dual"),
    "KLASS": lambda: Blockwise(VOCAB, block_length=4, threshold=0.4, kl_threshold=0.5),
    "credit": lambda: Blockwise(VOCAB, block_length=4, threshold=0.5, credit_strength=0.7),
    "speculative": lambda: Speculative(VOCAB, block_length=4),
    "prophet": lambda: Prophet(VOCAB, block_length=4, early_gap=1.0, middle_gap=1.0, late_gap=1.0),
    "wino": lambda: Wino(VOCAB, block_length=6, threshold=0.4),
    "remdm": lambda: ReMDM(VOCAB, block_length=6, eta=0.3),
    "revise": lambda: Revise(VOCAB, block_length=4),
    "growing": lambda: Growing(
        VOCAB,
        block_length=4,
        initial_length=4,
        expansion_length=4,
        eos_check_tokens=4,
        eos_threshold=0.1,
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_alone_is_the_row_in_a_batch(name):
    asked = small.questions()
    batch, _ = small.decode(MODEL, SAMPLERS[name](), asked)
    assert not (batch == small.MASK).any()
    for row, question in enumerate(asked):
        alone, _ = small.decode(MODEL, SAMPLERS[name](), [question])
        assert alone[0].tolist() == batch[row].tolist()


@settings(max_examples=25, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {
            "block_length": st.integers(1, 12),
            "cache": st.sampled_from(["prefix", "dual"]),
            "vicinity_window": st.integers(0, 5),
            "suffix_window": st.none() | st.integers(0, 9),
            "audio_refresh_interval": st.integers(1, 4),
            "drift_threshold": st.sampled_from([0.0, 0.02, 0.5]),
            "threshold": st.none() | st.floats(0.2, 1.0),
            "credit_strength": st.sampled_from([0.0, 0.5]),
        }
    ),
    length=st.integers(1, 14),
)
def test_combined_policies_keep_rows_apart(options, length):
    asked = small.questions()
    batch, _ = small.decode(MODEL, Blockwise(VOCAB, **options), asked, length)
    assert not (batch == small.MASK).any()
    for row, question in enumerate(asked):
        alone, _ = small.decode(MODEL, Blockwise(VOCAB, **options), [question], length)
        assert alone[0].tolist() == batch[row].tolist()


@pytest.mark.parametrize("options", [{}, {"steps": 5}, {"threshold": 0.4}], ids=str)
def test_speculation_is_token_identical_on_a_model(options):
    asked = small.questions()
    fast, few = small.decode(MODEL, Speculative(VOCAB, block_length=4, **options), asked)
    slow, many = small.decode(
        MODEL, Blockwise(VOCAB, block_length=4, cache="dual", **options), asked
    )
    assert fast.tolist() == slow.tolist()
    assert few <= many


def test_policies_that_leave_nothing_out_change_nothing():
    asked = small.questions()
    plain, _ = small.decode(MODEL, Blockwise(VOCAB, block_length=4), asked)
    wide = Blockwise(VOCAB, block_length=4, cache="dual", vicinity_window=99)
    assert small.decode(MODEL, wide, asked)[0].tolist() == plain.tolist()
    whole = Blockwise(VOCAB, block_length=4, suffix_window=99)
    assert small.decode(MODEL, whole, asked)[0].tolist() == plain.tolist()


def test_recomputing_every_slot_is_a_full_pass():
    board, denoise = small.canvas(MODEL, small.questions())
    rows = torch.arange(board.start, board.size).expand(3, -1)
    with torch.no_grad():
        full = denoise(None, rows)
        slots = torch.where(board.valid, torch.arange(board.size), -1)
        again = denoise(slots, rows)
    assert torch.allclose(full, again, atol=1e-4)


def test_a_forward_that_does_not_write_leaves_the_memory_alone():
    board, denoise = small.canvas(MODEL, small.questions(1))
    rows = torch.arange(board.start, board.start + 4)[None]
    with torch.no_grad():
        denoise(None, rows)
        first = denoise(rows, rows, write=False)
        board.write(rows + 4, torch.zeros(1, 4, dtype=torch.long))
        denoise(rows + 4, rows + 4, write=False)
        assert torch.equal(denoise(rows, rows, write=False), first)
        denoise(rows + 4, rows + 4)
        assert not torch.allclose(denoise(rows, rows), first)


def test_drift_is_the_turn_of_the_last_layers_keys():
    board, denoise = small.canvas(MODEL, small.questions(1))
    denoise.kv_cache.probe = -1
    everything = torch.arange(board.size)[None]
    rows = torch.arange(board.start, board.size)[None]
    with torch.no_grad():
        denoise(None, rows)
        before = denoise.kv_cache._keys[-1].clone()
        board.write(rows[:, :3], torch.ones(1, 3, dtype=torch.long))
        denoise(everything, rows)
        after = denoise.kv_cache._keys[-1]
    turn = 1 - torch.cosine_similarity(before.flatten(2), after.flatten(2), dim=-1)
    assert torch.allclose(denoise.kv_cache.drift(everything), turn, atol=1e-6)
    assert turn.max() > 1e-3


def test_scratch_slots_are_seen_by_their_own_branch_alone():
    board, denoise = small.canvas(MODEL, small.questions(1))
    rows = torch.arange(board.start, board.start + 4)[None]
    with torch.no_grad():
        plain = denoise(None, rows)
        extra = board.add_scratch(4, branch=1)
        words, places = torch.arange(4)[None], board.positions[:, rows[0]]
        board.fill_scratch(extra, torch.ones(1, 4, dtype=torch.bool), words, places)
        both = denoise(None, torch.cat([rows, extra[None]], dim=1))
        board.fill_scratch(extra, torch.ones(1, 4, dtype=torch.bool), words + 4, places)
        other = denoise(None, torch.cat([rows, extra[None]], dim=1))
    assert torch.allclose(plain, both[:, :4], atol=1e-5)
    assert torch.equal(both[:, :4], other[:, :4])
    assert not torch.allclose(both[:, 4:], other[:, 4:])


def test_a_finished_row_leaves_the_batch():
    class Counting:
        def __init__(self):
            self.sizes = []

        def __getattr__(self, name):
            return getattr(MODEL, name)

        def __call__(self, embeds, positions, context):
            self.sizes.append(len(embeds))
            return MODEL(embeds, positions, context)

    counting = Counting()
    draft = torch.full((3, 12), small.MASK)
    draft[0, 2:], draft[1, 6:] = 1, 1
    small.decode(counting, Blockwise(VOCAB, stop_at_eos=False), small.questions(), draft=draft)
    assert counting.sizes == [3] * 2 + [2] * 4 + [1] * 6


def test_a_draft_is_kept_by_plain_decoding():
    draft = torch.full((3, 12), small.MASK)
    draft[:, 4:7] = torch.tensor([1, 2, 3])
    for name in ("exact", "dual", "suffix window", "wino", "remdm", "speculative"):
        answer, _ = small.decode(MODEL, SAMPLERS[name](), small.questions(), draft=draft)
        assert answer[:, 4:7].tolist() == [[1, 2, 3]] * 3, name


def test_the_last_layer_answers_alike_for_all_slots_and_for_the_asked():
    board, denoise = small.canvas(MODEL, small.questions())
    rows = torch.tensor([[14, 17, -1], [20, -1, -1], [22, 23, 24]])
    window = torch.where(board.valid, torch.arange(board.size), -1)[:, 3:]
    for slots in (None, window):
        with torch.no_grad():
            few = denoise(slots, rows)
            MODEL.partial = False
            try:
                whole = denoise(slots, rows)
            finally:
                del MODEL.partial
        assert torch.allclose(few, whole, atol=1e-5)


@pytest.mark.parametrize("name", ["dual", "suffix-prefix", "drift", "lazy", "speculative", "wino"])
def test_a_row_given_as_a_whole_is_left_alone(name):
    draft = torch.full((3, 12), small.MASK)
    draft[1] = torch.arange(12)
    answer, _ = small.decode(MODEL, SAMPLERS[name](), small.questions(), draft=draft)
    assert answer[1].tolist() == list(range(12))
    assert not (answer == small.MASK).any()
