"""The canvas: writing, hiding and showing slots, unconditional twins, audio in prompts."""

import pytest
import torch
from helpers import small
from hypothesis import given
from hypothesis import strategies as st

from diffa.canvas import AttentionContext, KVCache
from diffa.canvas.canvas import NO_TOKEN, first_index, insert_audio, repeat_first
from diffa.canvas.kv_cache import pad_queries, pad_slots

MODEL = small.backbone()


def board(count=3):
    return small.canvas(MODEL, small.questions(count))[0]


def test_the_answers_positions_continue_at_the_true_length_of_each_prompt():
    canvas = board()
    for row, (prompt, audio, _, _) in enumerate(small.questions()):
        length = len(prompt) + (0 if audio is None else len(audio))
        expected = torch.arange(length, length + canvas.length)
        assert torch.equal(canvas.positions[row, canvas.start :], expected)
        assert int(canvas.valid[row, : canvas.start].sum()) == length


def test_written_tokens_and_their_embeddings_are_in_the_canvas():
    canvas = board()
    slots = torch.tensor([[14, 16], [15, -1], [-1, -1]])
    before, content = canvas.tokens.clone(), canvas.content.clone()
    confidence = torch.tensor([[0.5, 0.25], [0.75, 0.0], [0.9, 0.9]])
    canvas.write(slots, torch.tensor([[1, 2], [3, 4], [5, 6]]), confidence)
    changed = (canvas.tokens != before).nonzero().tolist()
    assert changed == [[0, 14], [0, 16], [1, 15]]
    assert canvas.tokens[0, [14, 16]].tolist() == [1, 2] and int(canvas.tokens[1, 15]) == 3
    assert torch.equal(canvas.content[1, 15], MODEL.embed(torch.tensor(3)))
    assert torch.equal(canvas.content[2], content[2])
    assert canvas.confidence[0, [0, 2]].tolist() == [0.5, 0.25]
    assert canvas.confidence[1].sum() == 0.75 and canvas.confidence[2].sum() == 0


def test_filled_slots_hold_the_token_and_only_masks_are_undecided():
    canvas = board()
    where = torch.zeros(3, canvas.length, dtype=torch.bool)
    where[1, 2:4] = True
    canvas.fill(where, 7)
    assert torch.equal(canvas.undecided(), ~where)
    assert canvas.confidence[1, 2:4].tolist() == [1.0, 1.0]
    canvas.fill(where, small.MASK)
    assert canvas.undecided().all() and canvas.confidence.sum() == 0


def test_hidden_slots_are_shown_again_but_padding_is_not():
    canvas = board()
    valid = canvas.valid.clone()
    everything = torch.ones_like(valid)
    canvas.hide(everything)
    assert not canvas.valid.any() and canvas.ragged
    canvas.show(everything)
    assert torch.equal(canvas.valid, valid)


def test_a_hidden_slot_changes_no_other_slots_logits():
    canvas, denoise = small.canvas(MODEL, small.questions(1))
    last = canvas.size - 1
    hidden = torch.arange(canvas.size)[None] == last
    canvas.hide(hidden)
    slots = torch.arange(canvas.start, last)[None]
    with torch.no_grad():
        first = denoise(None, slots)
        canvas.write(torch.tensor([[last]]), torch.tensor([[3]]))
        assert torch.equal(denoise(None, slots), first)
        canvas.show(hidden)
        assert not torch.allclose(denoise(None, slots), first)


@pytest.mark.parametrize("hide", ["text", "audio", "both"])
def test_unconditional_twins_lose_the_text_or_the_audio(hide):
    canvas = board()
    audio, text = canvas.audio.clone(), canvas.tokens != NO_TOKEN
    text[:, canvas.start :] = False
    canvas.add_unconditional(hide)
    mask = MODEL.embed(torch.tensor(small.MASK))
    masked = (canvas.content[3:] == mask).all(-1)
    assert len(canvas.tokens) == 6 and canvas.count == 3
    assert bool(masked[text].all()) == (hide in ("text", "both"))
    assert bool(canvas.valid[3:][audio].any()) == (hide == "text")
    assert canvas.valid[:3][audio].all()  # the rows themselves keep theirs
    canvas.show(torch.ones_like(audio))
    assert bool(canvas.valid[3:][audio].any()) == (hide == "text")
    canvas.write(torch.tensor([[20], [-1], [-1]]), torch.tensor([[5], [0], [0]]))
    assert canvas.tokens[[0, 3], 20].tolist() == [5, 5]
    with pytest.raises(ValueError, match="already"):
        canvas.add_unconditional(hide)


def test_scratch_slots_are_hidden_until_they_are_filled():
    canvas = board()
    size, valid = canvas.size, canvas.valid.clone()
    slots = canvas.add_scratch(2, branch=1)
    assert slots.tolist() == [size, size + 1]
    assert torch.equal(canvas.valid[:, :size], valid) and not canvas.valid[:, size:].any()
    assert canvas.branches[:, size:].eq(1).all() and canvas.branches[:, :size].eq(0).all()
    there = torch.tensor([[True, False]] * 3)
    canvas.fill_scratch(slots, there, torch.full((3, 2), 4), torch.full((3, 2), 9))
    assert torch.equal(canvas.valid[:, size:], there)
    assert canvas.positions[:, size:].eq(9).all() and canvas.tokens[:, size:].eq(4).all()


@given(st.lists(st.lists(st.integers(-1, 9), min_size=4, max_size=4), min_size=1, max_size=4))
def test_padding_repeats_the_rows_first_slot(rows):
    slots = torch.tensor(rows)
    first, repeated = first_index(slots)[:, 0].tolist(), repeat_first(slots).tolist()
    for row, index, result in zip(rows, first, repeated, strict=True):
        real = [slot for slot in row if slot >= 0]
        if real:
            assert row[index] == real[0]
            assert result == [slot if slot >= 0 else real[0] for slot in row]


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    audio=st.lists(st.none() | st.integers(1, 4), min_size=3, max_size=3),
    at=st.integers(0, 1),
)
def test_audio_is_inserted_before_its_index(lengths, audio, at):
    prompts = [torch.arange(length) for length in lengths]
    clips = [None if n is None else torch.full((n, 32), 9.0) for n in audio[: len(lengths)]]
    embeds, ids = insert_audio(prompts, clips, [at] * len(lengths), MODEL.embed)
    for row, (prompt, clip) in enumerate(zip(prompts, clips, strict=True)):
        count = 0 if clip is None else len(clip)
        gap = [NO_TOKEN] * count
        own = [*prompt[:at].tolist(), *gap, *prompt[at:].tolist()]
        assert ids[row].tolist() == own + [NO_TOKEN] * (ids.shape[1] - len(own))
        assert int(embeds.lengths[row]) == len(own)
        assert (embeds.values[row, at : at + count] == 9).all()


# --- stacked contexts ----------------------------------------------------------------------------


def test_one_pass_over_stacked_canvases_gives_each_what_it_gets_alone():
    contexts, embeds, positions, alone = [], [], [], []
    for number, count in enumerate((1, 2)):
        canvas, denoise = small.canvas(
            MODEL, small.questions(3)[number : number + count], 6 + number
        )
        with torch.no_grad():
            denoise(None, torch.arange(canvas.start, canvas.size).expand(count, -1))
        slots = torch.arange(canvas.start, canvas.start + 4 + number).expand(count, -1)
        context = AttentionContext(
            valid=canvas.valid if canvas.ragged else None, positions=canvas.positions,
            query_slots=slots, kv_cache=denoise.kv_cache, write=False,
        )  # fmt: skip
        content = canvas.content.gather(1, slots[:, :, None].expand(-1, -1, 32))
        contexts.append(context)
        embeds.append(content)
        positions.append(canvas.positions.gather(1, slots))
        with torch.no_grad():
            alone.append(MODEL(content, positions[-1], context))
    wide = max(e.shape[1] for e in embeds)
    stacked = AttentionContext.stack(contexts, positions)
    with torch.no_grad():
        hidden = MODEL(
            torch.cat([pad_queries(e, wide) for e in embeds]),
            torch.cat([pad_queries(p, wide) for p in positions]),
            stacked,
        )
    assert torch.allclose(hidden[:1, : alone[0].shape[1]], alone[0], atol=1e-5)
    assert torch.allclose(hidden[1:, : alone[1].shape[1]], alone[1], atol=1e-5)


def test_stacking_fills_in_only_what_some_context_restricts():
    places = [torch.arange(3)[None], torch.arange(5)[None]]
    plain = AttentionContext.stack([AttentionContext()] * 2, [places[0], places[0]])
    assert plain.valid is plain.branch is plain.attn_mask is plain.kv_cache is None
    uneven = AttentionContext.stack([AttentionContext()] * 2, places)
    assert uneven.valid.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    branch = AttentionContext(branch=torch.ones(1, 3, dtype=torch.long))
    mixed = AttentionContext.stack([branch, AttentionContext()], places)
    assert mixed.branch.tolist() == [[1, 1, 1, 0, 0], [0] * 5]
    masked = AttentionContext(attn_mask=torch.zeros(1, 3, 3, dtype=torch.bool))
    mixed = AttentionContext.stack([masked, AttentionContext()], places)
    assert not mixed.attn_mask[0].any() and mixed.attn_mask[1].all()
    some = AttentionContext(output_slots=torch.tensor([[2]]))
    more = AttentionContext(output_slots=torch.tensor([[4, 1]]))
    assert AttentionContext.stack([some, AttentionContext()], places).output_slots is None
    assert AttentionContext.stack([some, more], places).output_slots.tolist() == [[2, 2], [4, 1]]


def test_padding_of_slots_is_zero_and_of_queries_the_first():
    values = torch.tensor([[1, 2], [3, 4]])
    assert pad_slots(values, 3).tolist() == [[1, 2, 0], [3, 4, 0]]
    assert pad_queries(values, 4).tolist() == [[1, 2, 1, 1], [3, 4, 3, 3]]
    assert pad_queries(values, 2) is values


def test_the_drift_of_a_cache_without_a_probe_is_refused():
    with pytest.raises(ValueError, match="probe to a layer"):
        KVCache().drift(torch.tensor([[0]]))
