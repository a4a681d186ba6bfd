"""Recordings of corpora without transcripts are transcribed by a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

import diffa
from diffa.cli import app
from diffa.data.corpora.readers import read_corpus
from diffa.data.formats import read_rows
from diffa.data.samples import DataError
from diffa.data.synthesis.rows import DESCRIBE, TRANSCRIBE, clip_rows
from diffa.data.synthesis.transcribers import DiffusionTranscriber, SpeechRecognizer

DIGITS = Path(str(files("diffa") / "assets" / "recordings" / "digits.flac"))


class Echo:
    """Says the name of each file, and counts what it was asked for."""

    name = "echo"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def transcribe(self, paths: Sequence[Path]) -> list[str]:
        self.batches.append(len(paths))
        return [path.stem for path in paths]


@pytest.fixture
def accentdb(tmp_path: Path) -> Path:
    """Two recordings of AccentDB, which has no transcripts: spoken digits and a broken file."""
    folder = tmp_path / "AccentDB" / "data" / "telugu" / "speaker_02"
    folder.mkdir(parents=True)
    wave, rate = soundfile.read(DIGITS)
    soundfile.write(folder / "telugu_s02_004.wav", wave, rate)
    (folder / "telugu_s02_005.wav").write_bytes(b"no audio")
    return tmp_path / "AccentDB"


def test_a_clip_without_a_transcript_is_transcribed_and_says_by_whom(accentdb: Path) -> None:
    faults: list[str] = []
    clips = read_corpus("accentdb", accentdb).clips
    (row,) = clip_rows(clips, faults, transcriber=Echo())
    assert row["transcription"] == row["attributes"]["text"] == "telugu_s02_004"
    assert '"telugu_s02_004" (Accent: Telugu' in row["seed_transcript"]
    assert row["transcribed_by"] == "echo"
    # A machine's transcript describes the recording; it is not an answer to learn.
    assert (row["input"], row["target"]) == (DESCRIBE, "")
    assert len(faults) == 1 and "005" in faults[0]


def test_a_published_transcript_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    soundfile.write(folder / "7_theo_5.wav", np.zeros(8000) + 0.1, 8000)
    echo = Echo()
    (row,) = clip_rows(read_corpus("fsdd", tmp_path).clips, [], transcriber=echo)
    assert (row["transcription"], row["input"], echo.batches) == ("seven", TRANSCRIBE, [])
    assert "transcribed_by" not in row


def test_recordings_are_transcribed_in_batches_and_stay_in_order(accentdb: Path) -> None:
    (clip, _) = read_corpus("accentdb", accentdb).clips
    clips = [clip._replace(audio_id=str(number)) for number in range(35)]
    echo = Echo()
    rows = list(clip_rows(clips, [], measured=False, transcriber=echo))
    assert [row["audio_id"] for row in rows] == [str(number) for number in range(35)]
    assert echo.batches == [16, 16, 3]


def test_a_recording_in_which_nothing_is_said_has_no_text(accentdb: Path) -> None:
    class Silent(Echo):
        def transcribe(self, paths: Sequence[Path]) -> list[str]:
            return ["" for _ in paths]

    (row,) = clip_rows(read_corpus("accentdb", accentdb).clips, [], transcriber=Silent())
    assert row["transcription"] == "" and "text" not in row["attributes"]
    assert "transcribed_by" not in row and '"' not in row["seed_transcript"]


def test_the_command_transcribes_with_a_spec(accentdb: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["data", "manifest", "accentdb", str(accentdb), "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--transcriber", "nano"])
    assert done.exit_code == 0, done.output
    (row,) = read_rows(out)[0]
    expected = diffa.build("nano").answer(DIGITS, TRANSCRIBE).text
    assert row["transcription"] == expected != ""
    assert row["transcribed_by"].startswith("spec:")
    assert "1 of 1 rows transcribed" in done.output


def test_several_recordings_are_transcribed_as_each_alone() -> None:
    transcriber = DiffusionTranscriber(diffa.build("nano"))
    other = DIGITS.with_name("two_speakers.flac")
    alone = [transcriber.transcribe([path])[0] for path in (DIGITS, other)]
    assert transcriber.transcribe([DIGITS, other]) == alone


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny wav2vec 2.0 with random weights and a character tokenizer."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
    )

    folder = tmp_path_factory.mktemp("wav2vec2")
    symbols = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefgh"]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    config = Wav2Vec2Config(
        vocab_size=len(symbols), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(5, 64),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


def test_a_speech_recogniser_of_transformers_transcribes_in_order(recognizer: Path) -> None:
    transcriber = SpeechRecognizer(str(recognizer))
    paths = [DIGITS, DIGITS.with_name("melody.flac"), DIGITS]
    first, _, third = transcriber.transcribe(paths)
    assert first == third and isinstance(first, str)
    assert transcriber.name == str(recognizer)


def test_what_is_neither_a_spec_nor_a_recogniser_is_refused(accentdb: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no speech recogniser that loads"):
        SpeechRecognizer(str(tmp_path / "empty"))
    words = ["data", "manifest", "accentdb", str(accentdb), "--out", str(tmp_path / "rows.jsonl")]
    done = CliRunner().invoke(app, [*words, "--transcriber", "nanoo"])
    assert done.exit_code != 0 and not (tmp_path / "rows.jsonl").exists()
