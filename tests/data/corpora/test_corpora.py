"""Published corpora are read from their folders, and their faults are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from diffa.data.corpora.readers import CORPORA, read_corpus
from diffa.data.samples import DataError
from diffa.data.synthesis.rows import clip_rows, sample_clips

RATE = 16_000


def tone(path: Path, seconds: float = 0.2, hertz: float = 200.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)
    soundfile.write(path, wave.astype(np.float32), RATE)
    return path


def text(path: Path, words: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words, "utf-8")
    return path


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    root = tmp_path / "LibriSpeech"
    text(root / "SPEAKERS.TXT", ";ID |SEX| SUBSET\n84   | F | dev-clean | 8.02 | Christie N\n")
    chapter = root / "dev-clean" / "84" / "121123"
    for name in ("84-121123-0000", "84-121123-0001"):
        tone(chapter / f"{name}.flac")
    said = "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n84-121123-0002 LOST\n"
    text(chapter / "84-121123.trans.txt", said)
    return tmp_path


@pytest.fixture
def vctk(tmp_path: Path) -> Path:
    root = tmp_path / "VCTK-Corpus-0.92"
    table = (
        "ID  AGE  GENDER  ACCENTS  REGION COMMENTS\np225  23  F    English    Southern  England\n"
    )
    text(root / "speaker-info.txt", f"{table}p293  22  F    NorthernIrish    Belfast\n")
    for speaker in ("p225", "p293"):
        for microphone in (1, 2):
            name = f"{speaker}_001_mic{microphone}.flac"
            tone(root / "wav48_silence_trimmed" / speaker / name)
        text(root / "txt" / speaker / f"{speaker}_001.txt", "Please call Stella.\n")
    tone(root / "wav48_silence_trimmed" / "p315" / "p315_001_mic1.flac")
    return tmp_path


@pytest.fixture
def iemocap(tmp_path: Path) -> Path:
    session = tmp_path / "IEMOCAP_full_release" / "Session1"
    talk = "Ses01F_impro01"
    for turn in ("F000", "M000"):
        tone(session / "sentences" / "wav" / talk / f"{talk}_{turn}.wav")
    lines = f"{talk}_F000 [006.2901-008.2357]: Excuse me.\n{talk}_M000 [007.0-009.1]: Yes.\n"
    text(session / "dialog" / "transcriptions" / f"{talk}.txt", f"{lines}M: (laughs)\n")
    rated = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    rated += f"[6.2901 - 8.2357]\t{talk}_F000\tang\t[2.5, 2.5, 2.5]\nC-E2:\tNeutral;\t()\n"
    rated += f"[7.0 - 9.1]\t{talk}_M000\txxx\t[2.5, 2.5, 2.5]\n"
    text(session / "dialog" / "EmoEvaluation" / f"{talk}.txt", rated)
    return tmp_path


@pytest.fixture
def dailytalk(tmp_path: Path) -> Path:
    root = tmp_path / "dailytalk"
    about = {"emotion": "happiness", "act": "question", "text": "What do you say?", "speaker": 0}
    plain = {"emotion": "no emotion", "act": "inform", "text": "No.", "speaker": 1}
    text(root / "metadata.json", json.dumps({"7": {"0": about, "1": plain}}))
    tone(root / "data" / "7" / "0_0_d7.wav")
    text(root / "data" / "7" / "0_0_d7.txt", "What do you say?")
    tone(root / "data" / "7" / "1_1_d7.wav")
    return root


@pytest.fixture
def voxceleb(tmp_path: Path) -> Path:
    head = "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\n"
    people = "id10001\tA.J._Buckley\tm\tIreland\tdev\nid10270\tEartha_Kitt\tf\tUSA\ttest\n"
    text(tmp_path / "vox1_meta.csv", head + people)
    tone(tmp_path / "vox1_dev_wav" / "wav" / "id10001" / "1zcIwhmdeo4" / "00001.wav")
    tone(tmp_path / "vox1_test_wav" / "wav" / "id10270" / "5r0dWxy17C8" / "00003.wav")
    return tmp_path


def test_librispeech_is_read_with_genders_and_parts(librispeech: Path) -> None:
    found = read_corpus("librispeech", librispeech)
    assert [clip.audio_id for clip in found.clips] == ["84-121123-0000", "84-121123-0001"]
    first = found.clips[0]
    assert (first.transcription, first.speaker, first.split) == (
        "GO DO YOU HEAR",
        "84",
        "dev-clean",
    )
    assert first.labels == {"gender": "female"}
    assert len(found.problems) == 1 and "84-121123-0002" in found.problems[0]


def test_a_part_is_named_whole_or_by_its_beginning(librispeech: Path) -> None:
    assert len(read_corpus("librispeech", librispeech, "dev").clips) == 2
    assert len(read_corpus("librispeech", librispeech, "dev-clean").clips) == 2
    with pytest.raises(DataError, match=r"no part 'test'.*dev-clean"):
        read_corpus("librispeech", librispeech, "test")


def test_vctk_takes_one_microphone_and_reports_lost_transcripts(vctk: Path) -> None:
    found = read_corpus("vctk", vctk)
    assert [clip.path.name for clip in found.clips] == ["p225_001_mic1.flac", "p293_001_mic1.flac"]
    assert found.clips[0].labels == {"age": "23", "gender": "female", "accent": "English"}
    assert found.clips[1].labels["accent"] == "Northern Irish"
    assert len(found.problems) == 1 and "p315" in found.problems[0]


def test_the_older_vctk_writes_speakers_without_their_letter(tmp_path: Path) -> None:
    text(
        tmp_path / "speaker-info.txt",
        "ID  AGE  GENDER  ACCENTS  REGION\n226  22  M  English  Surrey\n",
    )
    tone(tmp_path / "wav48" / "p226" / "p226_001.wav")
    text(tmp_path / "txt" / "p226" / "p226_001.txt", "Please call Stella.")
    (clip,) = read_corpus("vctk", tmp_path).clips
    assert clip.labels == {"age": "22", "gender": "male", "accent": "English"}


@pytest.mark.parametrize("below", ["", "accentdb_extended"])
def test_accentdb_gives_accents_without_transcripts(tmp_path: Path, below: str) -> None:
    tone(tmp_path / below / "data" / "telugu" / "speaker_02" / "telugu_s02_004.wav")
    (clip,) = read_corpus("accentdb", tmp_path).clips
    assert (clip.labels, clip.speaker, clip.transcription) == (
        {"accent": "Telugu"},
        "telugu-02",
        "",
    )


def test_iemocap_gives_emotions_on_which_raters_agree(iemocap: Path) -> None:
    first, second = read_corpus("iemocap", iemocap).clips
    assert first.transcription == "Excuse me."
    assert first.labels == {"gender": "female", "emotion": "angry"}
    assert second.labels == {"gender": "male"}
    assert (first.speaker, second.speaker, first.split) == ("Ses01F", "Ses01M", "Session1")


def test_dailytalk_gives_intents_and_emotions(dailytalk: Path) -> None:
    first, second = read_corpus("dailytalk", dailytalk).clips
    assert first.labels == {"emotion": "happiness", "intent": "question"}
    assert (second.labels, second.transcription) == (
        {"emotion": "neutral", "intent": "inform"},
        "No.",
    )


def test_voxceleb_gives_official_parts(voxceleb: Path) -> None:
    found = read_corpus("voxceleb1", voxceleb)
    assert {clip.split for clip in found.clips} == {"dev", "test"}
    (test,) = read_corpus("voxceleb1", voxceleb, "test").clips
    assert test.labels == {"gender": "female"}  # a nationality is not an accent
    assert "accent" not in CORPORA["voxceleb1"].labels
    assert test.audio_id == "id10270-5r0dWxy17C8-00003"


def test_fsdd_splits_officially(tmp_path: Path) -> None:
    for name in ("7_theo_4", "7_theo_5"):
        tone(tmp_path / "recordings" / f"{name}.wav")
    tone(tmp_path / "recordings" / "a_b_c.wav")
    found = read_corpus("fsdd", tmp_path)
    assert [(clip.split, clip.transcription) for clip in found.clips] == [
        ("test", "seven"),
        ("train", "seven"),
    ]
    assert len(found.problems) == 1


@pytest.mark.parametrize("name", CORPORA)
def test_an_empty_folder_says_what_was_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="whose layout is"):
        read_corpus(name, tmp_path)


def test_unknown_corpora_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'vctk'"):
        read_corpus("vctkk", tmp_path)
    with pytest.raises(DataError, match="no folder"):
        read_corpus("vctk", tmp_path / "nowhere")


def test_a_broken_recording_is_left_out_and_told(librispeech: Path) -> None:
    broken = next(librispeech.rglob("*0001.flac"))
    broken.write_bytes(b"not audio at all")
    faults: list[str] = []
    rows = list(clip_rows(read_corpus("librispeech", librispeech).clips, faults))
    assert [row["audio_id"] for row in rows] == ["84-121123-0000"]
    assert len(faults) == 1 and broken.name in faults[0]


@pytest.mark.slow
def test_several_processes_give_the_rows_of_one(vctk: Path) -> None:
    clips = read_corpus("vctk", vctk).clips
    assert list(clip_rows(clips, [], workers=2)) == list(clip_rows(clips, []))


def test_a_row_asks_for_a_transcript_and_carries_the_bracketed_line(vctk: Path) -> None:
    (row, _) = clip_rows(read_corpus("vctk", vctk).clips, [])
    assert (row["input"], row["target"]) == (
        "Please transcribe the audio to text.",
        "Please call Stella.",
    )
    assert row["seed_transcript"] == (
        '[00:00 - 00:01]: "Please call Stella." (Gender: female, Age: 23, Accent: English, '
        "Pitch: medium, Volume: normal, Duration: 1s)"
    )


def test_instructions_follow_from_the_clip_alone(vctk: Path) -> None:
    clips = read_corpus("vctk", vctk).clips
    several = [f"Write it down, way {number}." for number in range(25)]
    again = [clip._replace(labels={}) for clip in read_corpus("vctk", vctk).clips[1:]]
    both = [row["input"] for row in clip_rows(clips, [], instructions=several)]
    alone = [row["input"] for row in clip_rows(again, [], instructions=several)]
    assert both[1:] == alone and set(both) <= set(several)
    many = [clip._replace(audio_id=str(n)) for n in range(60) for clip in clips[:1]]
    asked = {row["input"] for row in clip_rows(many, [], instructions=several, measured=False)}
    assert len(asked) > 15


def test_a_draw_of_clips_does_not_depend_on_their_order(vctk: Path) -> None:
    clips = read_corpus("vctk", vctk).clips
    assert sample_clips(clips, 1, seed=3) == sample_clips(clips[::-1], 1, seed=3)
    assert len(sample_clips(clips, 5)) == 2
