"""Defaults of the command line that the environment sets."""

from __future__ import annotations

import pytest

from diffa.cli.models import default_spec


def test_the_environment_names_the_default_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFA_SPEC", raising=False)
    assert default_spec() == "nano"
    monkeypatch.setenv("DIFFA_SPEC", "mine.yaml")
    assert default_spec() == "mine.yaml"
    monkeypatch.setenv("DIFFA_SPEC", " ")
    assert default_spec() == "nano"
