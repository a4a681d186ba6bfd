"""The commands that run a model: ``diffa ask`` and ``diffa transcribe``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from diffa.cli.output import print_json, say
from diffa.cli.spec import JSON, SAMPLER_PRESET, SET, default_spec, read_spec
from diffa.errors import SpecError

TRANSCRIBE = "Please transcribe the audio to text."
"""The instruction of DIFFA's own ASR evaluation."""

AUDIO = Annotated[str, typer.Argument(metavar="AUDIO", help="A recording: wav, flac, ogg, mp3.")]
SPEC = Annotated[
    str,
    typer.Option("--spec", help="Preset, YAML or JSON file, or a saved model's folder."),
]
DEVICE = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1; the GPU if there is one.")
]
TOKENS = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Length of the answer's canvas.")
]
DTYPE = Annotated[
    str | None, typer.Option("--dtype", help="Of the backbone: bfloat16, float32, ...")
]
WATCH = Annotated[bool, typer.Option("--watch", help="Show the answer forming, on stderr.")]
SYSTEM = Annotated[str | None, typer.Option("--system", help="Another system turn.")]


def ask(
    audio: AUDIO,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="About the recording.")],
    spec: SPEC = "",
    changes: SET = None,
    sampler_preset: SAMPLER_PRESET = "",
    device: DEVICE = "auto",
    max_tokens: TOKENS = None,
    system: SYSTEM = None,
    dtype: DTYPE = None,
    watch: WATCH = False,
    as_json: JSON = False,
) -> None:
    """Ask a question about a recording; the answer goes to stdout."""
    model, name = load_model(spec, changes, sampler_preset, device, dtype)
    begin = time.perf_counter()
    shown = show_step(model) if watch else None
    answer = model.answer(audio, question, system=system, max_tokens=max_tokens, on_step=shown)
    seconds = time.perf_counter() - begin
    if as_json:
        print_json(
            {
                "audio": audio,
                "question": question,
                "text": answer.text,
                "tokens": [int(token) for token in answer.tokens],
                "num_forwards": answer.num_forwards,
                "seconds": round(seconds, 3),
                "spec": name,
                "digest": model.spec.digest(),
            }
        )
        return
    print(answer.text)
    say(f"{name}: {answer.num_forwards} backbone passes in {seconds:.1f} s")


def transcribe(
    audio: AUDIO,
    spec: SPEC = "",
    changes: SET = None,
    sampler_preset: SAMPLER_PRESET = "",
    device: DEVICE = "auto",
    max_tokens: TOKENS = None,
    instruction: Annotated[
        str, typer.Option("--instruction", help="What the model is asked to do.")
    ] = TRANSCRIBE,
    dtype: DTYPE = None,
    watch: WATCH = False,
    as_json: JSON = False,
) -> None:
    """Write down what is said in a recording."""
    ask(
        audio,
        instruction,
        spec,
        changes,
        sampler_preset,
        device,
        max_tokens,
        None,
        dtype,
        watch,
        as_json,
    )


def show_step(model: Any) -> Callable[[Any], None]:
    """Return what prints a step's canvas to stderr, one line per forward."""
    from rich.console import Console

    from diffa.runtime.render import render_step

    console = Console(stderr=True, highlight=False)
    tokenizer, vocab = model.backbone.tokenizer, model.backbone.vocab
    return lambda step: console.print(render_step(step, 0, tokenizer, vocab))


def load_model(
    name: str, changes: list[str] | None, sampler_preset: str, device: str, dtype: str | None = None
) -> tuple[Any, str]:
    """Build a spec's model, or load a saved one; also say which name it goes by."""
    import diffa

    name = name or default_spec()
    spec = read_spec(name, changes, sampler_preset)  # before torch: faults show at once
    place = device_of(device)
    if not (Path(name) / "model.safetensors").is_file():
        return diffa.build(spec, device=place, dtype=dtype), name
    model = diffa.load(name, device=place, dtype=dtype)
    if changes or sampler_preset:
        new = spec.resolve().data
        check_saved(model.spec.data, new)
        model = diffa.swap(model, sampler=new["sampler"])
    return model, name


def check_saved(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise SpecError where more of a saved model's spec has been set than its sampler."""
    moved = [
        key for key in new if key not in ("sampler", "sampler_presets") and new[key] != old[key]
    ]
    if moved:
        raise SpecError(f"only the sampler of a saved model can be set, not {', '.join(moved)}")


def device_of(name: str) -> str:
    """The device that ``--device`` names; raises SpecError where it is none."""
    import torch

    from diffa.assembly import parse_device

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(parse_device(name))
    except SpecError as error:
        raise SpecError(f"--device {error}") from error
