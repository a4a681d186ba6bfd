"""Corpora of read speech: LibriSpeech, VCTK, AccentDB and the Free Spoken Digit Dataset."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from diffa.data.corpora.clips import Clip, clean_labels, find_file, read_table, subfolder
from diffa.data.corpora.fsdd import ACCENTS, DIGIT_WORDS, TEST_INDICES


def librispeech(root: Path, problems: list[str]) -> Iterator[Clip]:
    """``SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac`` beside ``*.trans.txt`` (SLR12)."""
    speakers = _librispeech_speakers(root)
    for table in sorted(root.rglob("*-*.trans.txt")):
        lines = [line.partition(" ") for line in read_table(table).splitlines() if line.strip()]
        transcripts = {name: text.strip() for name, _, text in lines}
        files = {path.stem: path for path in sorted(table.parent.glob("*.flac"))}
        problems += [
            f"{table}: there is no recording {name}" for name in transcripts if name not in files
        ]
        problems += [
            f"{files[name]} has no transcript" for name in files if name not in transcripts
        ]
        speaker, subset = table.parent.parent.name, table.parents[2].name
        for name in sorted(files.keys() & transcripts.keys()):
            labels = clean_labels({"gender": speakers.get(speaker, "")})
            yield Clip(files[name], name, "LibriSpeech", transcripts[name], speaker, subset, labels)


def _librispeech_speakers(root: Path) -> dict[str, str]:
    """Read SPEAKERS.TXT (``ID | SEX | SUBSET | MINUTES | NAME``): gender by speaker."""
    table = find_file(root, "SPEAKERS.TXT")
    rows = read_table(table).splitlines() if table else []
    cells = [[cell.strip() for cell in row.split("|")] for row in rows if not row.startswith(";")]
    return {row[0]: row[1] for row in cells if len(row) > 1}


def vctk(root: Path, problems: list[str]) -> Iterator[Clip]:
    """VCTK 0.92 (``wav48_silence_trimmed/p225/p225_001_mic1.flac``) or 0.80 (``wav48``).

    Where both microphones recorded an utterance, the first is taken.
    """
    top = next((path.parent for path in _named(root, "wav48*")), root)
    people = _vctk_speakers(top / "speaker-info.txt")
    names: set[str] = set()
    for path in sorted(path for path in top.glob("wav48*/*/*") if path.suffix in (".flac", ".wav")):
        name, speaker = re.sub(r"_mic\d$", "", path.stem), path.parent.name
        if name in names:
            continue
        names.add(name)
        transcript = top / "txt" / speaker / f"{name}.txt"
        if not transcript.is_file():  # p315's are lost
            problems.append(f"{path} has no transcript {transcript.name}")
            continue
        text, labels = read_table(transcript).strip(), people.get(speaker, {})
        yield Clip(path, name, "VCTK", text, speaker, "", labels)


def _named(root: Path, pattern: str) -> list[Path]:
    """Folders of this name in ``root`` or one below it."""
    return sorted(p for way in (pattern, f"*/{pattern}") for p in root.glob(way) if p.is_dir())


def _vctk_speakers(table: Path) -> dict[str, dict[str, str]]:
    """Read speaker-info.txt (``ID AGE GENDER ACCENTS REGION``); 0.80 writes IDs without the p."""
    people: dict[str, dict[str, str]] = {}
    for row in read_table(table).splitlines()[1:] if table.is_file() else ():
        cells = row.split()
        if len(cells) < 4:
            continue
        name = f"p{cells[0]}" if cells[0].isdigit() else cells[0]
        age = cells[1] if cells[1].isdigit() else ""
        accent = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cells[3])  # NorthernIrish
        people[name] = clean_labels({"age": age, "gender": cells[2], "accent": accent})
    return people


def accentdb(root: Path, problems: list[str]) -> Iterator[Clip]:
    """``data/ACCENT/speaker_01/ACCENT_s01_001.wav`` (core and extended; no transcripts)."""
    top = next((path for path in _named(root, "data")), root)
    for path in sorted(top.glob("*/speaker_*/*.wav")):
        accent, speaker = path.parents[1].name, path.parent.name.removeprefix("speaker_")
        labels = clean_labels({"accent": accent.capitalize()})
        yield Clip(path, path.stem, "AccentDB", "", f"{accent}-{speaker}", "", labels)


def fsdd(root: Path, problems: list[str]) -> Iterator[Clip]:
    """``recordings/DIGIT_SPEAKER_INDEX.wav``; indices 0 to 4 are the test set, all men."""
    for path in sorted(subfolder(root, "recordings").glob("*_*_*.wav")):
        digit, speaker, index = path.stem.split("_")
        if not (digit.isdigit() and int(digit) < 10 and index.isdigit()):
            problems.append(f"{path} is not named DIGIT_SPEAKER_INDEX.wav")
            continue
        split = "test" if int(index) in TEST_INDICES else "train"
        labels = clean_labels({"gender": "male", "accent": ACCENTS.get(speaker, "").capitalize()})
        yield Clip(path, path.stem, "FSDD", DIGIT_WORDS[int(digit)], speaker, split, labels)
