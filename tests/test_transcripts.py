"""Recordings of any length: where they are cut, and how the parts are joined."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffa
from diffa.audio import prepare
from diffa.audio.segments import cut_at_silences
from diffa.errors import SpecError
from diffa.transcripts import TranscriptSegment, to_srt, to_vtt

RATE = 8000
RECORDINGS = Path(diffa.__file__).parent / "assets" / "recordings"


def recording(*parts, noise=1e-4):
    """Seconds of tone (positive) and of silence (negative), one after the other."""
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for seconds in parts:
        time = torch.arange(round(abs(seconds) * RATE)) / RATE
        tone = 0.3 * torch.sin(2 * torch.pi * 300 * time) if seconds > 0 else torch.zeros_like(time)
        pieces.append(tone + noise * torch.randn(len(time), generator=generator))
    return torch.cat(pieces)


def seconds_of(segments):
    return [(round(s.start / RATE, 1), round(s.end / RATE, 1)) for s in segments]


def test_a_short_recording_is_one_part_without_the_silence_around_it():
    wave = recording(-2.0, 1.5, -3.0)
    [part] = cut_at_silences(wave, RATE, max_seconds=8)
    assert abs(part.start / RATE - 2.0) < 0.15
    assert abs(part.end / RATE - 3.5) < 0.15


def test_a_long_recording_is_cut_in_its_pauses():
    wave = recording(3.0, -0.5, 3.0, -0.6, 3.0, -0.4, 2.0)
    parts = cut_at_silences(wave, RATE, max_seconds=8)
    assert len(parts) == 2
    assert not any(part.overlaps for part in parts)
    assert 6.5 < parts[0].end / RATE < 7.1


def test_speech_without_pauses_is_cut_with_overlaps():
    parts = cut_at_silences(recording(20.0), RATE, max_seconds=8)
    assert [part.overlaps for part in parts] == [False, True, True]
    for before, after in itertools.pairwise(parts):
        assert abs((before.end - after.start) / RATE - 1.0) < 0.05


def test_silence_has_no_parts():
    assert cut_at_silences(torch.zeros(RATE * 5), RATE, max_seconds=8) == []
    assert cut_at_silences(torch.zeros(0), RATE, max_seconds=8) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 6).filter(lambda x: abs(x) > 0.05), min_size=1, max_size=9))
def test_parts_are_short_enough_in_order_and_hold_all_sound(lengths):
    wave = recording(*lengths, noise=0.0)
    parts = cut_at_silences(wave, RATE, max_seconds=5)
    covered = torch.zeros(len(wave), dtype=torch.bool)
    for part in parts:
        assert 0 <= part.start < part.end <= len(wave)
        assert part.end - part.start <= 5 * RATE
        covered[part.start : part.end] = True
    assert [p.start for p in parts] == sorted(p.start for p in parts)
    loud = wave.abs() > 0.1
    assert float((loud & ~covered).float().mean()) < 0.002 + 200 / max(1, len(wave))


def test_a_part_below_a_second_is_refused():
    with pytest.raises(SpecError, match="max_seconds"):
        cut_at_silences(torch.zeros(10), RATE, max_seconds=0.5)


def test_words_of_an_overlap_are_kept_once(monkeypatch):
    model = diffa.build("nano")
    texts = iter(["one two three", "Three four, five", "six"])

    def answer(audio, question, **options):
        count = len(question)
        return diffa.Answer([next(texts) for _ in range(count)], [None] * count, 3, [-0.5] * count)

    monkeypatch.setattr(model, "answer", answer)
    transcript = model.transcribe((recording(20.0), RATE), max_seconds=8, batch_size=2)
    assert str(transcript) == "one two three four, five six"
    assert transcript.num_forwards == 6
    assert transcript.confidence == pytest.approx(-0.5)
    ends = [(s.start, s.end) for s in transcript.segments]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))


def test_a_long_recording_is_transcribed_as_its_parts_are():
    model = diffa.build("nano")
    rate = model.encoder.sample_rate
    gap = torch.zeros(rate // 2)
    names = ("digits", "two_speakers", "digits")
    waves = [prepare(f"{RECORDINGS}/{name}.flac", rate) for name in names]
    alone = [model.transcribe((wave, rate)).text for wave in waves]
    whole = torch.cat([piece for wave in waves for piece in (wave, gap)])
    transcript = model.transcribe((whole, rate), max_seconds=3)
    assert transcript.text == " ".join(alone)
    assert [round(s.start) for s in transcript.segments] == [0, 3, 6]
    assert [t.text for t in model.transcribe([(wave, rate) for wave in waves])] == alone


def test_subtitles_have_numbers_times_and_escaped_text():
    segments = [
        TranscriptSegment(0.5, 2.0, "a < b & c", -0.1), TranscriptSegment(2.0, 2.5, "", -0.1),
        TranscriptSegment(3661.25, 3662.0, "end", -0.1),
    ]  # fmt: skip
    assert to_srt(segments) == (
        "1\n00:00:00,500 --> 00:00:02,000\na < b & c\n\n2\n01:01:01,250 --> 01:01:02,000\nend\n"
    )
    assert to_vtt(segments) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:02.000\na &lt; b &amp; c\n"
        "\n01:01:01.250 --> 01:01:02.000\nend\n"
    )


def test_the_command_prints_a_line_for_each_recording(capsys, tmp_path):
    from diffa.cli import main

    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio")
    files = [f"{RECORDINGS}/digits.flac", str(broken), f"{RECORDINGS}/two_speakers.flac"]
    with pytest.raises(SystemExit) as end:
        main(["transcribe", *files, "--json", "--sampler-preset", "fast"])
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["file"] for row in rows] == [files[0], files[2]]
    assert rows[0]["text"] == rows[0]["segments"][0]["text"] == "seven three nine one"
    assert end.value.code == 1
    assert "broken.wav" in err
    assert "1 of 3" in err
