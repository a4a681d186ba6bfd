"""Pitch, volume and speaking rate are measured as they were made."""

from __future__ import annotations

import numpy as np
import pytest

from diffa.data.synthesis.attributes import Bands, describe_attributes, seed_transcript
from diffa.data.synthesis.measures import RATE, Measures, measure_speech
from diffa.errors import AudioError


def voice(hertz: float, seconds: float, level: float = -20.0, noise: float = 0.0) -> np.ndarray:
    """A buzz of falling harmonics at an RMS level in dBFS."""
    phase = np.arange(int(seconds * RATE)) * hertz / RATE
    wave = sum(np.sin(2 * np.pi * k * phase) / k for k in range(1, int(4000 / hertz)))
    wave = wave / np.sqrt(np.mean(wave**2)) * 10 ** (level / 20)
    draw = np.random.default_rng(0)
    return (wave + noise * draw.standard_normal(len(wave))).astype(np.float32)


@pytest.mark.parametrize("hertz", [70, 110, 160, 220, 300, 390])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_pitch_is_found_within_one_percent(hertz: float, noise: float) -> None:
    found = measure_speech(voice(hertz, 0.5, noise=noise)).pitch
    assert found == pytest.approx(hertz, rel=0.01)


@pytest.mark.parametrize("level", [-40.0, -27.0, -15.0])
def test_level_is_of_what_sounds_and_not_of_pauses(level: float) -> None:
    spoken = voice(120, 0.5, level)
    silence = np.zeros(2 * RATE, dtype=np.float32)
    assert measure_speech(np.concatenate([silence, spoken, silence])).level == pytest.approx(
        level, abs=0.7
    )


@pytest.mark.parametrize("rate", [2.0, 3.5, 5.0])
def test_syllables_are_counted_from_the_first_sound_to_the_last(rate: float) -> None:
    wave = voice(120, 4.0)
    swell = 0.5 - 0.5 * np.cos(2 * np.pi * rate * np.arange(len(wave)) / RATE)
    quiet = np.zeros(RATE, dtype=np.float32)
    found = measure_speech(np.concatenate([quiet, (wave * swell).astype(np.float32), quiet])).rate
    assert found == pytest.approx(rate, rel=0.1)


def test_a_steady_sound_is_not_a_row_of_syllables() -> None:
    assert (measure_speech(voice(120, 2.0, noise=0.01)).rate or 0) < 1


def test_noise_has_no_pitch_and_silence_nothing() -> None:
    noise = 0.1 * np.random.default_rng(1).standard_normal(RATE).astype(np.float32)
    assert measure_speech(noise).pitch is None
    assert measure_speech(np.zeros(RATE, dtype=np.float32)) == Measures(1.0, None, None, None)


def test_a_few_samples_are_measured_without_complaint() -> None:
    assert measure_speech(np.full(5, 0.1, dtype=np.float32)).duration == 5 / RATE


def test_what_is_not_a_waveform_at_16_khz_is_refused() -> None:
    with pytest.raises(AudioError, match="16000 Hz"):
        measure_speech(np.zeros(100, dtype=np.float32), 8000)
    with pytest.raises(AudioError, match="waveform"):
        measure_speech(np.zeros((2, 100), dtype=np.float32))


def test_one_pitch_is_high_for_a_man_and_low_for_a_woman() -> None:
    measures = Measures(3.0, 160.0, -25.0, 3.5)
    words = {
        g: describe_attributes({"gender": g}, measures, "")["pitch"] for g in ("male", "female")
    }
    assert words == {"male": "high", "female": "low"}
    assert describe_attributes({}, measures, "")["pitch"] == "medium"


def test_labels_win_and_unknown_measures_stay_out() -> None:
    found = describe_attributes({"volume": "whispered"}, Measures(3.0, None, -25.0, None), "hello")
    assert found == {"volume": "whispered", "duration": "3.0 seconds", "text": "hello"}


def test_bands_can_be_set() -> None:
    measures = Measures(3.0, 160.0, -25.0, 2.0)
    bands = Bands(volume=(-20.0, -10.0), speed=(1.0, 1.5))
    found = describe_attributes({}, measures, "", bands)
    assert (found["volume"], found["speed"]) == ("quiet", "fast")


@pytest.mark.parametrize(
    ("attributes", "seconds", "line"),
    [
        ({"text": "three seven"}, 2.4, '[00:00 - 00:03]: "three seven" (Duration: 3s)'),
        ({"gender": "male"}, 75.0, "[00:00 - 01:15] (Gender: male, Duration: 75s)"),
        ({}, 0.1, "[00:00 - 00:01] (Duration: 1s)"),
        (
            {"text": "(Sigh)", "duration": "1.2 seconds", "emotion": "sad"},
            1.2,
            '[00:00 - 00:02]: "(Sigh)" (Emotion: sad, Duration: 2s)',
        ),
    ],
)
def test_seed_transcript_has_the_form_of_the_paper(
    attributes: dict[str, str], seconds: float, line: str
) -> None:
    assert seed_transcript(attributes, seconds) == line
