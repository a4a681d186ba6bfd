"""nano as it ships: it listens, needs its own audio, and is silent where nothing is said."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

import diffa
from diffa.data.corpora.fsdd import DIGIT_WORDS
from diffa.nano.sources import Nano
from diffa.trainers.evaluate import compare


@pytest.fixture(scope="module")
def nano() -> diffa.Model:
    return diffa.build("nano")


@pytest.fixture(scope="module")
def asked() -> list:
    """Transcriptions of up to three digits, from recordings that training never saw."""
    source = Nano(
        split="test", seed=31, count=60, tasks=["transcribe"], max_digits=3, synthetic_voices=False
    )
    samples = [source[i] for i in range(60)]
    return [sample for sample in samples if sample.target != "nothing"][:32]


def error(model: diffa.Model, samples: list, waves: list[torch.Tensor]) -> float:
    written = model.answer(waves, [s.question for s in samples], max_tokens=12).text
    return compare(written, [s.target for s in samples])["error"]


@pytest.mark.fsdd
def test_it_writes_down_short_utterances_and_needs_their_audio(nano, asked) -> None:
    waves = [sample.audio for sample in asked]
    heard = error(nano, asked, waves)
    shuffled = error(nano, asked, waves[5:] + waves[:5])
    assert heard < 0.06
    assert shuffled > 2 * heard


def letters(model: diffa.Model, samples: list, waves: list[torch.Tensor]) -> float:
    written = model.answer(waves, [s.question for s in samples], max_tokens=8).text
    pairs = zip(written, samples, strict=True)
    return sum(text[:2] == s.target[:2] for text, s in pairs) / len(samples)


@pytest.mark.fsdd
def test_it_writes_the_letter_of_the_right_choice_and_needs_the_audio_for_it(nano) -> None:
    kinds = ["gender", "sound", "count", "place", "largest"]
    source = Nano(split="test", seed=32, count=160, tasks=kinds, synthetic_voices=False)
    samples = [s for s in (source[i] for i in range(160)) if s.target[1:2] == "."][:48]
    waves = [sample.audio for sample in samples]
    heard = letters(nano, samples, waves)
    shuffled = letters(nano, samples, waves[7:] + waves[:7])
    assert heard > 0.85
    assert shuffled < heard - 0.2  # among four choices of which some are likelier: not .25


@pytest.mark.fsdd
def test_it_describes_speech_and_hears_where_there_is_none(nano) -> None:
    source = Nano(split="test", seed=33, count=140, tasks=["caption", "sound"])
    samples = [s for s in (source[i] for i in range(140)) if s.target.endswith(".")]
    silent = [s for s in samples if "speech" not in s.target][:12]
    spoken = [s for s in samples if "speech" in s.target][:24]
    asked = [*silent, *spoken]
    written = nano.answer([s.audio for s in asked], [s.question for s in asked], max_tokens=24).text
    assert sum("speech" in text for text in written[: len(silent)]) <= 1
    assert all("speech" in text for text in written[len(silent) :])
    assert compare(written, [s.target for s in asked])["error"] < 0.12


def test_silence_is_no_digit(nano) -> None:
    digits = set(DIGIT_WORDS)
    said = nano.answer(torch.zeros(32_000), "Please transcribe the audio to text.").text
    assert not digits & set(said.split())


@pytest.mark.fsdd
def test_the_balanced_setting_writes_what_the_exact_one_does(nano, asked) -> None:
    waves = [sample.audio for sample in asked]
    fast = diffa.swap(nano, sampler=nano.spec.data["sampler_presets"]["balanced"])
    assert error(fast, asked, waves) <= error(nano, asked, waves) + 0.02
    questions = [sample.question for sample in asked]
    few = fast.answer(waves, questions, max_tokens=12).num_forwards
    assert few < nano.answer(waves, questions, max_tokens=12).num_forwards


def test_its_weights_are_small() -> None:
    folder = Path(str(files("diffa") / "assets" / "weights" / "nano"))
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 24e6
