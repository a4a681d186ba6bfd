"""The parts shown in docs/plugins.md conform to the suites that the page speaks of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from diffa.testing import AdapterSuite, EncoderSuite, ObjectiveSuite, SamplerSuite, failures

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"
KINDS = {
    "Average": (AdapterSuite, {}),
    "Frames": (EncoderSuite, {}),
    "LeftToRight": (SamplerSuite, {}),
    "Half": (ObjectiveSuite, {"random": True}),
}


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """The classes that the page defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "class Average" in block]
    names: dict[str, Any] = {"__name__": "docs_plugins"}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize("name", KINDS)
def test_a_part_shown_in_the_docs_conforms(name: str, shown: dict[str, Any]) -> None:
    suite, flags = KINDS[name]
    assert failures(type("Shown", (suite,), {"part": shown[name], **flags})) == {}
