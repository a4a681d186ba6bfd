"""The page: a recording, a question, and the answer's canvas forward by forward."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from diffa.errors import DiffaError, SpecError
from diffa.nano.demo import describe_model, recordings
from diffa.runtime.threads import ComputeThread
from diffa.ui import html as drawing
from diffa.ui import sampler_options
from diffa.ui.audio import load_recording, picture
from diffa.ui.controls import Controls, controls
from diffa.ui.sampler_options import SamplerForm
from diffa.ui.steps import Replay, Request, ask

if TYPE_CHECKING:
    from diffa.model import Model

log = logging.getLogger(__name__)

TASKS = {
    "Transcribe": "Please transcribe the audio to text.",
    "Describe": "What can you hear from the audio?",
    "Count digits": "How many digits are spoken?",
}
EXAMPLES = {
    "Spoken digits": ("digits.flac", TASKS["Transcribe"]),
    "Two speakers": ("two_speakers.flac", TASKS["Describe"]),
    "A melody": ("melody.flac", TASKS["Describe"]),
}
LONGEST_ANSWER = 256
PAUSE = 0.25  # seconds per forward of a replay
OFTEN = 0.2  # seconds between two drawings of an answer that forms; the replay has every forward
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class Shown(NamedTuple):
    """Where the answer under one sampler preset appears."""

    answer: Any
    canvas: Any
    slider: Any
    numbers: Any
    replay: Any


class Asked(NamedTuple):
    """The components that say what is asked."""

    audio: Any
    question: Any
    max_tokens: Any
    seed: Any
    system: Any
    compare: Any


def page(model: Model, name: str) -> gr.Blocks:
    """Lay out the page of a model that goes by a name. One thread answers, whoever is told."""
    hand = ComputeThread()
    spec, decoding = model.spec, model.backbone.decoding
    known = list(sampler_options.sampler_presets(spec))
    with gr.Blocks(title="diffa", analytics_enabled=False, delete_cache=(3600, 3600)) as made:
        gr.Markdown(f"# diffa\nAsk about a recording. Model **{name}**: {describe_model(model)}.")
        status = gr.HTML(elem_id="status")
        with gr.Row():
            with gr.Column():
                audio, sound, examples = _recording()
            with gr.Column():
                question, tasks, button = _question()
                asked = _options(model, audio, question)
        with gr.Accordion("Sampler and cache", open=False), gr.Row():
            with gr.Column():
                first = controls(spec, decoding, known[0], "First sampler preset")
            with gr.Column(visible=False) as column:
                second = controls(spec, decoding, known[-1], "Second sampler preset")
        gr.HTML(drawing.legend())
        with gr.Row():
            with gr.Column(min_width=300):
                one = _result("Answer", "first")
            with gr.Column(min_width=300, visible=False) as beside:
                two = _result("Answer under the second sampler preset", "second")
        table = gr.HTML(elem_id="comparison")
        asked.compare.change(
            lambda on: [gr.update(visible=on)] * 2, asked.compare, [column, beside],
            queue=False, **_QUIET,
        )  # fmt: skip
        audio.change(
            lambda path: hand(_look, model, path), audio, [sound, status], concurrency_id="model",
            **_QUIET,
        )  # fmt: skip
        run = _runner(model, hand, asked, (first, second), (one, two), status, table)
        for trigger in (button.click, question.submit):
            run(trigger)
        for label, task in tasks.items():
            run(task.click(lambda label=label: TASKS[label], None, question, **_QUIET).then)
        for label, example in examples.items():
            run(example.click(lambda label=label: _example(label), None, [audio, question]).then)
    return made


def _recording() -> tuple[Any, Any, dict[str, Any]]:
    audio = gr.Audio(
        sources=["upload", "microphone"], type="filepath", label="Recording: upload or microphone",
        editable=False, elem_id="audio",
    )  # fmt: skip
    with gr.Row():
        examples = {label: gr.Button(label, size="sm", min_width=90) for label in EXAMPLES}
    return audio, gr.HTML(elem_id="sound"), examples


def _question() -> tuple[Any, dict[str, Any], Any]:
    question = gr.Textbox(
        label="Question", placeholder="How many people speak?", lines=1, elem_id="question"
    )
    with gr.Row():
        tasks = {label: gr.Button(label, size="sm", min_width=90) for label in TASKS}
    return question, tasks, gr.Button("Ask", variant="primary", elem_id="ask")


def _options(model: Model, audio: Any, question: Any) -> Asked:
    compare = gr.Checkbox(
        False, label="Two sampler presets side by side", elem_id="compare",
        info="Answers twice: under the first sampler preset, then under the second.",
    )  # fmt: skip
    length = min(int(model.spec.data["prompt"]["max_tokens"]), LONGEST_ANSWER)
    with gr.Accordion("Length, seed, system turn", open=False):
        max_tokens = gr.Slider(
            1, LONGEST_ANSWER, length, step=1, label="Length of the canvas",
            info="Places that the answer may fill; what it does not need ends as ·.",
        )  # fmt: skip
        seed = gr.Number(0, precision=0, label="Seed", info="For samplers that draw.")
        system = gr.Textbox(
            str(model.spec.data["prompt"]["system"]), label="System turn",
            info="What the model is told before the question.",
        )  # fmt: skip
    return Asked(audio, question, max_tokens, seed, system, compare)


def _result(label: str, key: str) -> Shown:
    answer = gr.Textbox(
        label=label, interactive=False, lines=2, elem_id=f"answer-{key}", elem_classes="d-answer"
    )
    canvas = gr.HTML(elem_id=f"canvas-{key}")
    with gr.Row():
        slider = gr.Slider(
            1, 2, 1, step=1, label="Replay", info="Forward by forward; arrow keys work.",
            elem_id=f"replay-{key}", min_width=240,
        )  # fmt: skip
        play = gr.Button("Play steps", size="sm", min_width=90, scale=0, elem_id=f"play-{key}")
    numbers = gr.HTML(elem_id=f"numbers-{key}")
    replay = gr.State(None)
    slider.input(
        _frame, [slider, replay], canvas, queue=False, trigger_mode="always_last", **_QUIET
    )
    play.click(_play, replay, [slider, canvas], concurrency_limit=None, **_QUIET)
    return Shown(answer, canvas, slider, numbers, replay)


def _frame(number: float, replay: Replay | None) -> str:
    """The canvas after a forward of a replay."""
    if replay is None:
        return ""
    place = min(max(int(number), 1), replay.num_forwards)
    return drawing.canvas(replay.frames[place - 1], place, replay.num_forwards)


def _play(replay: Replay | None) -> Iterator[tuple[Any, Any]]:
    """Show every forward in its turn."""
    for number in range(1, (replay.num_forwards if replay else 0) + 1):
        yield number, _frame(number, replay)
        time.sleep(PAUSE)


def _look(model: Model, path: str | None) -> tuple[str, str]:
    """Draw a recording, or say what is wrong with it."""
    if path is None:
        return "", ""
    try:
        rate = model.encoder.sample_rate
        return picture(load_recording(path, rate), rate), ""
    except DiffaError as error:
        return "", drawing.complaint(str(error))


def _example(label: str) -> tuple[str, str]:
    name, question = EXAMPLES[label]
    return str(recordings() / name), question


def _runner(
    model: Model,
    hand: ComputeThread,
    asked: Asked,
    chosen: tuple[Controls, Controls],
    shown: tuple[Shown, Shown],
    status: Any,
    table: Any,
) -> Any:
    """Return what makes a trigger ask the model."""
    width = len(chosen[0].inputs)

    def run(*given: Any) -> Iterator[dict[Any, Any]]:
        values, rest = Asked(*given[: len(Asked._fields)]), given[len(Asked._fields) :]
        parts = [rest[:width], rest[width:]] if values.compare else [rest[:width]]
        yield {status: "", table: "", **_cleared(shown)}
        done: list[Replay] = []
        try:
            request = hand(_request, model, values)
            for part, place in zip(parts, shown, strict=False):
                replay, wanted = None, SamplerForm(*part[1:])
                name = sampler_options.form_title(model.spec, str(part[0]), wanted)
                told = 0.0
                for replay in hand.iterate(
                    ask(model, name, sampler_options.sampler_from_form(wanted), request)
                ):
                    if time.perf_counter() - told > OFTEN:  # the browser shares the cores
                        yield _update(place, replay)
                        told = time.perf_counter()
                if replay is not None:
                    done.append(replay)
                    yield _update(place, replay, final=True)
            yield {table: drawing.comparison(done)}
        except DiffaError as error:
            yield {status: drawing.complaint(str(error))}
        except Exception as error:
            log.exception("a question failed")
            text = f"something unexpected went wrong ({type(error).__name__}: {error})"
            yield {status: drawing.complaint(f"{text}; the terminal shows where")}

    outputs = [status, table, *shown[0], *shown[1]]
    inputs = [*asked, *chosen[0].inputs, *chosen[1].inputs]
    return lambda trigger: trigger(run, inputs, outputs, concurrency_id="model", **_QUIET)


def _request(model: Model, values: Asked) -> Request:
    """Check and gather what is asked; raises SpecError and AudioError."""
    wave = load_recording(values.audio, model.encoder.sample_rate)
    if not str(values.question or "").strip():
        raise SpecError("there is no question yet: type one or take one of the tasks")
    return Request(
        wave, values.question.strip(), int(values.max_tokens), values.system, int(values.seed or 0)
    )


def _cleared(shown: tuple[Shown, Shown]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for place in shown:
        made |= {place.answer: "", place.canvas: "", place.numbers: "", place.replay: None}
        made[place.slider] = gr.update(value=1, maximum=2)
    return made


def _update(place: Shown, replay: Replay, *, final: bool = False) -> dict[Any, Any]:
    count = replay.num_forwards
    made: dict[Any, Any] = {
        place.answer: replay.text,
        place.canvas: drawing.canvas(replay.frames[-1], count, count),
    }
    if final:
        made[place.numbers] = drawing.numbers(replay)
        made[place.slider] = gr.update(value=count, maximum=max(count, 2))
        made[place.replay] = replay
    return made
