"""Benchmarks, where they could tell or write something wrong."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


def test_an_interval_holds_its_value_or_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    wilson = benchmark("nano", monkeypatch).wilson
    for hits in (0, 3, 10):
        found = wilson(hits, 10)
        assert found["low"] <= found["value"] == hits / 10 <= found["high"] + 1e-12
    assert wilson(15, 10) == {"value": 1.5, "low": None, "high": None, "n": 10}


def test_a_backbone_from_the_package_can_be_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"name": "llada", "checkpoint": "package:nano/llada"}
    state = {"ln_f.weight": torch.ones(4)}
    benchmark("pack_nano", monkeypatch).backbone(options, state, tmp_path)
    written = json.loads((tmp_path / "llada" / "config.json").read_text())
    assert written["model_type"] == "llada" and written["d_model"] > 0
