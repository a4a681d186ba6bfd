"""Corpora of acted, conversational and found speech: IEMOCAP, DailyTalk and VoxCeleb1."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffa.data.corpora.clips import Clip, clean_labels, find_file, read_table, subfolder
from diffa.runtime.text import parse_json

EMOTIONS = {
    "neu": "neutral",
    "hap": "happy",
    "exc": "excited",
    "sad": "sad",
    "ang": "angry",
    "fru": "frustrated",
    "fea": "fearful",
    "sur": "surprised",
    "dis": "disgusted",
}
"""IEMOCAP's codes; ``xxx`` (raters disagree) and ``oth`` say nothing and are left out."""

_TRANSCRIPT = re.compile(r"^(\S+)\s+\[[\d.]+-[\d.]+\]:\s*(.*)$")
_RATED = re.compile(r"^\[[\d.]+ - [\d.]+\]\t(\S+)\t(\w+)\t", re.MULTILINE)


def iemocap(root: Path, problems: list[str]) -> Iterator[Clip]:
    """``Session1/sentences/wav/DIALOG/DIALOG_F000.wav`` with transcriptions and EmoEvaluation."""
    sessions = sorted(p for p in root.rglob("Session[1-5]") if (p / "sentences" / "wav").is_dir())
    for session in [root] if root.name.startswith("Session") else sessions:
        for folder in sorted((session / "sentences" / "wav").iterdir()):
            if not folder.is_dir() or folder.name.startswith("."):
                continue
            about = session / "dialog"
            transcripts = _iemocap_transcripts(
                about / "transcriptions" / f"{folder.name}.txt", problems
            )
            emotions = _iemocap_emotions(about / "EmoEvaluation" / f"{folder.name}.txt", problems)
            for path in sorted(folder.glob("Ses*.wav")):
                if path.stem not in transcripts:
                    problems.append(f"{path} has no transcript")
                    continue
                yield _iemocap_clip(
                    path, session.name, transcripts[path.stem], emotions.get(path.stem, "")
                )


def _iemocap_clip(path: Path, session: str, transcript: str, emotion: str) -> Clip:
    """Ses01F_impro01_M003: session 1, whose speaker of this turn is its man."""
    gender = path.stem.rpartition("_")[2][:1]
    labels = clean_labels({"gender": gender, "emotion": EMOTIONS.get(emotion, "")})
    return Clip(path, path.stem, "IEMOCAP", transcript, f"{path.stem[:5]}{gender}", session, labels)


def _iemocap_transcripts(table: Path, problems: list[str]) -> dict[str, str]:
    if not table.is_file():
        problems.append(f"{table} is missing")
        return {}
    matches = (_TRANSCRIPT.match(line) for line in read_table(table).splitlines())
    return {match[1]: match[2].strip() for match in matches if match}


def _iemocap_emotions(table: Path, problems: list[str]) -> dict[str, str]:
    if not table.is_file():
        problems.append(f"{table} is missing")
        return {}
    return dict(_RATED.findall(read_table(table)))


def dailytalk(root: Path, problems: list[str]) -> Iterator[Clip]:
    """``data/DIALOG/TURN_SPEAKER_dDIALOG.wav`` beside ``.txt``, and metadata.json."""
    dialogs = _dailytalk_table(root, problems)
    folder = subfolder(
        next((p.parent for p in [find_file(root, "metadata.json")] if p), root), "data"
    )
    for path in sorted(folder.glob("*/*_d*.wav")):
        turn, speaker, dialog = path.stem.split("_")[:3]
        about = dialogs.get(dialog.removeprefix("d"), {}).get(turn, {})
        text_file = path.with_suffix(".txt")
        transcript = (
            read_table(text_file).strip() if text_file.is_file() else str(about.get("text", ""))
        )
        if not transcript:
            problems.append(f"{path} has no transcript")
            continue
        emotion = str(about.get("emotion", ""))
        labels = clean_labels(
            {
                "emotion": "neutral" if emotion == "no emotion" else emotion,
                "intent": str(about.get("act", "")),
            }
        )
        yield Clip(path, path.stem, "DailyTalk", transcript, speaker, "", labels)


def _dailytalk_table(root: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    table = find_file(root, "metadata.json")
    if table is None:
        problems.append(f"{root} has no metadata.json: emotions and intents are unknown")
        return {}
    try:
        dialogs = parse_json(read_table(table))
    except ValueError as error:
        problems.append(f"{table} is broken JSON ({error}): emotions and intents are unknown")
        return {}
    return dialogs if isinstance(dialogs, dict) else {}


def voxceleb1(root: Path, problems: list[str]) -> Iterator[Clip]:
    """``[vox1_dev_wav/]wav/id10001/VIDEO/00001.wav`` and vox1_meta.csv; no transcripts."""
    table = find_file(root, "vox1_meta.csv")
    if table is None:
        problems.append(f"{root} has no vox1_meta.csv: genders, nationalities and parts unknown")
    people = _voxceleb_people(table) if table else {}
    for path in sorted(root.rglob("id1*/*/*.wav")):
        speaker, video = path.parents[1].name, path.parent.name
        about = people.get(speaker, {})
        # The table's nationality is not an accent.
        labels = clean_labels({"gender": about.get("Gender", "")})
        name, part = f"{speaker}-{video}-{path.stem}", about.get("Set", "")
        yield Clip(path, name, "VoxCeleb1", "", speaker, part, labels)


def _voxceleb_people(table: Path) -> dict[str, dict[str, str]]:
    rows = csv.DictReader(read_table(table).splitlines(), delimiter="\t")
    clean = ({k.strip(): (v or "").strip() for k, v in row.items() if k} for row in rows)
    return {row.get("VoxCeleb1 ID", ""): row for row in clean}
