"""Synthetic spoken digits: espeak-ng in many voices, rendered once into a folder."""

import logging
import os
import shutil
import subprocess
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

from diffa.audio import read
from diffa.data.corpora.fsdd import DIGIT_WORDS
from diffa.nano.corpus.recordings import Gender, Split, Voice
from diffa.nano.corpus.shaping import RATE, Wave, resample, trim
from diffa.runtime.files import atomic_write, remove_stale_drafts

LANGUAGES = {
    "american": "en-us",
    "british": "en-gb",
    "scottish": "en-gb-scotland",
    "caribbean": "en-029",
}
# How each accent says the digits 0-9, up to what can be told apart (espeak-ng's own phonemes).
PRONUNCIATIONS = {
    "american": ("ou", "V", "u", "thr", "or", "ai", "i", "E", "ei", "ai"),
    "british": ("Eu", "O", "u", "thr", "o:", "ai", "i", "E", "ei", "ai"),
    "scottish": ("o:", "V", "U", "thR", "oR", "ai", "i", "E", "e:", "ai"),
    "caribbean": ("ou", "O", "u", "tr", "oa", "ai", "i", "E", "ei", "ai"),
}
VARIANTS: dict[Gender, tuple[str, ...]] = {
    "woman": ("f1", "f2", "f3", "f4"),
    "man": ("m1", "m3", "m4", "m7"),
}
# Voices are tried out with pitches and rates between those of training.
PITCHES: dict[Split, tuple[int, ...]] = {"train": (35, 50, 65), "test": (42, 58)}
RATES: dict[Split, tuple[int, ...]] = {"train": (130, 165), "test": (145,)}


def accent_is_audible(accent: str, digits: tuple[int, ...]) -> bool:
    """Return whether these digits tell a synthetic accent from every other."""
    own = [PRONUNCIATIONS[accent][digit] for digit in digits]
    others = (table for name, table in PRONUNCIATIONS.items() if name != accent)
    return all(own != [table[digit] for digit in digits] for table in others)


def cache_folder() -> Path:
    """Return the folder of rendered digits, in $DIFFA_CACHE or ~/.cache/diffa."""
    return Path(os.environ.get("DIFFA_CACHE", Path.home() / ".cache" / "diffa")) / "espeak"


class EspeakVoices:
    """Spoken digits of espeak-ng; without the program there are no voices: a warning says so."""

    def __init__(self, split: Split, folder: Path | None = None) -> None:
        self.program = shutil.which("espeak-ng")
        self.folder = folder or cache_folder()
        remove_stale_drafts(self.folder)
        self.rates = RATES[split]
        self.voices = [
            Voice(f"{language}+{variant}@{pitch}", gender, accent, False)
            for (accent, language), gender in product(LANGUAGES.items(), VARIANTS)
            for variant, pitch in product(VARIANTS[gender], PITCHES[split])
            if self.program
        ]
        if not self.program:
            _warn()

    def take(self, voice: Voice, digit: int, fraction: float) -> Wave:
        """Return a rendering of ``digit``; ``fraction`` in [0, 1) chooses the rate."""
        rate = self.rates[int(fraction * len(self.rates))]
        return _render(str(self.program), self.folder, voice.name, digit, rate)


@cache
def _warn() -> None:
    """Warn once that the corpus without espeak-ng is another one, of men only."""
    logging.getLogger(__name__).warning(
        "espeak-ng is not installed: the nano corpus has the recorded speakers alone, no women and "
        "hardly an accent. To have all voices: apt-get install espeak-ng"
    )


def check_complete(path: Path) -> None:
    """Raise OSError if a WAV file is shorter than its header says."""
    head = path.read_bytes()[:8]
    size = path.stat().st_size
    if len(head) < 8 or int.from_bytes(head[4:], "little") + 8 > size:
        raise OSError(f"{path.name} was cut at {size} bytes: is the disk full?")


@lru_cache(maxsize=8192)
def _render(program: str, folder: Path, name: str, digit: int, rate: int) -> Wave:
    path = folder / f"{name}-{rate}-{digit}.wav"
    if not path.exists():
        voice, pitch = name.split("@")
        with atomic_write(path) as file:
            options = ["-v", voice, "-p", pitch, "-s", str(rate), "-w", str(file)]
            subprocess.run([program, *options, DIGIT_WORDS[digit]], check=True, capture_output=True)
            check_complete(file)  # espeak-ng ends well on a full disk
    wave, found_rate = read(path)
    return trim(resample(wave.numpy(), found_rate, RATE))
