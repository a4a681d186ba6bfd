"""From clips to rows: measured, described, with a question and, where it is known, its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from diffa.data.corpora.clips import Clip
from diffa.data.manifest import probe_audio
from diffa.data.samples import DataError, ManifestRow, derive_seed
from diffa.data.synthesis.attributes import Bands, describe_attributes, seed_transcript
from diffa.data.synthesis.measures import RATE, Measures, measure_speech
from diffa.data.synthesis.transcribers import Transcriber
from diffa.errors import describe_error
from diffa.spec.validation import TRANSCRIBE

DESCRIBE = "What can you hear from the audio?"
"""The question of DIFFA's synthetic data."""
_BATCH = 16  # recordings that are transcribed together


class Measurement(NamedTuple):
    """A file's seconds and measures, or what is wrong with it."""

    seconds: float
    measures: Measures | None
    fault: str = ""


def measure_clip(path: Path, measured: bool = True) -> Measurement:
    """Measure a recording, or read its duration alone; a file that cannot be read says why."""
    if not measured:
        fault, seconds = probe_audio(path) if path.is_file() else (f"there is no file {path}", 0.0)
        return Measurement(seconds, None, fault)
    from diffa.audio import prepare

    try:
        measures = measure_speech(prepare(path, RATE).numpy())
    except Exception as error:  # whatever is wrong with a recording is that recording's error
        return Measurement(0.0, None, describe_error(error))
    return Measurement(measures.duration, measures)


def measure_clips(clips: Sequence[Clip], *, measured: bool, workers: int) -> Iterator[Measurement]:
    """Measure every clip, in order, in ``workers`` processes (none for 1)."""
    paths = [clip.path for clip in clips]
    if workers == 1:
        yield from (measure_clip(path, measured) for path in paths)
        return
    # spawned: a fork of a process whose torch has begun threads can hang
    with ProcessPoolExecutor(workers, get_context("spawn"), _use_one_thread) as pool:
        yield from pool.map(measure_clip, paths, [measured] * len(paths), chunksize=16)


def _use_one_thread() -> None:
    """Keep a worker to its own core."""
    import torch

    torch.set_num_threads(1)


def clip_row(
    clip: Clip,
    measurement: Measurement,
    *,
    bands: Bands | None = None,
    instructions: Sequence[str] = (),
) -> ManifestRow:
    """Return a clip as a row that asks for its transcript (DIFFA's stage 1).

    A clip without a published transcript asks for a description instead, with an empty answer
    that captions fill in: a machine's transcript is no answer to learn. One of several
    ``instructions`` is drawn by the clip's id alone.
    """
    attributes = describe_attributes(clip.labels, measurement.measures, clip.transcription, bands)
    questions = instructions or (TRANSCRIBE,)
    published = "" if clip.transcribed_by else clip.transcription
    question = questions[derive_seed(clip.audio_id) % len(questions)] if published else DESCRIBE
    row: ManifestRow = {
        "audio_id": clip.audio_id,
        "audio_filepath": str(clip.path.absolute()),
        "transcription": clip.transcription,
        "input": question,
        "target": published,
        "dataset": clip.dataset,
        "duration": round(measurement.seconds, 3),
        "seed_transcript": seed_transcript(attributes, measurement.seconds),
        "speaker": clip.speaker,
        "split": clip.split,
        "attributes": attributes,
    }
    if clip.transcribed_by:
        row["transcribed_by"] = clip.transcribed_by
    if measurement.measures is not None:
        named = measurement.measures._asdict().items()
        row["measures"] = {name: round(value, 3) for name, value in named if value is not None}
    return row


def clip_rows(
    clips: Sequence[Clip],
    faults: list[str],
    *,
    measured: bool = True,
    workers: int = 1,
    bands: Bands | None = None,
    instructions: Sequence[str] = (),
    transcriber: Transcriber | None = None,
) -> Iterator[ManifestRow]:
    """Yield a row for every clip in order; unreadable clips are listed in ``faults`` instead.

    Args:
        clips: Recordings of a corpus.
        faults: Receives what is wrong with unreadable recordings.
        measured: Measure pitch, volume and speed, not just the duration.
        workers: Processes that measure.
        bands: Limits between the words of a measure.
        instructions: Questions to draw from for clips with a published transcript.
        transcriber: Transcribes the clips that have no published transcript.
    """
    results = zip(clips, measure_clips(clips, measured=measured, workers=workers), strict=True)
    while batch := list(islice(results, _BATCH)):
        faults += [measurement.fault for _, measurement in batch if measurement.fault]
        usable = [(clip, measurement) for clip, measurement in batch if not measurement.fault]
        transcribed = _transcribe([clip for clip, _ in usable], transcriber)
        for clip, (_, measurement) in zip(transcribed, usable, strict=True):
            yield clip_row(clip, measurement, bands=bands, instructions=instructions)


def _transcribe(clips: Sequence[Clip], transcriber: Transcriber | None) -> list[Clip]:
    """Return clips with transcripts of those that have none."""
    silent = [clip.path for clip in clips if not clip.transcription]
    if transcriber is None or not silent:
        return list(clips)
    texts = dict(zip(silent, transcriber.transcribe(silent), strict=True))
    return [
        clip._replace(transcription=texts[clip.path], transcribed_by=transcriber.name)
        if texts.get(clip.path)
        else clip
        for clip in clips
    ]


def sample_clips(clips: Sequence[Clip], count: int, seed: int = 0) -> list[Clip]:
    """Choose ``count`` clips at random, the same whatever order they come in; in file order."""
    sampled = sorted(clips, key=lambda clip: derive_seed(seed, clip.audio_id))[:count]
    return sorted(sampled, key=lambda clip: str(clip.path))


def read_instructions(path: Path) -> list[str]:
    """Read instructions, one per line; blank lines and those that begin with # say nothing.

    Raises:
        DataError: the file cannot be read, or says nothing.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"instructions: {path} cannot be read: {error}") from error
    lines: Iterable[str] = (line.strip() for line in text.splitlines())
    instructions = [line for line in lines if line and not line.startswith("#")]
    if not instructions:
        raise DataError(f"instructions: {path} holds none; write one per line")
    return instructions
