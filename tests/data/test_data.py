"""Manifests, the order of samples, rows, batches, augmentation and cached features."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from helpers import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffa.adapters.conv import Conv
from diffa.adapters.qformer import QFormer
from diffa.chat import Chat
from diffa.data.augment import Augment, change_speed
from diffa.data.cache import FeatureCache, encoder_fingerprint, layers_used_by
from diffa.data.collate import Collate
from diffa.data.manifest import Manifest
from diffa.data.mixture import Mixture
from diffa.data.rows import (
    AnswerTransform,
    AudioTransform,
    EncoderTransform,
    TrainingDataset,
    TrainingRow,
)
from diffa.data.samples import DataError, Sample, derive_seed
from diffa.encoders.tiny import Tiny
from diffa.errors import SpecError
from diffa.types import Features, FeatureSpec, Vocab

VOCAB = Vocab(size=60, eos=toy.EOS, pad=toy.EOS, mask=toy.MASK)


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    return toy.write_tones(tmp_path)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = toy.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Chat(toy.read_tokenizer(folder))


def as_jsonl(path: Path) -> Path:
    rows = json.loads(path.read_text())
    other = path.with_suffix(".jsonl")
    other.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    return other


# --- manifests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [False, True])
def test_a_manifest_gives_samples_in_both_formats(tones: Path, lines: bool) -> None:
    manifest = Manifest(as_jsonl(tones) if lines else tones)
    assert len(manifest) == 8
    sample = manifest[3]
    assert (sample.target, sample.question) == ("low", "What do you hear ?")
    assert sample.audio == tones.parent / "tone3.wav"
    assert manifest.seconds(3) == pytest.approx(0.4)
    assert manifest.summary() == f"{manifest.path}: 8 rows"


def test_stage_1_learns_the_transcription_instead(tones: Path) -> None:
    sample = Manifest(tones, target="transcription", question="Transcribe .")[0]
    assert (sample.target, sample.question) == ("one two", "Transcribe .")


@pytest.mark.parametrize("lines", [False, True])
def test_rows_are_found_behind_text_of_many_bytes(tones: Path, lines: bool) -> None:
    rows = json.loads(tones.read_text())
    for i, row in enumerate(rows):
        row["target"] = f"größe 大 🎵 {i}"
    tones.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    manifest = Manifest(as_jsonl(tones) if lines else tones)
    assert [manifest[i].target for i in range(8)] == [f"größe 大 🎵 {i}" for i in range(8)]


def broken(tones: Path) -> Path:
    """A manifest with one fault of each kind: rows 2, 3, 4, 5, 6, 7 and 9."""
    rows = json.loads(tones.read_text())
    folder = tones.parent
    rows[1]["audio_filepath"] = "nowhere.wav"
    (folder / "tone2.wav").write_text("this is no audio")
    rows[3]["target"] = "  "
    rows[4]["audio_id"] = rows[0]["audio_id"]
    del rows[5]["audio_filepath"]
    (folder / "tone6.wav").write_bytes(b"")
    lines = [json.dumps(row) for row in rows] + ['{"audio_filepath": "tone7.wav", ']
    path = folder / "broken.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_faulty_rows_are_left_out_and_listed(tones: Path) -> None:
    manifest = Manifest(broken(tones), on_error="skip")
    assert len(manifest) == 2
    assert [manifest[i].key for i in range(2)] == ["broken.jsonl row 1", "broken.jsonl row 8"]
    reasons = {fault.row: fault.reason for fault in manifest.faults}
    assert sorted(reasons) == [2, 3, 4, 5, 6, 7, 9]
    expected = {
        2: "is missing",
        3: "not readable audio",
        4: "empty answer",
        5: "repeats audio_id 'tone0' of row 1",
        6: "no audio_filepath",
        7: "is an empty file",
        9: "broken JSON",
    }
    assert all(text in reasons[row] for row, text in expected.items())
    assert "7 of 9 rows are unusable" in manifest.summary()


def test_faulty_rows_stop_with_all_their_numbers(tones: Path) -> None:
    with pytest.raises(DataError) as caught:
        Manifest(broken(tones))
    assert all(f"row {n}:" in str(caught.value) for n in (2, 3, 4, 5, 6, 7, 9))


def test_a_list_broken_in_the_middle_keeps_what_stands_before(tones: Path) -> None:
    text = tones.read_text()
    tones.write_text(text[: text.index("tone5.wav")])
    manifest = Manifest(tones, on_error="skip")
    assert len(manifest) == 5
    assert manifest.faults[0].row == 6
    assert "broken JSON" in manifest.faults[0].reason


def test_questions_about_one_recording_may_share_its_id(tones: Path) -> None:
    rows = json.loads(tones.read_text())
    rows += [{**rows[0], "input": "How many ?", "target": "one"}, dict(rows[0])]
    tones.write_text(json.dumps(rows))
    assert len(Manifest(tones, on_error="skip")) == 8
    assert len(Manifest(tones, on_error="skip", unique=False)) == 9


@pytest.mark.parametrize(
    ("text", "says"),
    [("{}", "not a JSON list"), ("[]", "no usable row"), ("", "not a JSON list")],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        Manifest(path, on_error="skip")


def test_what_has_to_be_converted_says_so(tones: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.parquet is no .json or .jsonl.*data convert"):
        Manifest(tmp_path / "rows.parquet")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [], "audios": []}\n')
    with pytest.raises(DataError, match=r"row 1: is a conversation .*data convert"):
        Manifest(path)


def test_a_missing_manifest_and_an_unknown_field_are_named(tones: Path) -> None:
    with pytest.raises(DataError, match="there is no manifest"):
        Manifest(tones.with_name("absent.json"))
    with pytest.raises(DataError, match="did you mean 'target'"):
        Manifest(tones, target="targets")


# --- order --------------------------------------------------------------------------------------


class Numbers:
    """A source of numbers; longer ones later."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return Sample(target=str(index))

    def seconds(self, index: int) -> float:
        return float(index)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_order_is_a_pure_function_that_spares_no_row(
    sizes: list[int], micro: int, accumulate: int, grouped: bool, seed: int
) -> None:
    def make() -> Mixture:
        return Mixture(
            [Numbers(n) for n in sizes],
            [1.0] * len(sizes),
            batch=micro * accumulate,
            micro=micro,
            grouped=grouped,
            seed=seed,
        )

    mixture, other = make(), make()
    length = 3 * mixture.size
    places = [mixture.draw(p) for p in range(length)]
    assert mixture.size % (micro * accumulate) == 0
    assert [other.draw(p) for p in reversed(range(length))] == places[::-1]
    for source, size in enumerate(sizes):
        rows = [p.row for p in places if p.source == source]
        counts = [rows.count(row) for row in range(size)]
        assert max(counts) - min(counts) <= 1  # none passes again before all have passed
    # seeds are consecutive within an epoch, whatever the batch and the ranks; no two are the same
    assert all(b.seed == a.seed + 1 for a, b in itertools.pairwise(places) if a.epoch == b.epoch)
    assert len({place.seed for place in places}) == length


def test_weights_say_how_often_rows_pass_in_an_epoch() -> None:
    mixture = Mixture([Numbers(100), Numbers(40)], [1.0, 0.25], batch=2, micro=2)
    epochs = [[mixture.draw(e * mixture.size + i) for i in range(mixture.size)] for e in range(4)]
    assert all(sum(p.source == 1 for p in epoch) == 10 for epoch in epochs)
    assert {p.row for epoch in epochs for p in epoch if p.source == 1} == set(range(40))


def test_another_seed_is_another_order() -> None:
    orders = [
        [Mixture([Numbers(30)], [1.0], batch=1, micro=1, seed=s).draw(i).row for i in range(30)]
        for s in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_grouped_batches_hold_rows_of_like_length() -> None:
    def spread(grouped: bool) -> float:
        mixture = Mixture([Numbers(256)], [1.0], batch=8, micro=8, grouped=grouped)
        rows = torch.tensor([mixture.draw(i).row for i in range(256)]).view(-1, 8)
        return float((rows.amax(1) - rows.amin(1)).float().mean())

    assert spread(True) < 8 < 100 < spread(False)


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(DataError, match="weight must be above 0"):
        Mixture([Numbers(3)], [0.0], batch=1, micro=1)
    with pytest.raises(DataError, match="has no samples"):
        Mixture([Numbers(0)], [1.0], batch=1, micro=1)


# --- rows and batches ---------------------------------------------------------------------------


def wave(seconds: float = 0.2) -> torch.Tensor:
    return torch.from_numpy(toy.tone(440, seconds))


def test_a_row_marks_the_header_and_the_answer(chat: Chat) -> None:
    row = AnswerTransform(chat, VOCAB, AudioTransform(16000))(
        Sample(target="high", question="What do you hear ?", audio=wave(), rate=16000), 5
    )
    words = chat.tokenizer.convert_ids_to_tokens(row.tokens[row.answer].tolist())
    assert words == ["<|start|>", "assistant", "<|end|>", "high", "<|eot|>"]
    before = chat.tokenizer.convert_ids_to_tokens(row.tokens[: row.audio_at].tolist())
    assert before[-2:] == ["audio", ":"]
    assert row.seed == 5


def test_answers_have_room_that_is_learned_as_eos(chat: Chat) -> None:
    sample = Sample(target="one two", question="How many ?")  # 3 tokens with its end of turn
    for rooms, expected in (([12], 12), ([2, 4, 8], 4)):
        row = AnswerTransform(chat, VOCAB, None, answer_lengths=rooms)(sample, 0)
        assert int(row.answer.sum()) == 3 + expected  # its header comes on top
        assert row.tokens[row.answer][6:].tolist() == [toy.EOS] * (expected - 3)
    roomy = AnswerTransform(chat, VOCAB, None, answer_lengths=[4, 8], padding_share=1.0)
    assert {int(roomy(sample, seed).answer.sum()) for seed in range(20)} == {7, 11}


def test_the_header_belongs_to_the_answer_as_often_as_it_should(chat: Chat) -> None:
    make = AnswerTransform(chat, VOCAB, None, header_share=0.3)
    sizes = [int(make(Sample(target="one two"), seed).answer.sum()) for seed in range(200)]
    assert set(sizes) == {3, 6}
    assert 0.2 < sizes.count(6) / 200 < 0.4


def test_questions_about_one_recording_draw_apart(chat: Chat) -> None:
    make = AnswerTransform(chat, VOCAB, None, header_share=0.5)
    sample = Sample(
        target="one two", extra_questions=tuple(("How many ?", "one two") for _ in range(5))
    )
    rows = [make(sample, seed) for seed in range(50)]
    sizes = [[int(row.answer.sum()) for row in (made, *made.extra_rows)] for made in rows]
    mixed = [found for found in sizes if len(set(found)) > 1]
    assert len(mixed) > 40  # 2 of 64 rows would agree by chance


def test_an_answer_too_long_for_its_room_is_a_fault(chat: Chat) -> None:
    with pytest.raises(DataError, match="an answer of 3 tokens exceeds 2"):
        AnswerTransform(chat, VOCAB, None, answer_lengths=[2])(
            Sample(target="one two", key="row 1"), 0
        )
    with pytest.raises(DataError, match="more than 10"):
        AnswerTransform(chat, VOCAB, None, max_length=10)(Sample(target="one two"), 0)


def test_a_script_stands_where_the_audio_would(chat: Chat) -> None:
    make = AnswerTransform(chat, VOCAB, None)
    spoken = make(Sample(target="high", question="What ?", audio_text="one two"), 0)
    heard = make(Sample(target="high", question="What ?", audio=wave(), rate=16000), 0)
    with_audio = AnswerTransform(chat, VOCAB, AudioTransform(16000))(
        Sample(target="high", question="What ?", audio=wave(), rate=16000), 0
    )
    assert spoken.audio_at == with_audio.audio_at is not None
    assert spoken.audio_text is not None
    assert chat.tokenizer.convert_ids_to_tokens(spoken.audio_text.tolist()) == ["one", "two"]
    assert torch.equal(spoken.tokens, with_audio.tokens)
    assert heard.audio_at is None and heard.audio is None


def test_audio_at_another_rate_is_resampled(chat: Chat) -> None:
    made = AudioTransform(16000)(Sample(audio=wave(), rate=8000), 0)
    assert made is not None and len(made) == 2 * len(wave())


def test_collating_pads_and_never_changes_a_row(chat: Chat) -> None:
    make = AnswerTransform(chat, VOCAB, AudioTransform(16000))
    texts = [("high", 0.1), ("one two three", 0.3), ("low", 0.2)]
    rows = [
        make(Sample(target=t, question="What ?", audio=wave(s), rate=16000), i)
        for i, (t, s) in enumerate(texts)
    ]
    batch = Collate(VOCAB)(rows)
    assert (
        batch.audio is not None and batch.audio_lengths is not None and batch.audio_at is not None
    )
    assert batch.audio.shape == (3, int(0.3 * 16000))
    for b, row in enumerate(rows):
        size = len(row.tokens)
        assert torch.equal(batch.tokens[b, :size], row.tokens)
        assert torch.equal(batch.answer[b, :size], row.answer)
        assert batch.tokens[b, size:].tolist() == [VOCAB.eos] * (batch.tokens.shape[1] - size)
        assert bool(batch.answer[b, size:].all())
        assert row.audio is not None
        assert torch.equal(batch.audio[b, : batch.audio_lengths[b]], row.audio)
        assert not bool(batch.audio[b, batch.audio_lengths[b] :].any())


def test_pads_beyond_an_answers_own_room_are_nothing(chat: Chat) -> None:
    make = AnswerTransform(chat, VOCAB, None, answer_lengths=[4, 8])
    rows = [make(Sample(target=text), i) for i, text in enumerate(("one", "one two three four"))]
    batch = Collate(VOCAB, learn_padding=False)(rows)
    assert batch.row_lengths.tolist() == [len(row.tokens) for row in rows]
    assert not bool(batch.answer[0, batch.row_lengths[0] :].any())
    learned = Collate(VOCAB)(rows)
    assert learned.row_lengths.tolist() == [learned.tokens.shape[1]] * 2
    assert bool(learned.answer[0, batch.row_lengths[0] :].all())


def test_text_and_audio_do_not_share_a_batch(chat: Chat) -> None:
    make = AnswerTransform(chat, VOCAB, AudioTransform(16000))
    rows = [make(Sample(target="one", audio=wave(), rate=16000), 0), make(Sample(target="one"), 1)]
    with pytest.raises(DataError, match="share a batch"):
        Collate(VOCAB)(rows)


def test_listening_rows_keep_their_labels() -> None:
    row = EncoderTransform(AudioTransform(16000))(
        Sample(audio=wave(), rate=16000, labels={"word": 3}), 0
    )
    batch = Collate(VOCAB)([row])
    assert batch.labels == ({"word": 3},)
    assert batch.tokens.shape == (1, 0)


def stream(source: Any, chat: Chat, on_error: str) -> TrainingDataset:
    mixture = Mixture([source], [1.0], batch=2, micro=2)
    return TrainingDataset(
        mixture, 8, AnswerTransform(chat, VOCAB, AudioTransform(16000)), on_error
    )  # type: ignore[arg-type]


def test_audio_that_fails_when_it_is_read_is_replaced_and_reported(tones: Path, chat: Chat) -> None:
    manifest = Manifest(tones)
    (tones.parent / "tone4.wav").write_text("damaged after the scan")
    rows: list[TrainingRow] = [stream(manifest, chat, "skip")[i] for i in range(8)]
    reasons = [reason for row in rows for reason in row.skipped]
    assert len(reasons) == 1
    assert "tone4.wav" in reasons[0] and "train.json row 5" in reasons[0]
    assert all(row.audio is not None for row in rows)
    with pytest.raises(DataError, match=r"train.json row 5.*--on-error skip"):
        [stream(manifest, chat, "stop")[i] for i in range(8)]


def test_data_that_is_unusable_throughout_is_refused(tones: Path, chat: Chat) -> None:
    manifest = Manifest(tones)
    for path in tones.parent.glob("*.wav"):
        path.write_text("no audio")
    with pytest.raises(DataError, match="rows in a row are unusable"):
        stream(manifest, chat, "skip")[0]


def test_curricula_see_the_progress_of_the_stage(chat: Chat) -> None:
    class Growing(Numbers):
        def at(self, index: int, progress: float) -> Sample:
            return Sample(target="one" if progress < 0.5 else "one two")

    rows = [stream(Growing(8), chat, "stop")[i] for i in range(8)]
    sizes = [int(row.answer.sum()) for row in rows]
    assert sizes == [5] * 4 + [6] * 4


def test_seeds_depend_on_every_part() -> None:
    seeds = {derive_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- augmentation -------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "speed": [0.9, 1.1],
    "gain": 6.0,
    "noise": [10.0, 20.0],
    "bands": 2,
    "gaps": 2,
}


def test_augmentation_follows_from_the_seed_alone() -> None:
    alter = Augment(16000, **EVERYTHING)
    first = alter(wave(), 3)
    torch.manual_seed(1)
    torch.rand(7)
    assert torch.equal(alter(wave(), 3), first)
    assert not torch.equal(alter(wave(), 4)[:100], first[:100])


def test_every_row_is_altered_by_its_own_seed() -> None:
    hearing = AudioTransform(16000, Augment(16000, gain=6.0))
    sample = Sample(audio=wave(), rate=16000)
    first, again, other = (hearing(sample, seed) for seed in (1, 1, 2))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_augmentation_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Augment(16000, **EVERYTHING)(wave(), 3)
    assert torch.equal(torch.rand(3), expected)


def test_speed_changes_length_and_pitch() -> None:
    quick = change_speed(wave(0.5), 16000, 1.25)
    assert len(quick) == pytest.approx(0.4 * 16000, abs=2)
    spectrum = torch.fft.rfft(quick).abs()
    assert spectrum.argmax() * 16000 / len(quick) == pytest.approx(550, abs=5)


def test_noise_is_as_loud_as_it_says() -> None:
    clean = wave(1.0)
    noisy = Augment(16000, noise=[10.0, 10.0])(clean, 0)
    ratio = 10 * torch.log10(clean.square().sum() / (noisy - clean).square().sum())
    assert ratio == pytest.approx(10.0, abs=0.1)


def test_masks_silence_bands_and_stretches() -> None:
    hiss = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    gapped = Augment(16000, gaps=3, gap=0.3)(hiss, 1)
    assert len(gapped) == 16000
    assert (gapped.abs() < 1e-5).sum() > 800
    banded = Augment(16000, bands=3, band=0.3)(hiss, 1)
    power = torch.stft(banded, 400, 160, window=torch.hann_window(400), return_complex=True).abs()
    assert (power.mean(1) < 0.2 * power.mean()).sum() > 10


def test_nothing_asked_is_nothing_done_and_nonsense_is_refused() -> None:
    assert torch.equal(Augment(16000)(wave(), 0), wave())
    assert torch.equal(Augment(16000, gain=6, share=0.0)(wave(), 0), wave())
    for options in ({"speed": [3.0]}, {"noise": [1.0]}, {"gain": -1.0}, {"share": 2.0}):
        with pytest.raises(SpecError):
            Augment(16000, **options)


# --- cached features ----------------------------------------------------------------------------


class Spy(nn.Module):
    """Counts the recordings that meet the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Tiny(width=16, layers=2, heads=2, window_seconds=1.0).eval()
        self.seen = 0

    def forward(self, audio: torch.Tensor, lengths: torch.Tensor) -> Features:
        self.seen += len(audio)
        made: Features = self.encoder(audio, lengths)
        return made


def padded(*seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
    waves = [torch.from_numpy(toy.tone(300 + 100 * i, s)) for i, s in enumerate(seconds)]
    lengths = torch.tensor([len(w) for w in waves])
    rows = [nn.functional.pad(w, (0, int(lengths.max()) - len(w))) for w in waves]
    return torch.stack(rows), lengths


def cache(folder: Path, spy: Spy, **options: Any) -> FeatureCache:
    return FeatureCache(folder, encoder_fingerprint("tiny", spy.encoder), [1, 2], 3, **options)


def test_a_recording_meets_the_encoder_once(tmp_path: Path) -> None:
    spy = Spy()
    kept = cache(tmp_path, spy, dtype="float32")
    audio, lengths = padded(0.4, 0.2)
    with torch.no_grad():
        first = kept.features(spy, audio, lengths)
        again = kept.features(spy, audio, lengths)
        # another process, another batch, another padding
        other = cache(tmp_path, spy, dtype="float32")
        alone = other.features(spy, audio[1:, : lengths[1] + 50], lengths[1:])
        plain = spy.encoder(audio, lengths)
    assert spy.seen == 2
    assert (kept.hits, kept.misses, other.hits) == (2, 2, 1)
    for layer in (1, 2):
        assert torch.allclose(first.states[layer], plain.states[layer], atol=1e-6)
        assert torch.equal(first.states[layer], again.states[layer])
        size = int(alone.extents[0])
        assert torch.equal(alone.states[layer][0], first.states[layer][1, :size])
    assert torch.equal(first.lengths, plain.lengths) and torch.equal(first.extents, plain.extents)


def test_float16_is_the_same_when_made_and_when_read(tmp_path: Path) -> None:
    spy = Spy()
    kept = cache(tmp_path, spy)
    audio, lengths = padded(0.3)
    with torch.no_grad():
        made, read = (kept.features(spy, audio, lengths) for _ in range(2))
    assert spy.seen == 1
    assert torch.equal(made.states[2], read.states[2])


def test_other_weights_or_other_layers_never_find_old_features(tmp_path: Path) -> None:
    spy = Spy()
    audio, _ = padded(0.3)
    keys = {cache(tmp_path, spy).key(audio[0])}
    keys.add(FeatureCache(tmp_path, encoder_fingerprint("tiny", spy.encoder), [2], 3).key(audio[0]))
    keys.add(cache(tmp_path, spy, dtype="float32").key(audio[0]))
    with torch.no_grad():
        next(spy.encoder.parameters()).add_(1e-3)
    keys.add(cache(tmp_path, spy).key(audio[0]))
    keys.add(cache(tmp_path, spy).key(audio[0] + 1e-4))
    assert len(keys) == 5


def test_a_full_cache_and_a_damaged_file_cost_time_only(tmp_path: Path) -> None:
    spy = Spy()
    full = cache(tmp_path / "full", spy, gigabytes=0.0)
    audio, lengths = padded(0.3)
    with torch.no_grad():
        full.features(spy, audio, lengths)
        full.features(spy, audio, lengths)
        assert (spy.seen, full.refused) == (2, 2)
        kept = cache(tmp_path / "kept", spy)
        expected = kept.features(spy, audio, lengths)
        (file,) = (tmp_path / "kept").glob("*/*.safetensors")
        file.write_bytes(file.read_bytes()[:40])
        found = kept.features(spy, audio, lengths)
    assert spy.seen == 4
    assert torch.equal(found.states[2], expected.states[2])


def test_an_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    spy = Spy()
    kept = cache(tmp_path / "file", spy)
    audio, lengths = padded(0.3)
    with torch.no_grad():
        kept.features(spy, audio, lengths)
    assert kept.refused == 1


def test_layers_that_adapters_read_are_found() -> None:
    source = FeatureSpec(width=16, layers=4, rate=50.0, heads=2)
    conv, qformer = Conv(source, 8), QFormer(source, 8, num_queries=4, encoder_layers=[1, 3])
    assert layers_used_by([conv], source) == (4,)
    assert layers_used_by([conv, qformer], source) == (1, 3, 4)


def test_recordings_of_a_manifest_can_be_any_format(tmp_path: Path) -> None:
    for name in ("a.flac", "a.ogg"):
        soundfile.write(tmp_path / name, toy.tone(300), 16000)
    rows = [{"audio_filepath": n, "target": "low"} for n in ("a.flac", "a.ogg")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    manifest = Manifest(path)
    assert [manifest.seconds(i) for i in range(2)] == pytest.approx([0.4, 0.4])
