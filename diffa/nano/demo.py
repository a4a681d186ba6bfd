"""The demo: transcribe, describe and ask about three recordings of the package."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from diffa.runtime.render import render_step
from diffa.runtime.text import count_passes

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.types import Step

NANO, UNTRAINED = "nano", "tiny"
FAST = {"name": "blockwise", "block_length": 8, "threshold": 0.9, "cache": "none"}
REFERENCE = {
    "name": "blockwise",
    "block_length": 8,
    "stop_at_eos": False,
}  # DIFFA's loop: one token per pass


class DemoQuestion(NamedTuple):
    """A question about a recording, and how long its answer may be."""

    recording: str
    question: str
    tokens: int


QUESTIONS = (
    DemoQuestion("digits.flac", "Please transcribe the audio to text.", 16),
    DemoQuestion("digits.flac", "What can you hear from the audio?", 24),
    DemoQuestion("digits.flac", "How many digits are spoken?", 8),
    DemoQuestion("two_speakers.flac", "Please transcribe the audio to text.", 16),
    DemoQuestion("two_speakers.flac", "What can you hear from the audio?", 24),
    DemoQuestion("melody.flac", "What can you hear from the audio?", 24),
)


def recordings() -> Path:
    """Return the folder of the recordings that ship with diffa (synthetic)."""
    return Path(str(files("diffa") / "assets" / "recordings"))


def run(console: Console | None = None) -> None:
    """Answer questions, and show each answer forming, with passes and seconds."""
    import diffa
    from diffa.spec.spec import presets

    console = console or Console(highlight=False, markup=False)
    trained = NANO in presets()
    begin = time.perf_counter()
    model = diffa.build(NANO if trained else UNTRAINED)
    seconds = time.perf_counter() - begin
    console.print(f"diffa {diffa.__version__}: {describe_model(model)}, built in {seconds:.1f} s")
    if not trained:
        console.print(
            "These weights are random: the wiring is real, the words are noise. Trained "
            "ones: diffa ask FILE QUESTION --spec diffa-1 (needs the published weights)",
            style="yellow",
        )
    for recording in sorted({ask.recording for ask in QUESTIONS}):
        console.print(describe_audio(model, recording))
    table = Table("recording", "question", "answer", "passes", "s", "reference: passes", "s")
    for ask in QUESTIONS if trained else QUESTIONS[2:3]:
        table.add_row(*answer(model, ask, console))
    console.print(table)
    console.print("Ask about a file of your own:\n  diffa ask FILE 'What can you hear?' --watch")


def describe_model(model: Model) -> str:
    """Return parts and sizes in one line."""
    sizes = {
        "encoder": model.encoder,
        **dict(model.adapters.items()),
        "backbone": model.backbone,
    }
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in sizes.items()}
    return ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counted.items())


def describe_audio(model: Model, recording: str) -> str:
    """Return in one line how many embeddings a recording becomes, and where they go."""
    from diffa.audio import prepare

    rate = model.encoder.sample_rate
    wave = prepare(recordings() / recording, rate)
    count = int(model.listen(wave).lengths[0])
    prompt = model.chat_format.encode("")
    return (
        f"  {recording}: {len(wave) / rate:.1f} s -> {count} embeddings of width "
        f"{model.backbone.width}, put before token {prompt.audio_at} of the prompt"
    )


def answer(model: Model, ask: DemoQuestion, console: Console) -> list[str]:
    """Answer one question with the fast sampler and the reference; return a row of the table."""
    import diffa

    console.print(Text.assemble("\n", (ask.recording, "bold"), f"  {ask.question}"))
    fast = diffa.swap(model, sampler=FAST)
    text, num_forwards, seconds = watch(fast, recordings() / ask.recording, ask, console)
    slow = diffa.swap(model, sampler=REFERENCE)
    begin = time.perf_counter()
    loop = slow.answer(recordings() / ask.recording, ask.question, max_tokens=ask.tokens)
    slow_seconds = time.perf_counter() - begin
    both_texts = text if text == loop.text else f"{text}\n(reference: {loop.text})"
    return [
        ask.recording,
        ask.question,
        both_texts,
        str(num_forwards),
        f"{seconds:.2f}",
        str(loop.num_forwards),
        f"{slow_seconds:.2f}",
    ]


def watch(model: Model, audio: Path, ask: DemoQuestion, console: Console) -> tuple[str, int, float]:
    """Show the canvas after every pass; return text, number of passes and seconds."""
    tokenizer, vocab = model.backbone.tokenizer, model.backbone.vocab
    with Live(Text(), console=console, auto_refresh=False, transient=console.is_terminal) as live:
        frames: list[Text] = []

        def show(step: Step) -> None:
            count = Text(f"{len(frames) + 1:3d}  ", style="dim")
            frames.append(count + render_step(step, 0, tokenizer, vocab))
            if console.is_terminal:
                live.update(frames[-1], refresh=True)
            else:
                console.print(frames[-1])

        begin = time.perf_counter()
        answer = model.answer(audio, ask.question, max_tokens=ask.tokens, on_step=show)
        seconds = time.perf_counter() - begin
    console.print(
        Text.assemble(
            f"  -> {answer.text}   ",
            (f"({count_passes(answer.num_forwards)}, {seconds:.2f} s)", "dim"),
        )
    )
    return answer.text, answer.num_forwards, seconds
