"""The page in a headless browser: upload, ask, see the answer, replay it; keyboard and phone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diffa
from diffa.nano.demo import recordings
from diffa.spec.spec import Spec
from diffa.ui.sampler_options import sampler_presets

CHROMIUM = os.environ.get("DIFFA_CHROMIUM") or shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium is installed here", allow_module_level=True)
pytest.importorskip("gradio", reason="the page needs the extra ui")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SOON = 300_000  # milliseconds until a wait is given up: two cores may be very busy
FLAGS = [
    "--no-sandbox",  # tests run as root in containers
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A page that serves nano."""
    import gradio

    from diffa.ui.launch import launch

    yield launch(diffa.build("nano"), "nano", port=None, block=False)
    gradio.close_all(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened by a visitor; anything asked of another host fails the test."""
    context = browser.new_context(permissions=["microphone"])
    context.set_default_timeout(SOON)
    opened = context.new_page()
    outside: list[str] = []

    def note(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            outside.append(request.url)

    opened.on("request", note)
    opened.goto(address)
    opened.get_by_role("button", name="Ask", exact=True).wait_for()
    yield opened
    context.close()
    assert outside == []


def answered(page: Any, key: str = "first") -> str:
    """Wait for an answer that is whole, and read it."""
    page.locator(f"#numbers-{key} b").wait_for()
    return str(page.locator(f"#answer-{key} textarea").input_value())


def forward(page: Any) -> tuple[int, int]:
    """Which forward pass the canvas shows, of how many."""
    text = page.locator("#canvas-first .d-note").inner_text()
    found = re.search(r"forward pass (\d+) of (\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def test_an_uploaded_file_gets_an_answer_that_the_keyboard_replays(page: Any) -> None:
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("There is no recording yet: upload a file").wait_for()
    page.locator("#audio input[type=file]").set_input_files(recordings() / "digits.flac")
    page.locator("#sound svg image").wait_for()
    page.get_by_label("Question").fill("Please transcribe the audio to text.")
    page.get_by_label("Question").press("Enter")
    text = answered(page)
    plain = diffa.build("nano").answer(
        recordings() / "digits.flac", "Please transcribe the audio to text."
    )
    assert text == plain.text
    assert forward(page) == (plain.num_forwards, plain.num_forwards)
    masks = page.locator("#canvas-first .d-canvas .d-mask")
    assert masks.count() == 0
    slider = page.locator("#replay-first input[type=range]")
    slider.focus()
    slider.press("Home")
    page.get_by_text(f"after forward pass 1 of {plain.num_forwards}").wait_for()
    assert masks.count() > 0  # early on most is undecided
    slider.press("ArrowRight")
    page.get_by_text(f"after forward pass 2 of {plain.num_forwards}").wait_for()
    for _ in range(6):
        slider.press("ArrowRight")  # faster than the page can draw: the last one counts
    last = min(8, plain.num_forwards)
    page.get_by_text(f"after forward pass {last} of {plain.num_forwards}").wait_for()
    page.get_by_role("button", name="Play steps").click()
    page.get_by_text(f"after forward pass {plain.num_forwards} of {plain.num_forwards}").wait_for()


@pytest.mark.slow
def test_two_presets_are_compared_about_an_example(page: Any) -> None:
    page.get_by_label("Two sampler presets side by side").check()
    page.get_by_role("button", name="A melody").click()
    page.locator("#comparison table").wait_for()
    first, second = (page.locator(f"#numbers-{key}").inner_text() for key in ("first", "second"))
    names = list(sampler_presets(Spec.read("nano").resolve()))
    assert re.match(rf"{names[0]}: \d+ forward passes", first)
    assert re.match(rf"{names[-1]}: \d+ forward passes", second)
    heads = page.locator("#comparison thead th").all_inner_texts()
    rows = page.locator("#comparison tbody th").all_inner_texts()
    assert heads == [names[0], names[-1]]
    assert rows == ["Forward passes", "Tokens of the answer", "Tokens per pass", "Seconds"]
    assert answered(page, "second")


@pytest.mark.slow
def test_errors_are_sentences_on_the_page(page: Any, tmp_path: Path) -> None:
    alert = page.get_by_role("alert").filter(has_text=re.compile(r"\.$"))
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"RIFF this is no recording")
    page.locator("#audio input[type=file]").set_input_files(noise)
    page.get_by_text("This file cannot be decoded: Format not recognised.").wait_for()
    assert alert.count() >= 1 and "Traceback" not in page.content()


@pytest.mark.slow
def test_a_phone_shows_everything_in_one_column(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    context.set_default_timeout(SOON)
    page = context.new_page()
    page.goto(address)
    page.get_by_role("button", name="Spoken digits").tap()
    assert answered(page)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, "the page scrolls sideways"
    letters = page.locator("#canvas-first .d-canvas")
    assert float(letters.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) >= 16
    context.close()


@pytest.mark.slow
def test_the_tab_key_reaches_every_control(page: Any) -> None:
    expected = {"Spoken digits", "Transcribe", "Ask"}
    named = "(document.activeElement.innerText || document.activeElement.ariaLabel || '').trim()"
    for _ in range(60):
        page.keyboard.press("Tab")
        expected.discard(page.evaluate(named))
        if not expected:
            break
    assert expected == set()


@pytest.mark.slow
def test_a_recording_from_the_microphone_gets_an_answer(page: Any) -> None:
    page.get_by_role("button", name="Record audio").click()  # the tab of the microphone
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(800)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.locator("#sound svg image").wait_for()
    page.get_by_role("button", name="Describe").click()
    answered(page)
    assert forward(page)[1] >= 1
