"""``import diffa`` and the light commands need neither torch nor transformers."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys

import pytest

HEAVY = "{'torch', 'torchaudio', 'transformers', 'numpy', 'yaml', 'huggingface_hub'}"


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True
    )


def seconds() -> float:
    """How long ``import diffa`` takes in a fresh interpreter, as the interpreter measures it."""
    report = run("import diffa", "-X", "importtime").stderr
    found = re.search(r"\|\s*(\d+) \| diffa$", report, re.MULTILINE)
    assert found, report
    return int(found.group(1)) / 1e6


def test_import_takes_less_than_a_fifth_of_a_second():
    assert statistics.median(seconds() for _ in range(5)) < 0.2


@pytest.mark.parametrize(
    "code",
    [
        "import diffa; dir(diffa); diffa.errors.SpecError",
        "import diffa; diffa.available('adapter')",
        "import diffa.cli",
        "import diffa.cli.doctor",
    ],
)
def test_light_imports_stay_light(code):
    unwanted = f"sorted({HEAVY} & set(sys.modules))"
    assert run(f"import sys; {code}; print({unwanted})").stdout.strip() == "[]"


def test_public_names_resolve_and_unknown_ones_do_not():
    code = (
        "import diffa\n"
        "assert set(diffa.__all__) <= set(dir(diffa))\n"
        "for name in diffa.__all__: assert getattr(diffa, name) is not None, name\n"
        "try: diffa.bild\n"
        "except AttributeError as error: assert 'bild' in str(error)\n"
        "else: raise SystemExit('diffa.bild exists')"
    )
    run(code)
