"""The server as a process of its own: signals under load; and malformed requests by the hundred."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.serving import question, recording

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def post(port, tokens):
    """Ask over HTTP; returns the status and the answer's forwards."""
    body = {"messages": question(recording()), "max_tokens": tokens}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    try:
        with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=600) as reply:
            return reply.status, json.loads(reply.read())["diffa"]["num_forwards"]
    except urllib.error.HTTPError as error:
        return error.code, 0


def healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return json.loads(reply.read())
    except OSError:
        return None


def wait_until(true, seconds):
    until = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_at_sigterm_what_is_in_flight_finishes_and_the_process_ends_well(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "diffa", "serve", "--spec", "tiny", "--port", str(port)]
    made = subprocess.Popen(
        [*words, "--drain", "300", "--max-batch-size", "3"],
        stderr=(tmp_path / "log").open("wb"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: healthy(port), 400)
        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(post, port, 96) for _ in range(6)]
            wait_until(lambda: (healthy(port) or {}).get("num_running") == 3, 120)
            made.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert post(port, 1) == (503, 0)
            assert [future.result()[0] for future in running] == [200] * 6
        assert made.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        made.kill()


def test_malformed_requests_are_answered_with_4xx_and_nothing_else(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    fuzzing = importlib.import_module("serve_fuzz")
    with fuzzing.run_server(fuzzing.tiny_service()) as address:
        report = fuzzing.fuzz(address, 252, clients=4)
    assert report["server_errors"] == report["unanswered"] == 0, report["answers"]
    answers = report["answers"]
    assert answers["proper"] == {200: 3}
    assert answers["slow"] == {408: 1}
    for kind in ("wrong_option", "not_json", "framing", "bombs", "forms"):
        assert all(400 <= status < 500 for status in answers[kind]), (kind, answers[kind])
