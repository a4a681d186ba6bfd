"""The benchmarks, by name."""

from __future__ import annotations

import importlib

from diffa.errors import SpecError, suggest
from diffa.evaluation.items import Suite

SUITES = {
    "mmsu": "diffa.evaluation.suites.mmsu:MMSU",
    "mmau": "diffa.evaluation.suites.matched:MMAU",
    "mmar": "diffa.evaluation.suites.matched:MMAR",
    "voicebench": "diffa.evaluation.suites.voicebench:VoiceBench",
    "asr": "diffa.evaluation.suites.asr:ASR",
    "spokenqa": "diffa.evaluation.suites.spokenqa:SpokenQA",
    "nano-suite": "diffa.nano.suite:Nano",
}


def suite(name: str, subset: str = "") -> Suite:
    """Return a benchmark by name; VoiceBench's parts by ``subset``. Raises SpecError."""
    if name not in SUITES:
        raise SpecError(f"there is no suite {name!r}{suggest(name, SUITES)}")
    module, _, found = SUITES[name].partition(":")
    made = getattr(importlib.import_module(module), found)
    if subset and name != "voicebench":
        raise SpecError(f"--subset is for voicebench; {name} has none")
    suite: Suite = made(subset) if name == "voicebench" else made()
    return suite
