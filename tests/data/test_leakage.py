"""What splits share is found: ids, samples, sounds, speakers, texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from diffa.data.leakage import LeakReport, compare_splits, find_duplicates, fingerprint

RATE = 16_000


def speech(seed: int) -> np.ndarray:
    """Something that changes over time as speech does, another for every seed."""
    draw = np.random.default_rng(seed)
    pieces = []
    for _ in range(6):
        phase = np.arange(2400) * draw.uniform(90, 250) / RATE
        formants = [np.sin(2 * np.pi * k * phase) * draw.uniform(0, 1) for k in range(1, 12)]
        pieces.append(sum(formants) * np.hanning(2400) * draw.uniform(0.02, 0.06))
    return np.concatenate(pieces).astype(np.float32)


def row(path: Path, name: str, **fields: Any) -> dict[str, Any]:
    return {"audio_id": name, "audio_filepath": str(path), "input": "?", "target": "x"} | fields


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.wav" for number in range(4)]
    for number, path in enumerate(paths):
        soundfile.write(path, speech(number), RATE, subtype="PCM_16")
    return paths


def kinds(found: LeakReport) -> list[str]:
    return sorted(one.kind for one in found.shared)


def test_splits_that_share_nothing_are_clean(clips: list[Path]) -> None:
    left, right = [row(clips[0], "a")], [row(clips[1], "b")]
    assert compare_splits(left, right, near=True).shared == []


def test_the_same_samples_are_found_under_another_name_and_format(
    clips: list[Path], tmp_path: Path
) -> None:
    wave, _ = soundfile.read(clips[0], dtype="int16")
    soundfile.write(tmp_path / "copy.flac", wave, RATE)
    found = compare_splits(
        [row(clips[1], "a"), row(clips[0], "b")], [row(tmp_path / "copy.flac", "c")]
    )
    assert kinds(found) == ["audio"]
    assert (found.shared[0].left, found.shared[0].right) == ((2,), (1,))


@pytest.mark.parametrize("change", ["level", "rate", "mp3", "ogg"])
def test_a_copy_at_another_level_rate_or_coding_sounds_the_same(
    clips: list[Path], tmp_path: Path, change: str
) -> None:
    import torch

    from diffa.audio import resample

    wave = speech(0)
    path = tmp_path / f"copy.{change if change in ('mp3', 'ogg') else 'wav'}"
    if change == "rate":
        soundfile.write(path, resample(torch.from_numpy(wave), RATE, 22_050).numpy(), 22_050)
    else:
        soundfile.write(path, wave * (0.3 if change == "level" else 1), RATE)
    left, right = [row(clips[0], "a")], [row(path, "b")]
    assert kinds(compare_splits(left, right)) == []
    assert kinds(compare_splits(left, right, near=True)) == ["sound"]


def test_fingerprints_tell_recordings_apart(clips: list[Path]) -> None:
    prints = np.stack([fingerprint(path) for path in clips])
    alike = prints @ prints.T - np.eye(len(clips))
    assert alike.max() < 0.97


def test_speakers_and_texts_are_compared(clips: list[Path]) -> None:
    said = "Please call Stella, now."
    left = [row(clips[0], "a", speaker="anna", dataset="x", transcription=said)]
    right = [row(clips[1], "b", speaker="anna", dataset="x", transcription=said.upper()[:-1])]
    assert kinds(compare_splits(left, right)) == ["question", "speaker", "text"]
    assert kinds(compare_splits(left, [right[0] | {"dataset": "y", "input": "who?"}])) == ["text"]


def test_an_id_belongs_to_its_dataset(clips: list[Path]) -> None:
    left = row(clips[0], "1_theo_0", dataset="FSDD")
    assert kinds(compare_splits([left], [row(clips[1], "1_theo_0", dataset="FSDD")])) == ["id"]
    assert kinds(compare_splits([left], [row(clips[1], "1_theo_0", dataset="other")])) == []


def test_a_few_words_are_no_shared_text(clips: list[Path]) -> None:
    left, right = (row(clips[n], str(n), transcription="yes") for n in (0, 1))
    assert compare_splits([left], [right]).shared == []


def test_what_cannot_be_compared_is_said(clips: list[Path], tmp_path: Path) -> None:
    found = compare_splits([row(clips[0], "a")], [row(tmp_path / "gone.wav", "b")])
    assert any("speakers were not compared" in note for note in found.notes)
    assert any("gone.wav" in note for note in found.notes)


def test_one_split_is_searched_for_what_it_holds_twice(clips: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "again.wav"
    copy.write_bytes(clips[0].read_bytes())
    rows = [
        row(clips[0], "a"),
        row(clips[1], "b"),
        row(clips[1], "b", input="another question"),
        row(copy, "c", input="x"),
        row(clips[2], "a"),
        row(clips[0], "d"),
    ]
    found = {one.kind: (one.left, one.right) for one in find_duplicates(rows).shared}
    assert found == {"id": ((1,), (5,)), "question": ((1,), (6,)), "audio": ((1,), (4, 6))}
