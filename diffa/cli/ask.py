"""The commands that run a model: ``diffa ask`` and ``diffa transcribe``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffa.cli.models import load_model
from diffa.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxTokensOption,
    SamplerPresetOption,
    SetOption,
    SpecOption,
    SystemOption,
    WatchOption,
)
from diffa.cli.output import print_json, print_note
from diffa.errors import AudioError, SpecError
from diffa.runtime.text import count_passes
from diffa.spec.validation import TRANSCRIBE

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.transcripts import Transcript
    from diffa.types import Step


AudioArgument = Annotated[
    str, typer.Argument(metavar="AUDIO", help="Recording: a wav, flac, ogg or mp3 file.")
]


def ask(
    audio: AudioArgument,
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="Question about the recording.")
    ],
    spec: SpecOption = "",
    overrides: SetOption = None,
    sampler_preset: SamplerPresetOption = "",
    device: DeviceOption = "auto",
    max_tokens: MaxTokensOption = None,
    system: SystemOption = None,
    dtype: DtypeOption = None,
    watch: WatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about a recording and print the answer to stdout."""
    model, name = load_model(spec, overrides, sampler_preset, device, dtype)
    start = time.perf_counter()
    on_step = step_printer(model) if watch else None
    answer = model.answer(audio, question, system=system, max_tokens=max_tokens, on_step=on_step)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "audio": audio,
                "question": question,
                "text": answer.text,
                "tokens": [int(token) for token in answer.tokens],
                "num_forwards": answer.num_forwards,
                "confidence": round(answer.confidence, 4),
                "seconds": round(seconds, 3),
                "spec": name,
                "digest": model.spec.digest(),
            }
        )
        return
    print(answer.text)
    print_note(f"{name}: {count_passes(answer.num_forwards)} in {seconds:.1f} s")


def transcribe(
    files: Annotated[
        list[str], typer.Argument(metavar="AUDIO...", help="Recordings of any length.")
    ],
    spec: SpecOption = "",
    overrides: SetOption = None,
    sampler_preset: SamplerPresetOption = "",
    device: DeviceOption = "auto",
    max_tokens: MaxTokensOption = None,
    instruction: Annotated[
        str, typer.Option("--instruction", help="Instruction given to the model.")
    ] = TRANSCRIBE,
    dtype: DtypeOption = None,
    form: Annotated[
        Literal["text", "json", "srt", "vtt"],
        typer.Option("--format", help="What to print: text, JSON lines, or subtitles."),
    ] = "text",
    max_seconds: Annotated[
        float | None,
        typer.Option(
            "--max-seconds",
            help="Longest part that is transcribed at once (default: the encoder's window).",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Parts that are transcribed together.")
    ] = 8,
    as_json: JsonOption = False,
) -> None:
    """Transcribe the speech of recordings and print the transcripts to stdout.

    Long recordings are cut at silences. With --json, each recording is an object on a line of its
    own: file, text, segments with their times in seconds, and confidence.
    """
    if as_json:
        form = "json"
    if len(files) > 1 and form in ("srt", "vtt"):
        raise SpecError(f"--format {form} is for one recording: run the command once for each")
    model, name = load_model(spec, overrides, sampler_preset, device, dtype)
    failed = 0
    for file in files:
        start = time.perf_counter()
        try:
            transcript = model.transcribe(
                file, instruction=instruction, max_seconds=max_seconds, batch_size=batch_size,
                max_tokens=max_tokens,
            )  # fmt: skip
        except AudioError as error:
            if len(files) == 1:
                raise
            print_note(f"{file}: {error}")
            failed += 1
            continue
        _print_transcript(file, transcript, form, several=len(files) > 1)
        seconds = time.perf_counter() - start
        passes = count_passes(transcript.num_forwards)
        print_note(f"{name}: {file}: {len(transcript.segments)} parts, {passes} in {seconds:.1f} s")
    if failed:
        print_note(f"{failed} of {len(files)} recordings could not be transcribed")
        raise typer.Exit(1)


def _print_transcript(file: str, transcript: Transcript, form: str, *, several: bool) -> None:
    from diffa.transcripts import to_srt, to_vtt

    if form == "srt":
        print(to_srt(transcript.segments), end="")
    elif form == "vtt":
        print(to_vtt(transcript.segments), end="")
    elif form == "json":
        segments = [
            {
                "start": round(segment.start, 2),
                "end": round(segment.end, 2),
                "text": segment.text,
                "confidence": round(segment.confidence, 4),
            }
            for segment in transcript.segments
        ]
        confidence = round(transcript.confidence, 4)
        row = {"file": file, "text": transcript.text, "segments": segments}
        print(json.dumps({**row, "confidence": confidence}, ensure_ascii=False))
    else:
        print(f"{file}: {transcript.text}" if several else transcript.text)


def step_printer(model: Model) -> Callable[[Step], None]:
    """Return a callback that prints each step's canvas to stderr, one line per forward pass."""
    from rich.console import Console

    from diffa.runtime.render import render_step

    console = Console(stderr=True, highlight=False)
    tokenizer, vocab = model.backbone.tokenizer, model.backbone.vocab
    return lambda step: console.print(render_step(step, 0, tokenizer, vocab))
