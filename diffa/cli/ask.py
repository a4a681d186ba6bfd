"""The commands that run a model: ``diffa ask`` and ``diffa transcribe``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

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
from diffa.runtime.text import count_passes
from diffa.spec.validation import TRANSCRIBE

if TYPE_CHECKING:
    from diffa.model import Model
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
    audio: AudioArgument,
    spec: SpecOption = "",
    overrides: SetOption = None,
    sampler_preset: SamplerPresetOption = "",
    device: DeviceOption = "auto",
    max_tokens: MaxTokensOption = None,
    instruction: Annotated[
        str, typer.Option("--instruction", help="Instruction given to the model.")
    ] = TRANSCRIBE,
    dtype: DtypeOption = None,
    watch: WatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Transcribe the speech of a recording and print the transcript to stdout."""
    ask(
        audio, instruction, spec, overrides, sampler_preset, device, max_tokens, None, dtype,
        watch, as_json,
    )  # fmt: skip


def step_printer(model: Model) -> Callable[[Step], None]:
    """Return a callback that prints each step's canvas to stderr, one line per forward pass."""
    from rich.console import Console

    from diffa.runtime.render import render_step

    console = Console(stderr=True, highlight=False)
    tokenizer, vocab = model.backbone.tokenizer, model.backbone.vocab
    return lambda step: console.print(render_step(step, 0, tokenizer, vocab))
