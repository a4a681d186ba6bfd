"""The page: a recording, a question, and the answer's canvas after each forward pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from diffa.errors import DiffaError, SpecError
from diffa.nano.demo import describe_model, recordings
from diffa.runtime.threads import ComputeThread
from diffa.ui import html, sampler_options
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
MAX_TOKENS, MAX_CHARS = 256, 32768
REPLAY_SECONDS = 0.25  # per forward pass of a replay
UPDATE_SECONDS = 0.2  # between two drawings of a forming answer; the replay has every pass
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class AnswerView(NamedTuple):
    """Where the answer under one sampler preset appears."""

    answer: Any
    canvas: Any
    slider: Any
    numbers: Any
    replay: Any


class QuestionForm(NamedTuple):
    """The components of the question."""

    audio: Any
    question: Any
    max_tokens: Any
    seed: Any
    system: Any
    compare: Any


def page(model: Model, name: str) -> gr.Blocks:
    """Build the page of a model. One thread computes the answers of all visitors."""
    compute = ComputeThread()
    spec, decoding = model.spec, model.backbone.decoding
    known = list(sampler_options.sampler_presets(spec))
    with gr.Blocks(title="diffa", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# diffa\nAsk about a recording. Model **{name}**: {describe_model(model)}.")
        status = gr.HTML(elem_id="status")
        with gr.Row():
            with gr.Column():
                audio, sound, examples = _recording()
            with gr.Column():
                question, tasks, button = _question()
                form = _options(model, audio, question)
        with gr.Accordion("Sampler and cache", open=False), gr.Row():
            with gr.Column():
                first = controls(spec, decoding, known[0], "First sampler preset")
            with gr.Column(visible=False) as column:
                second = controls(spec, decoding, known[-1], "Second sampler preset")
        gr.HTML(html.legend())
        with gr.Row():
            with gr.Column(min_width=300):
                one = _result("Answer", "first")
            with gr.Column(min_width=300, visible=False) as beside:
                two = _result("Answer under the second sampler preset", "second")
        table = gr.HTML(elem_id="comparison")
        form.compare.change(
            lambda on: [gr.update(visible=on)] * 2, form.compare, [column, beside],
            queue=False, **_QUIET,
        )  # fmt: skip
        audio.change(
            lambda path: compute(_draw_recording, model, path), audio, [sound, status],
            concurrency_id="model", **_QUIET,
        )  # fmt: skip
        run = _runner(model, compute, form, (first, second), (one, two), status, table)
        for trigger in (button.click, question.submit):
            run(trigger)
        for label, task in tasks.items():
            run(task.click(lambda label=label: TASKS[label], None, question, **_QUIET).then)
        for label, example in examples.items():
            run(example.click(lambda label=label: _example(label), None, [audio, question]).then)
    return blocks


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


def _options(model: Model, audio: Any, question: Any) -> QuestionForm:
    compare = gr.Checkbox(
        False, label="Two sampler presets side by side", elem_id="compare",
        info="Answers twice: under the first sampler preset, then under the second.",
    )  # fmt: skip
    length = min(int(model.spec.data["prompt"]["max_tokens"]), MAX_TOKENS)
    with gr.Accordion("Length, seed, system prompt", open=False):
        max_tokens = gr.Slider(
            1, MAX_TOKENS, length, step=1, label="Answer length",
            info="Maximum tokens of the answer; unused ones show as ·.",
        )  # fmt: skip
        seed = gr.Number(
            0, precision=0, label="Seed", info="Random seed of samplers with randomness."
        )
        system = gr.Textbox(
            str(model.spec.data["prompt"]["system"]), label="System prompt",
            info="Instructions before the question.",
        )  # fmt: skip
    return QuestionForm(audio, question, max_tokens, seed, system, compare)


def _result(label: str, key: str) -> AnswerView:
    answer = gr.Textbox(
        label=label, interactive=False, lines=2, elem_id=f"answer-{key}", elem_classes="d-answer"
    )
    canvas = gr.HTML(elem_id=f"canvas-{key}")
    with gr.Row():
        slider = gr.Slider(
            1, 2, 1, step=1, label="Replay", info="Forward pass to show; arrow keys work.",
            elem_id=f"replay-{key}", min_width=240,
        )  # fmt: skip
        play = gr.Button("Play steps", size="sm", min_width=90, scale=0, elem_id=f"play-{key}")
    numbers = gr.HTML(elem_id=f"numbers-{key}")
    replay = gr.State(None)
    slider.input(
        _frame, [slider, replay], canvas, queue=False, trigger_mode="always_last", **_QUIET
    )
    play.click(_play, replay, [slider, canvas], concurrency_limit=None, **_QUIET)
    return AnswerView(answer, canvas, slider, numbers, replay)


def _frame(number: float, replay: Replay | None) -> str:
    """The canvas after one forward pass of a replay."""
    if replay is None:
        return ""
    place = min(max(int(number), 1), replay.num_forwards)
    return html.canvas(replay.frames[place - 1], place, replay.num_forwards)


def _play(replay: Replay | None) -> Iterator[tuple[Any, Any]]:
    """Show every forward pass in turn."""
    for number in range(1, (replay.num_forwards if replay else 0) + 1):
        yield number, _frame(number, replay)
        time.sleep(REPLAY_SECONDS)


def _draw_recording(model: Model, path: str | None) -> tuple[str, str]:
    """Draw a recording, or say what is wrong with it."""
    if path is None:
        return "", ""
    try:
        rate = model.encoder.sample_rate
        return picture(load_recording(path, rate), rate), ""
    except DiffaError as error:
        return "", html.error_message(str(error))


def _example(label: str) -> tuple[str, str]:
    name, question = EXAMPLES[label]
    return str(recordings() / name), question


def _runner(
    model: Model,
    compute: ComputeThread,
    form: QuestionForm,
    presets: tuple[Controls, Controls],
    views: tuple[AnswerView, AnswerView],
    status: Any,
    table: Any,
) -> Any:
    """Return a function that connects a trigger to the model."""
    width = len(presets[0].inputs)

    def run(*inputs: Any) -> Iterator[dict[Any, Any]]:
        values, rest = (
            QuestionForm(*inputs[: len(QuestionForm._fields)]),
            inputs[len(QuestionForm._fields) :],
        )
        parts = [rest[:width], rest[width:]] if values.compare else [rest[:width]]
        yield {status: "", table: "", **_cleared(views)}
        done: list[Replay] = []
        try:
            request = compute(_request, model, values)
            for part, place in zip(parts, views, strict=False):
                replay, sampler_form = None, SamplerForm(*part[1:])
                name = sampler_options.form_title(model.spec, str(part[0]), sampler_form)
                last_update = 0.0
                for replay in compute.iterate(
                    ask(model, name, sampler_options.sampler_from_form(sampler_form), request)
                ):
                    if (
                        time.perf_counter() - last_update > UPDATE_SECONDS
                    ):  # the browser shares the cores
                        yield _update(place, replay)
                        last_update = time.perf_counter()
                if replay is not None:
                    done.append(replay)
                    yield _update(place, replay, final=True)
            yield {table: html.comparison(done)}
        except DiffaError as error:
            yield {status: html.error_message(str(error))}
        except Exception as error:
            log.exception("a question failed")
            text = f"an unexpected error occurred ({type(error).__name__}: {error})"
            yield {status: html.error_message(f"{text}; see the terminal")}

    outputs = [status, table, *views[0], *views[1]]
    inputs = [*form, *presets[0].inputs, *presets[1].inputs]
    return lambda trigger: trigger(run, inputs, outputs, concurrency_id="model", **_QUIET)


def _request(model: Model, values: QuestionForm) -> Request:
    """Validate the form's values; raise SpecError or AudioError."""
    wave = load_recording(values.audio, model.encoder.sample_rate)
    if not str(values.question or "").strip():
        raise SpecError("there is no question yet: type one or take one of the tasks")
    if max(len(values.question), len(values.system or "")) > MAX_CHARS:
        raise SpecError(f"question and system prompt may have {MAX_CHARS} characters each")
    return Request(
        wave, values.question.strip(), int(values.max_tokens), values.system, int(values.seed or 0)
    )


def _cleared(views: tuple[AnswerView, AnswerView]) -> dict[Any, Any]:
    updates: dict[Any, Any] = {}
    for place in views:
        updates |= {place.answer: "", place.canvas: "", place.numbers: "", place.replay: None}
        updates[place.slider] = gr.update(value=1, maximum=2)
    return updates


def _update(place: AnswerView, replay: Replay, *, final: bool = False) -> dict[Any, Any]:
    count = replay.num_forwards
    updates: dict[Any, Any] = {
        place.answer: replay.text,
        place.canvas: html.canvas(replay.frames[-1], count, count),
    }
    if final:
        updates[place.numbers] = html.numbers(replay)
        updates[place.slider] = gr.update(value=count, maximum=max(count, 2))
        updates[place.replay] = replay
    return updates
