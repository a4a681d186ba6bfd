"""A first visitor's way through `diffa ui`, timed and pictured: python benchmarks/screenshots.py.

Starts the command as a user would, opens the page in a headless Chromium, clicks an example and
waits for the whole answer. Every round is a fresh browser. Pictures go to docs/pictures, figures to
benchmarks/results/ui.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from reports import write_report

ROOT = Path(__file__).parents[1]
WAIT = 180  # seconds: a busy machine may take its time
COLOURS = 256  # of the pictures' palettes


def main() -> None:
    """Serve, visit, picture, write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "ui.json")
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    args = parser.parse_args()
    if args.chromium is None:
        sys.exit("no chromium is installed: name one with --chromium")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    begin = time.perf_counter()
    command = [sys.executable, "-m", "diffa", "ui", "--spec", args.spec, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()  # printed once the page is served
            ready = time.perf_counter() - begin
            print(line.strip())
            visits = visit(address, args)
        finally:
            server.terminate()
    report = {
        "spec": args.spec,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_1min": round(os.getloadavg()[0], 2),
        "command_to_ready_s": round(ready, 2),
        "open_to_usable_s": [round(v["usable"], 2) for v in visits],
        "open_to_first_answer_s": [round(v["answered"], 2) for v in visits],
        "median_open_to_first_answer_s": round(statistics.median(v["answered"] for v in visits), 2),
        "bound_s": 15,
    }
    write_report(report, args.json)
    print(json.dumps(report, indent=1))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def visit(address: str, args: argparse.Namespace) -> list[dict[str, float]]:
    """Time some visits; picture the last one, with two sampler presets, and a phone."""
    from playwright.sync_api import sync_playwright

    visits = []
    with sync_playwright() as running:
        for _ in range(args.rounds):
            browser = running.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
            page = open_page(browser, 1100, 900)
            visits.append(timed(page, address))
            if len(visits) == args.rounds:
                pictures(browser, page, address, args.pictures)
            browser.close()
    return visits


def open_page(browser: Any, width: int, height: int) -> Any:
    """A fresh visitor's tab."""
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.set_default_timeout(WAIT * 1000)
    return page


def timed(page: Any, address: str) -> dict[str, float]:
    """Seconds from opening the page until it can be used, and until an answer is whole."""
    begin = time.perf_counter()
    page.goto(address)
    example = page.get_by_role("button", name="Two speakers")
    example.wait_for()
    usable = time.perf_counter() - begin
    example.click()
    page.locator("#numbers-first b").wait_for()
    return {"usable": usable, "answered": time.perf_counter() - begin}


def pictures(browser: Any, page: Any, address: str, folder: Path) -> None:
    """Picture an answer half-way, two sampler presets side by side, and a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    page.locator("#sound svg image").wait_for()
    page.locator("#replay-first input[type=range]").focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(1500)
    save(page, folder / "ui.png")
    page.get_by_label("Two sampler presets side by side").check()
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#comparison table").wait_for()
    page.wait_for_timeout(500)
    top = page.locator("#answer-first").bounding_box()["y"] - 90
    high = page.evaluate("document.documentElement.scrollHeight") - top
    save(page, folder / "ui-compare.png", {"x": 0, "y": top, "width": 1100, "height": high})
    phone = open_page(browser, 390, 844)
    timed(phone, address)
    phone.wait_for_timeout(500)
    save(phone, folder / "ui-phone.png")


def save(page: Any, path: Path, clip: dict[str, float] | None = None) -> None:
    """Write a picture with a small palette: a third of the size, and nothing is lost to the eye."""
    from PIL import Image

    image = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip)))
    small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
