"""Make the demo's recordings: python benchmarks/recordings.py (needs espeak-ng)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

import diffa
from diffa.nano.corpus.scenes import Scene
from diffa.nano.corpus.shaping import RATE
from diffa.nano.corpus.sounds import Melody
from diffa.nano.corpus.utterances import Utterances

FOLDER = Path(diffa.__file__).parent / "assets" / "recordings"


def main() -> None:
    """Write three recordings; no file of a corpus goes into them."""
    speakers = Utterances("test", seed=2026)

    def voice(accent: str, gender: str, number: int):
        found = [v for v in speakers.espeak.voices if (v.accent, v.gender) == (accent, gender)]
        return found[number]

    one, two = voice("british", "woman", 2), voice("american", "man", 5)
    scenes = {
        "digits": Scene((7, 3, 9, 1), (one,) * 4, "medium", "normal", None, None),
        "two_speakers": Scene((4, 8, 2, 5, 6), (one,) * 2 + (two,) * 3, "fast", "loud", None, None),
        "melody": Scene((), (), None, "normal", "melody", Melody("rising", 5)),
    }
    FOLDER.mkdir(exist_ok=True)
    for number, (name, scene) in enumerate(scenes.items()):
        wave, labels = speakers.render(scene, np.random.default_rng(number))
        soundfile.write(FOLDER / f"{name}.flac", wave, RATE)
        print(f"{name}.flac: {labels.duration:.1f} s, {labels.digits}, {labels.speed}")


if __name__ == "__main__":
    main()
