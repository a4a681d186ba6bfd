"""Attacks of the benchmark, for a second each: ordinary questions are answered, nothing is left."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_ordinary_questions_are_answered_beside_hostile_clients(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    hostile = importlib.import_module("serve_hostile")
    with hostile.slow_host() as host:
        server = hostile.Server(host)
        try:
            report = hostile.attack_all(server, hostile.attacks(host), 1.0, rest=5)
        finally:
            server.stop()
    assert {name: one["failed"] for name, one in report["under"].items()} == dict.fromkeys(
        report["under"], 0
    )
    before, after = report["before"], report["at_rest"]
    assert after["mib"] <= before["mib"] + 300
    assert after["descriptors"] <= before["descriptors"] + 2
    assert after["other_threads"] == before["other_threads"] == {}
