"""The corpora that diffa reads, by name, from their published folders."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from diffa.data.corpora.clips import Clip, ClipReader
from diffa.data.corpora.conversational import dailytalk, iemocap, voxceleb1
from diffa.data.corpora.read_speech import accentdb, fsdd, librispeech, vctk
from diffa.data.samples import DataError
from diffa.errors import suggest
from diffa.runtime.files import expand


class Corpus(NamedTuple):
    """A corpus' title, the attributes its labels give, the file to look for, and its reader."""

    title: str
    labels: tuple[str, ...]
    layout: str
    read: ClipReader


class CorpusClips(NamedTuple):
    """Clips of a corpus, sorted by their files' names, and what is wrong with the folder."""

    clips: list[Clip]
    problems: list[str]


CORPORA: dict[str, Corpus] = {
    "librispeech": Corpus(
        "LibriSpeech", ("gender", "text"),
        "SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac, *.trans.txt, SPEAKERS.TXT",
        librispeech,
    ),
    "vctk": Corpus(
        "VCTK", ("gender", "age", "accent", "text"),
        "wav48_silence_trimmed/p225/p225_001_mic1.flac, txt/p225/p225_001.txt, speaker-info.txt",
        vctk,
    ),
    "accentdb": Corpus(
        "AccentDB", ("accent",), "data/ACCENT/speaker_01/ACCENT_s01_001.wav", accentdb
    ),
    "iemocap": Corpus(
        "IEMOCAP", ("gender", "emotion", "text"),
        "Session1/sentences/wav/*/*.wav, Session1/dialog/transcriptions, .../EmoEvaluation",
        iemocap,
    ),
    "dailytalk": Corpus(
        "DailyTalk", ("emotion", "intent", "text"),
        "data/DIALOG/TURN_SPEAKER_dDIALOG.wav, metadata.json", dailytalk,
    ),
    "voxceleb1": Corpus(
        "VoxCeleb1", ("gender",), "wav/id10001/VIDEO/00001.wav, vox1_meta.csv", voxceleb1
    ),
    "fsdd": Corpus(
        "FSDD", ("gender", "accent", "text"), "recordings/DIGIT_SPEAKER_INDEX.wav", fsdd
    ),
}  # fmt: skip


def read_corpus(name: str, root: str | Path, split: str = "") -> CorpusClips:
    """Read a corpus from the folder it was published as.

    Args:
        name: a key of ``CORPORA``.
        root: the folder that it was unpacked to.
        split: keep this part of it: its name, or what its name begins with before a dash.

    Raises:
        DataError: an unknown corpus, no such folder, nothing of the layout in it, or no such part.
    """
    if name not in CORPORA:
        raise DataError(f"there is no reader for {name!r}{suggest(name, CORPORA)}")
    folder = expand(root)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    problems: list[str] = []
    clips = list(CORPORA[name].read(folder, problems))
    if not clips:
        reasons = "".join(f"\n  {problem}" for problem in problems[:5])
        raise DataError(
            f"{folder} holds nothing of {CORPORA[name].title}, whose layout is "
            f"{CORPORA[name].layout}{reasons}"
        )
    if not split:
        return CorpusClips(clips, problems)
    selected = [clip for clip in clips if clip.split == split or clip.split.startswith(f"{split}-")]
    if not selected:
        parts = sorted({clip.split for clip in clips} - {""})
        raise DataError(f"{folder} has no part {split!r}{suggest(split, parts)}")
    return CorpusClips(selected, problems)
