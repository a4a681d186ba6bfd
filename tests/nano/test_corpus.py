"""The nano corpus: random access, audible labels, true answers, the tokenizer, files on disk."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from diffa.data.samples import DataError
from diffa.data.sources import open_source
from diffa.errors import AudioError, SpecError
from diffa.nano.corpus import examples, voices
from diffa.nano.corpus.examples import Examples, all_instructions, write_corpus
from diffa.nano.corpus.phrases import PHRASES, paraphrase, phrases
from diffa.nano.corpus.questions import (
    LETTERS,
    TASK_WEIGHTS,
    make_instruction,
    number_to_words,
    transcript,
    true_answer,
    write_caption,
)
from diffa.nano.corpus.recordings import Recordings, fsdd_folder
from diffa.nano.corpus.scenes import LEVELS, SPEEDS, Labels, speed_band
from diffa.nano.corpus.shaping import RATE, decibels, stretch
from diffa.nano.corpus.sounds import DIRECTIONS, SOUNDS, Melody, render_melody
from diffa.nano.corpus.text import AudioTexts, acoustic_words
from diffa.nano.corpus.utterances import MAX_SECONDS, Utterances
from diffa.nano.corpus.vocabulary import BLANK, SYSTEM, build_vocabulary, write_tokenizer
from diffa.nano.corpus.voices import accent_is_audible


def labels(digits: tuple[int, ...] = (3, 5, 9), **changes: object) -> Labels:
    count = len(digits)
    plain = Labels(
        digits,
        tuple((i * 0.5, i * 0.5 + 0.4) for i in range(count)),
        ("lucas",) * count,
        ("man",) * count,
        ("german",) * count,
        "medium",
        "loud",
        None,
        None,
        count * 0.5,
    )
    return plain._replace(**changes)


@pytest.fixture(scope="module")
def utterances() -> Utterances:
    return Utterances("train", 7)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.mark.fsdd
class TestUtterances:
    def test_an_utterance_is_a_pure_function_of_seed_and_index(self, utterances):
        again = Utterances("train", 7)
        for index in (3, 11, 5):
            assert again[index].labels == utterances[index].labels
            np.testing.assert_array_equal(again[index].audio, utterances[index].audio)

    def test_seeds_differ(self, utterances):
        other = Utterances("train", 8)
        assert [other.scene(i) for i in range(5)] != [utterances.scene(i) for i in range(5)]

    def test_utterances_fit_the_window_and_full_scale(self, utterances):
        for index in range(60):
            wave = utterances[index].audio
            assert 0 < len(wave) <= (MAX_SECONDS + 0.2) * RATE
            assert wave.dtype == np.float32 and np.abs(wave).max() <= 1

    def test_digits_lie_where_their_boundaries_say(self, utterances):
        for index in range(60):
            wave, heard = utterances[index]
            if heard.sound or not heard.digits:
                continue
            inside = np.concatenate([wave[int(a * RATE) : int(b * RATE)] for a, b in heard.spans])
            before = wave[: int(heard.spans[0][0] * RATE)]
            assert decibels(inside) > decibels(before) + 10

    def test_named_loudness_is_the_level_of_the_speech(self, utterances):
        for index in range(60):
            wave, heard = utterances[index]
            if not heard.loudness or not heard.digits or np.abs(wave).max() >= 1:
                continue
            inside = np.concatenate([wave[int(a * RATE) : int(b * RATE)] for a, b in heard.spans])
            low, high = LEVELS[heard.loudness]
            assert low - 1.5 <= decibels(inside) <= high + 1.5

    def test_named_speed_is_the_rate_of_onsets(self, utterances):
        for index in range(60):
            heard = utterances[index].labels
            assert heard.speed == speed_band([start for start, _ in heard.spans])

    def test_test_recordings_never_meet_training(self):
        train, test = (Recordings(fsdd_folder(), split) for split in ("train", "test"))
        taken = {path for paths in train.files.values() for path in paths}
        assert not taken & {path for paths in test.files.values() for path in paths}
        assert all(int(p.stem.split("_")[2]) < 5 for ps in test.files.values() for p in ps)

    def test_a_speaker_can_be_left_out(self):
        left = Utterances("train", 7, exclude_speakers=("theo",))
        assert "theo" not in {voice.name for voice in left.voices}

    def test_without_the_synthesiser_only_people_speak(self):
        assert all(voice.real for voice in Utterances("train", 7, synthetic_voices=False).voices)

    def test_examples_share_an_utterance_and_stay_pure(self, utterances):
        examples = Examples(utterances, 12, samples_per_utterance=3)
        ids = [examples[i].audio_id for i in range(6)]
        assert len(set(ids)) == 2 and examples[4].answer == examples[4].answer

    def test_unknown_kinds_are_refused(self, utterances):
        with pytest.raises(SpecError, match="colour"):
            Examples(utterances, 3, tasks=("colour",))

    def test_files_hold_the_published_fields(self, tmp_path):
        manifest = write_corpus(tmp_path, "test", 5, 6, questions_per_utterance=2)
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        fields = (
            "audio_id audio_filepath transcription input target dataset duration seed_transcript"
        )
        assert len(rows) == 6 and all(set(row) == set(fields.split()) for row in rows)
        assert len({row["audio_id"] for row in rows}) == 6
        assert all((tmp_path / row["audio_filepath"]).exists() for row in rows)
        listed = write_corpus(tmp_path, "test", 5, 6, questions_per_utterance=2, form="json")
        assert json.loads(listed.read_text()) == rows

    def test_equal_commands_give_equal_bytes(self, tmp_path, monkeypatch):
        for name, second in (("a", 1.0), ("b", 90_000.0)):
            monkeypatch.setattr(time, "time", lambda second=second: second)
            write_corpus(tmp_path / name, "test", 5, 6)
        files = [contents(tmp_path / name) for name in "ab"]
        assert files[0] == files[1] and len(files[0]) == 8
        audio = [data for path, data in files[0].items() if path.endswith(".wav")]
        assert all(b"PEAK" not in data for data in audio)

    def test_written_audio_is_the_examples_own(self, tmp_path, utterances):
        row = json.loads(write_corpus(tmp_path, "test", 5, 1).read_text())
        wave, rate = soundfile.read(tmp_path / row["audio_filepath"], dtype="float32")
        assert rate == 16_000
        assert np.array_equal(wave, Examples(Utterances("test", 5), 1)[0].audio)

    def test_another_corpus_in_the_folder_is_refused(self, tmp_path):
        write_corpus(tmp_path, "test", 5, 6)
        before = contents(tmp_path)
        for seed, count in ((6, 6), (5, 7)):
            with pytest.raises(DataError, match=r"test\.jsonl belongs to another corpus"):
                write_corpus(tmp_path, "test", seed, count)
            with pytest.raises(DataError, match="belongs to another corpus"):
                write_corpus(tmp_path, "test", seed, count, form="json")
        assert contents(tmp_path) == before
        write_corpus(tmp_path, "train", 6, 2)  # another split is no other corpus
        assert contents(tmp_path).items() > before.items()

    @pytest.mark.parametrize("corpus", [False, True])
    def test_recordings_of_others_are_never_replaced(self, tmp_path, corpus):
        if corpus:
            write_corpus(tmp_path, "test", 5, 2)
        (tmp_path / "audio" / "test" / "mine").mkdir(parents=True)
        (tmp_path / "audio" / "test" / "mine" / "interview.wav").write_bytes(b"field work")
        before = contents(tmp_path)
        with pytest.raises(DataError, match=r"test.* belongs to another corpus"):
            write_corpus(tmp_path, "test", 5, 2)
        assert contents(tmp_path) == before

    def test_a_corpus_that_was_interrupted_is_written_whole(self, tmp_path, monkeypatch):
        write_corpus(tmp_path / "whole", "test", 6, 4)
        write = examples.write_wav
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(examples, "write_wav", stops_after(3, write))
            write_corpus(tmp_path / "cut", "test", 5, 6)
        assert not (tmp_path / "cut" / "test.jsonl").exists()
        assert not list(tmp_path.glob("cut/audio/*/*.wav"))
        write_corpus(tmp_path / "cut", "test", 6, 4)  # with other options: nothing is there yet
        assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stops_after(count, write):
    calls = []

    def stopping(*args):
        calls.append(args)
        if len(calls) > count:
            raise KeyboardInterrupt
        write(*args)

    return stopping


def test_missing_recordings_are_named(tmp_path, monkeypatch):
    with pytest.raises(AudioError, match=f"none in {tmp_path}.*DIFFA_FSDD.*--fsdd"):
        fsdd_folder(tmp_path)
    monkeypatch.delenv("DIFFA_FSDD", raising=False)
    with pytest.raises(AudioError, match=r"no folder is named.*DIFFA_FSDD"):
        fsdd_folder()


def test_without_espeak_a_warning_says_once_what_is_missing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    voices._warn.cache_clear()
    try:
        made = [voices.EspeakVoices("train", tmp_path) for _ in range(2)]
    finally:
        voices._warn.cache_clear()
    assert [one.voices for one in made] == [[], []]
    (told,) = caplog.messages
    assert "espeak-ng is not installed" in told and "apt-get install" in told


def test_stretching_changes_duration_and_not_pitch():
    wave = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    slow = stretch(wave, 0.8)
    assert len(slow) / RATE == pytest.approx(1.25, abs=0.06)
    assert np.argmax(np.abs(np.fft.rfft(slow))) * RATE / len(slow) == pytest.approx(440, abs=5)


def test_sounds_are_as_long_as_asked_and_distinct():
    waves = [make(1.0, np.random.default_rng(0)) for make in SOUNDS.values()]
    assert {len(wave) for wave in waves} == {RATE}
    assert len({wave.tobytes() for wave in waves}) == len(SOUNDS)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_melodies_sound(direction):
    wave = render_melody(Melody(direction, 4), np.random.default_rng(1))
    assert 0.8 < len(wave) / RATE < 2 and decibels(wave) > -30


def test_an_accent_counts_only_where_its_digits_give_it_away():
    assert accent_is_audible("british", (4, 6)) and not accent_is_audible("british", (6, 7))


def test_speed_has_no_name_between_the_bands_or_for_one_digit():
    assert speed_band([0.0]) is None and speed_band([0.0, 1 / 1.5]) is None
    assert [speed_band([0.0, 1 / rate]) for rate in (1.2, 1.9, 3.0)] == list(SPEEDS)


def test_answers_are_true():
    heard = labels()
    wanted = {"count": "three", "sum": "seventeen", "largest": "nine", "gender": "man"}
    wanted |= {"speed": "medium", "loudness": "loud", "accent": "german", "sound": "nothing"}
    assert {task: true_answer(task, heard) for task in wanted} == wanted
    assert true_answer("place", heard, 1) == "five" and true_answer("place", heard, 3) is None
    assert transcript(heard) == "three five nine" and true_answer("same", heard) == "same"
    assert write_caption(heard) == "Loud, medium speech: a german man says three five nine."


def test_what_cannot_be_heard_is_not_asked():
    heard = labels(accents=(None,) * 3, speed=None, loudness=None)
    for task in ("accent", "speed", "loudness", "caption", "melody", "notes"):
        assert true_answer(task, heard) is None


def test_nobody_speaks_in_silence():
    silent = labels((), sound="silence", loudness=None)
    assert true_answer("transcribe", silent) == "nothing"
    assert true_answer("gender", silent) == "nobody" and true_answer("loudness", silent) == "silent"
    assert write_caption(silent) == "Only silence."


def test_the_letter_names_the_answer():
    draw = np.random.default_rng(3)
    for task in ("count", "sum", "gender", "accent", "sound"):
        for _ in range(20):
            made = make_instruction(task, labels(), draw, choice=True)
            letter, answer = made.answer.split(". ")
            assert made.choices[LETTERS.index(letter)] == answer == true_answer(task, labels())
            assert len(set(made.choices)) == 4 and f"{letter}. {answer}" in made.question


@pytest.mark.parametrize("task", sorted(PHRASES))
def test_a_reworded_phrase_is_never_a_held_out_one_and_keeps_its_place(task):
    draw, held = np.random.default_rng(0), phrases(task, held_out=True)
    for phrase in phrases(task):
        for _ in range(100):
            made = paraphrase(phrase, task, draw)
            assert made not in held
            assert made[-1] == phrase[-1] and made.count("{nth}") == phrase.count("{nth}")


def test_rewording_would_make_held_out_phrases_if_it_did_not_look(monkeypatch):
    """Otherwise the test above would tell nothing."""
    monkeypatch.setattr("diffa.nano.corpus.phrases.phrases", lambda task, held_out=False: ())
    draw = np.random.default_rng(0)
    assert any(
        paraphrase(phrase, task, draw) in phrases(task, held_out=True)
        for task in PHRASES for phrase in phrases(task) for _ in range(100)
    )  # fmt: skip


@pytest.mark.parametrize("paraphrase_share", [-0.1, 1.1, float("nan")])
def test_paraphrase_share_lies_between_0_and_1(paraphrase_share):
    with pytest.raises(DataError, match=r"paraphrase_share.*(finite|0 to 1)"):
        open_source("nano-text", {"paraphrase_share": paraphrase_share})


def test_a_share_of_the_questions_is_reworded_and_the_answers_stay():
    def rows(paraphrase_share):
        imitations = AudioTexts(3, questions_per_sample=4, paraphrase_share=paraphrase_share)
        return [imitations[i] for i in range(60)]

    def known(made):
        stems = {text.split("{nth}")[0] for texts in PHRASES.values() for text in texts}
        asked = [one.question for row in made for one in row.instructions]
        return sum(any(q.startswith(stem) for stem in stems) for q in asked) / len(asked)

    plain, half, all_ = rows(0.0), rows(0.5), rows(1.0)
    assert known(plain) == 1.0 and known(plain) > known(half) > known(all_)
    assert [r.labels for r in plain] == [r.labels for r in all_]
    for row in all_:
        for one in row.instructions:
            if one.task != "place" and one.form == "open":
                assert one.answer == true_answer(one.task, row.labels)


def test_every_kind_has_ten_phrases_and_held_out_ones():
    for task in TASK_WEIGHTS:
        assert len(phrases(task)) >= 10 and len(phrases(task, held_out=True)) == 3
        assert len(set(PHRASES[task])) == len(PHRASES[task])


def test_trials_ask_everything_that_can_be_asked():
    tasks = {(made.task, made.form) for made in all_instructions(labels(), 1, 0)}
    assert ("transcribe", "open") in tasks and ("place", "choice") in tasks
    assert not any(task == "melody" for task, _ in tasks)


def test_numbers_are_spelt():
    assert [number_to_words(n) for n in (0, 13, 20, 27)] == [
        "zero",
        "thirteen",
        "twenty",
        "twenty seven",
    ]


def test_kinds_that_an_utterance_does_not_allow_are_not_asked_or_are_told():
    either = AudioTexts(3, tasks=("sum", "gender"))
    asked = [made.task for i in range(200) for made in either[i].instructions]
    assert set(asked) == {"sum", "gender"}
    with pytest.raises(DataError, match="none of melody can be asked"):
        for i in range(50):
            AudioTexts(3, tasks=("melody",))[i]


def test_imitations_say_the_digits_in_order_at_any_pace():
    for pace in (0.0, 1.0):
        rows = AudioTexts(3, pace=pace)
        for index in range(30):
            row = rows[index]
            spoken = [
                a for a, b in zip(row.semantic, (BLANK, *row.semantic), strict=False) if a != b
            ]
            said = " ".join(word for word in spoken if word != BLANK)
            assert (said or "nothing") == transcript(row.labels)
            assert len(row.acoustic) in (0, 16)
            if row.acoustic:
                assert set(row.acoustic) - {BLANK} == set(acoustic_words(row.labels))


class TestTokenizer:
    def test_the_vocabulary_is_small(self, tokenizer):
        assert len(build_vocabulary()) < len(tokenizer) < 1000

    def test_the_corpus_is_made_of_whole_words(self, tokenizer):
        for stems in PHRASES.values():
            for stem in stems:
                words = stem.replace("{nth}", "third").split()
                pieces = tokenizer.tokenize(stem.replace("{nth}", "third"))
                assert sum(piece.startswith("▁") for piece in pieces) == len(words)
                assert all(len(piece) > 1 or piece in ",.?:" for piece in pieces), pieces

    def test_any_text_survives(self, tokenizer):
        for text in ("Où est gizmo42?", "seventy-seven 日本", "B. seven"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
            assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in tokenizer(text)

    def test_the_audio_goes_after_the_colon(self, tokenizer):
        """As in DIFFA: the open turn ends in a space, which merges with what follows."""
        chat = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "This is the audio: <audio>. How many digits?"},
        ]
        full = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        opened = full[: full.index("<audio>")]
        ids, before = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (full, opened))
        assert ids[: len(before) - 1] == before[:-1]
        assert tokenizer.convert_ids_to_tokens(ids[len(before) - 2 : len(before)]) == [
            ":",
            "▁<audio>",
        ]


@pytest.mark.fsdd
def test_an_utterance_is_planned_once_for_all_its_questions(monkeypatch):
    source, drawn = (
        open_source("nano", {"count": 40, "samples_per_utterance": 4, "synthetic_voices": False}),
        [],
    )
    scene = source._examples.utterances.scene

    def counted(index):
        drawn.append(index)
        return scene(index)

    monkeypatch.setattr(source._examples.utterances, "scene", counted)
    seconds = [source.seconds(index) for index in (*range(40), *range(40))]
    assert sorted(drawn) == list(range(10))
    assert seconds[:40] == seconds[40:] and len(set(seconds)) > 1
    assert all(len(set(seconds[i : i + 4])) == 1 for i in range(0, 40, 4))


def test_a_cut_rendering_is_not_kept(tmp_path, monkeypatch):
    def render(command, **_):
        file = Path(command[command.index("-w") + 1])
        file.write_bytes(b"RIFF" + (10_000).to_bytes(4, "little") + b"WAVE" + b"\0" * 100)

    monkeypatch.setattr(voices.subprocess, "run", render)
    voices._render.cache_clear()
    with pytest.raises(OSError, match=r"was cut at 112 bytes: is the disk full\?"):
        voices._render("espeak-ng", tmp_path, "en-us+f1@35", 3, 130)
    assert not list(tmp_path.iterdir())
