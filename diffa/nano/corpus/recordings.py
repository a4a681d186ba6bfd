"""Real spoken digits: the Free Spoken Digit Dataset, read once at 16 kHz."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from diffa.audio import read
from diffa.data.corpora.fsdd import ACCENTS, TEST_INDICES
from diffa.errors import AudioError
from diffa.nano.corpus.shaping import RATE, Wave, resample, trim

Split = Literal["train", "test"]
Gender = Literal["man", "woman"]


class Voice(NamedTuple):
    """One speaker: a person of the recordings, or a setting of the synthesiser."""

    name: str
    gender: Gender
    accent: str
    real: bool


def fsdd_folder(path: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of recordings: ``path`` or $DIFFA_FSDD; raises AudioError without any."""
    place = path or os.environ.get("DIFFA_FSDD")
    for folder in (Path(place), Path(place) / "recordings") if place else ():
        if next(folder.glob("*_*_*.wav"), None):
            return folder
    where = f"there are none in {place}" if place else "no folder is named"
    raise AudioError(
        f"recordings {{digit}}_{{speaker}}_{{index}}.wav are needed, and {where}: clone "
        "github.com/Jakobovski/free-spoken-digit-dataset and name its folder, as DIFFA_FSDD in the "
        "environment or with the option fsdd (--fsdd)"
    )


class Recordings:
    """Spoken digits of real people, by speaker and digit, resampled when first used."""

    def __init__(self, folder: Path, split: Split, exclude_speakers: tuple[str, ...] = ()) -> None:
        self.files: dict[tuple[str, int], list[Path]] = {}
        for path in sorted(folder.glob("*_*_*.wav")):
            digit, speaker, index = path.stem.split("_")
            if speaker not in exclude_speakers and (int(index) in TEST_INDICES) == (
                split == "test"
            ):
                self.files.setdefault((speaker, int(digit)), []).append(path)
        names = sorted({speaker for speaker, _ in self.files})
        self.voices = [Voice(name, "man", ACCENTS.get(name, "american"), True) for name in names]
        if not names:
            raise AudioError(
                f"{folder} holds no {split} recordings besides those left out: {exclude_speakers}"
            )

    def take(self, voice: Voice, digit: int, fraction: float) -> Wave:
        """Return a recording of ``digit``; ``fraction`` in [0, 1) chooses which."""
        files = self.files[voice.name, digit]
        return _read(files[int(fraction * len(files))])


@lru_cache(maxsize=4096)
def _read(path: Path) -> Wave:
    wave, rate = read(path)
    return trim(resample(wave.numpy(), rate, RATE))
