"""What the page shows of an answer, without a browser: frames, drawings, controls, faults."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers.fakes import SAMPLER, install, site_packages

import diffa
from diffa.errors import AudioError, DiffaError, PluginError, SpecError
from diffa.nano.demo import recordings
from diffa.spec import registry
from diffa.spec.docstrings import option_descriptions
from diffa.spec.schema import read_schema
from diffa.spec.spec import Spec
from diffa.ui import html, sampler_options
from diffa.ui.audio import MAX_SECONDS, load_recording, picture
from diffa.ui.launch import require
from diffa.ui.sampler_options import ONE, SamplerForm
from diffa.ui.steps import Replay, Request, Token, ask, length

QUESTION = "What can you hear from the audio?"


@pytest.fixture(scope="module")
def model() -> diffa.Model:
    return diffa.build("tiny")


@pytest.fixture(scope="module")
def replay(model: diffa.Model) -> Replay:
    wave = load_recording(str(recordings() / "digits.flac"), model.encoder.sample_rate)
    sampler = {"name": "blockwise", "block_length": 8, "threshold": 0.0052}
    return list(ask(model, "mine", sampler, Request(wave, QUESTION, max_tokens=24)))[-1]


# --- frames -------------------------------------------------------------------------------------


def test_a_replay_holds_the_steps_of_the_model(model: diffa.Model, replay: Replay) -> None:
    sampler = {"name": "blockwise", "block_length": 8, "threshold": 0.0052}
    steps: list[Any] = []
    plain = diffa.swap(model, sampler=sampler).answer(
        recordings() / "digits.flac", QUESTION, max_tokens=24, on_step=steps.append
    )
    assert (replay.text, replay.num_forwards) == (plain.text, plain.num_forwards)
    assert 1 < replay.num_forwards < 24  # several tokens in some forwards, or the rest says little
    for frame, step in zip(replay.frames, steps, strict=True):
        assert [token.confidence for token in frame] == step.confidence[0].tolist()
        assert [token.step > 0 for token in frame] == step.final[0].tolist()


def test_a_token_is_final_from_its_step_on(replay: Replay) -> None:
    last = replay.frames[-1]
    assert all(1 <= token.step <= replay.num_forwards for token in last)
    for place, token in enumerate(last):
        seen = [frame[place] for frame in replay.frames]
        assert all(t.text == token.text and t.step == token.step for t in seen[token.step - 1 :])
        assert all(t.step == 0 for t in seen[: token.step - 1])


def test_tokens_are_counted_up_to_the_end_of_the_text() -> None:
    word, end, mask = (Token("a", "word", 1, 1), Token("", "end", 1, 1), Token("", "mask", 0, 0))
    assert length((word, mask, word, end, end, end)) == 3
    assert length((mask, mask)) == 0


# --- drawings -----------------------------------------------------------------------------------


def test_words_of_an_answer_are_escaped() -> None:
    frame = (Token("<script>", "word", 0.5, 1), Token('"&', "word", 0.9, 2))
    drawn = html.canvas(frame, 2, 2)
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn
    assert html.error_message("<b>no</b>").count("<b>") == 0


def test_confidence_and_step_of_a_token_have_colours_of_their_own() -> None:
    frame = (Token("a", "word", 0.1, 1), Token("b", "word", 1.0, 9), Token("", "mask", 0, 0))
    drawn = html.canvas(frame, 9, 9)
    backgrounds = re.findall(r"background:(#\w{6})", drawn)
    lines = re.findall(r"border-bottom-color:(#\w{6})", drawn)
    assert len(set(backgrounds)) == 2 and len(set(lines)) == 2
    assert backgrounds[1] == html.mix(html._DOUBT, html._SURE, 1.0)
    assert "a undecided" not in drawn and "ab undecided" in drawn  # as a screen reader says it


def test_letters_have_enough_contrast_on_every_background() -> None:
    def light(colour: str) -> float:  # relative luminance, WCAG 2.2
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    letters = light("#14181f")
    for tenth in range(11):
        ground = light(html.mix(html._DOUBT, html._SURE, tenth / 10))
        assert (ground + 0.05) / (letters + 0.05) > 7


def test_a_comparison_lists_passes_and_seconds_of_each_preset(replay: Replay) -> None:
    other = replay._replace(name="slow", seconds=replay.seconds * 3, text="else")
    table = html.comparison([replay, other])
    assert "mine" in table and "slow" in table and f"<td>{replay.num_forwards}</td>" in table
    assert "The answers differ. The second took 3.0 times as long." in table
    assert html.comparison([replay]) == ""


def test_the_picture_of_a_recording_has_a_scale_in_seconds(model: diffa.Model) -> None:
    drawn = picture(load_recording(str(recordings() / "melody.flac"), 16_000), 16_000)
    assert "data:image/png;base64," in drawn and "1 s</text>" in drawn
    assert picture(torch.zeros(7), 16_000).startswith("<svg")  # shorter than a window


# --- controls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "nano", "diffa-2"])
def test_controls_reproduce_every_sampler_preset(preset: str) -> None:
    spec = Spec.read(preset).resolve()
    for name, sampler in sampler_options.sampler_presets(spec).items():
        again = spec.data | {
            "sampler": sampler_options.sampler_from_form(
                sampler_options.form_from_sampler(spec, sampler)
            )
        }
        whole = spec.data | {"sampler": sampler}
        assert (
            Spec.read(again).resolve().data["sampler"]
            == (Spec.read(whole).resolve().data["sampler"])
        ), name


def test_options_without_a_control_survive_as_text() -> None:
    spec = Spec.read("tiny").resolve()
    chosen = sampler_options.form_from_sampler(
        spec, {"name": "blockwise", "suffix_window": 6, "stop_at_eos": False}
    )
    assert chosen.others == "suffix_window: 6, stop_at_eos: false"
    assert (
        sampler_options.sampler_from_form(chosen)["suffix_window"] == 6
        and sampler_options.sampler_from_form(chosen)["stop_at_eos"] is False
    )


def test_a_sampler_gets_only_options_that_it_has() -> None:
    for name in sampler_options.installed_samplers("masked"):
        made = sampler_options.sampler_from_form(SamplerForm(sampler=name, temperature=0.5))
        assert set(made) - {"name"} <= set(read_schema(registry.load_part("sampler", name)).options)
    with pytest.raises(SpecError, match="'revise' has no rule 'factor'"):
        sampler_options.sampler_from_form(SamplerForm(sampler="revise", rule="factor"))


def test_the_title_of_a_changed_preset_says_so() -> None:
    spec = Spec.read("tiny").resolve()
    start = sampler_options.form_from_sampler(spec, sampler_options.sampler_presets(spec)["fast"])
    assert sampler_options.form_title(spec, "fast", start) == "fast"
    assert (
        sampler_options.form_title(spec, "fast", start._replace(block_length=3)) == "fast, changed"
    )


@pytest.mark.parametrize("text", ["suffix 64", "suffix: [", "- a"])
def test_options_that_are_no_yaml_mapping_are_an_error(text: str) -> None:
    with pytest.raises(SpecError, match="further options"):
        sampler_options.sampler_from_form(SamplerForm(others=text))


def test_options_of_a_third_party_sampler_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site in site_packages(tmp_path, monkeypatch):
        install(site, "acme-diffa", {"sampler": {"capped": "acme:Capped"}}, {"acme": SAMPLER})
        assert "capped" in sampler_options.installed_samplers("masked")
        assert "passes (int)" in sampler_options.describe_further_options("capped")
        form = SamplerForm(sampler="capped", others="passes: 7")
        assert sampler_options.sampler_from_form(form) == {"name": "capped", "passes": 7}
        spec = Spec.read("tiny").resolve()
        assert sampler_options.form_from_sampler(spec, {"name": "capped", "passes": 7}) == (
            form._replace(rule=sampler_options.ONE)
        )


def test_a_written_option_may_be_null() -> None:
    assert (
        sampler_options.sampler_from_form(
            SamplerForm(others="suffix_window: null, stop_at_eos: false")
        )["suffix_window"]
        is None
    )


def test_a_cleared_number_is_an_error() -> None:
    with pytest.raises(SpecError, match="the rule 'threshold' needs a value"):
        sampler_options.sampler_from_form(SamplerForm(rule="threshold", value=None))
    with pytest.raises(SpecError, match="block_length needs a value"):
        sampler_options.sampler_from_form(SamplerForm(block_length=None))


def test_every_control_has_a_description() -> None:
    assert (
        sampler_options.describe_option("blockwise", "block_length")
        == "Answer tokens per block (LLaDA, arXiv 2502.09992)."
    )
    assert sampler_options.describe_option("blockwise", "cache").startswith(
        "Keys and values kept within a block: none"
    )
    for rule in sampler_options.available_rules("blockwise"):
        assert sampler_options.describe_rule("blockwise", rule).endswith("."), rule
    assert sampler_options.available_rules("blockwise")[0] == ONE


def test_shipped_samplers_and_their_options_have_descriptions() -> None:
    for name, does in sampler_options.installed_samplers("masked").items():
        cls = registry.load_part("sampler", name)
        silent = read_schema(cls).options.keys() - option_descriptions(cls).keys()
        assert does and not silent, (name, silent)


# --- faults -------------------------------------------------------------------------------------


def test_errors_of_recordings_are_sentences_without_paths(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="there is no recording yet"):
        load_recording(None, 16_000)
    noise = tmp_path / "upload.wav"
    noise.write_bytes(b"RIFF not a recording at all")
    with pytest.raises(AudioError) as caught:
        load_recording(str(noise), 16_000)
    assert str(caught.value) == "this file cannot be decoded: Format not recognised."
    long = tmp_path / "long.wav"
    soundfile.write(long, np.zeros(int(4000 * (MAX_SECONDS + 1)), "f4"), 4000)
    with pytest.raises(AudioError, match="longer than the 300 s"):
        load_recording(str(long), 4000)
    shown = html.error_message(str(caught.value))
    assert 'role="alert"' in shown and re.search(r">[A-Z].*\.</div>", shown)


@pytest.mark.parametrize(
    "typed",
    [
        {"question": "x" * 40_000},
        {"question": "Why?", "system": "x" * 40_000},
    ],
)
def test_long_texts_are_an_error_before_they_reach_the_model(model: diffa.Model, typed) -> None:
    from diffa.ui.page import QuestionForm, _request

    audio = str(recordings() / "digits.flac")
    values = {"question": "Why?", "max_tokens": 8, "seed": 0, "system": "", "compare": False}
    with pytest.raises(SpecError, match="32768 characters"):
        _request(model, QuestionForm(audio=audio, **{**values, **typed}))


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]" + "".join(
    f", {key}: &{key} [{', '.join(f'*{before}' for _ in range(10))}]"
    for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "form",
    [
        SamplerForm(block_length=10**9),
        SamplerForm(rule="steps", value=10**12),
        SamplerForm(others="vicinity_window: 1000000000"),
        SamplerForm(others="audio_refresh_interval: 99999999999999999999999"),
        SamplerForm(others=LAUGHS),
        SamplerForm(block_length=0),
    ],
)
def test_options_that_would_occupy_the_model_are_an_error(model: diffa.Model, form) -> None:
    request = Request(torch.zeros(16000), "Why?", max_tokens=8)
    with pytest.raises(DiffaError) as caught:
        next(ask(model, "mine", sampler_options.sampler_from_form(form), request))
    assert len(str(caught.value)) < 2000


def test_an_upload_is_decoded_as_data_from_a_network(tmp_path: Path) -> None:
    file = tmp_path / "a.aiff"
    soundfile.write(file, np.zeros(16000, "f4"), 16000)
    with pytest.raises(AudioError, match="this file is not a"):
        load_recording(str(file), 16_000)


def test_the_error_of_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "gradio":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PluginError, match=r"pip install 'diffa-audio\[ui\]'"):
        require()


def test_a_port_in_use_is_an_error_before_a_model_is_loaded(monkeypatch):
    import importlib
    import socket

    ui = importlib.import_module("diffa.cli.ui")
    monkeypatch.setattr(ui, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DiffaError, match=f"cannot listen on 127.0.0.1:{port}: .*--port"):
            ui.ui(port=port)
