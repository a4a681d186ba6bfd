"""VoiceBench (MatthewCYM/VoiceBench): spoken instructions in nine subsets, each by its rules."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from diffa.errors import SpecError, suggest
from diffa.evaluation.files import Table, as_jsonl
from diffa.evaluation.items import (
    EvaluationError,
    Fields,
    Question,
    Reading,
    Readings,
    Row,
    text_of,
)
from diffa.evaluation.prompts import VOICEBENCH_DIFFA
from diffa.evaluation.scores import score
from diffa.evaluation.suites import ifeval, phrases


class Subset(NamedTuple):
    """How a subset is scored (its kind), and DIFFA's answer length and block."""

    kind: str
    max_tokens: int
    block_length: int


SUBSETS = {
    "alpacaeval": Subset("open", 128, 32),
    "alpacaeval_full": Subset("open", 128, 32),
    "commoneval": Subset("open", 128, 32),
    "wildvoice": Subset("open", 128, 32),
    "sd-qa": Subset("qa", 128, 32),
    "mmsu": Subset("mcq", 16, 16),
    "openbookqa": Subset("mcq", 16, 16),
    "bbh": Subset("bbh", 128, 32),
    "ifeval": Subset("ifeval", 256, 32),
    "advbench": Subset("harm", 128, 32),
}
NINE = tuple(name for name in SUBSETS if name != "alpacaeval")
SEVEN = tuple(name for name in NINE if name not in ("wildvoice", "bbh"))
JUDGED = ("open", "qa")
_PARSERS = {
    "open": ("vb-open/official", "vb-open/every-row"),
    "qa": ("vb-sdqa/panda+gpt", "vb-sdqa/gpt"),
    "mcq": ("vb-mcq/official", "vb-mcq/fixed"),
    "bbh": ("vb-bbh/official", "vb-bbh/fixed"),
    "ifeval": ("vb-ifeval/mean-of-four", "vb-ifeval/prompt-strict"),
    "harm": ("vb-advbench/official", "vb-advbench/spoken"),
}
_LACKING = {"mcq": "reference", "bbh": "reference", "qa": "reference", "ifeval": "prompt"}
_LETTERS = dict.fromkeys("ABCD", "")


class VoiceBench:
    """One subset of VoiceBench. The official input is audio alone, without a system turn.

    Args:
        subset: its name in the data set.

    Raises:
        SpecError: there is no such subset.
    """

    name = "voicebench"
    key = "response"
    prompts: tuple[str, ...] = ("voicebench@official", "voicebench@diffa")
    groups: tuple[tuple[str, ...], ...] = (("task",), ("domain",), ("accent",))
    lower = False

    def __init__(self, subset: str) -> None:
        if subset not in SUBSETS:
            raise SpecError(f"voicebench has no subset {subset!r}{suggest(subset, SUBSETS)}")
        self.subset, self.kind = subset, SUBSETS[subset].kind
        self.metric = "score" if self.kind == "open" else "accuracy"
        official, fixed = _PARSERS[self.kind]
        self.parsers: Mapping[str, str] = {"official": official, "fixed": fixed}

    def check(self, fields: Fields) -> str:
        """Return what a row lacks to be scored."""
        lacking = _LACKING.get(self.kind)
        if lacking and fields.get(lacking) is None:
            return f"has no {lacking}"
        if self.kind == "bbh" and phrases.bbh_task(str(fields.get("id"))) is None:
            return f"has the id {fields.get('id')!r}, which names none of BBH's four tasks"
        if self.kind == "bbh" and str(fields["reference"]).lower() not in phrases.TRUTHS:
            return f"has the reference {fields['reference']!r}, not yes, no, (a) or (b)"
        return ifeval.lacks(fields) if self.kind == "ifeval" else ""

    def ask(self, fields: Fields, prompt: str) -> Question:
        """Audio alone, or with DIFFA's instruction, at the lengths of DIFFA's appendix."""
        about = SUBSETS[self.subset]
        choices = tuple("ABCD") if self.kind == "mcq" else ()
        if prompt == "voicebench@diffa":
            return Question(VOICEBENCH_DIFFA, choices, about.max_tokens, about.block_length)
        return Question("", choices, about.max_tokens, about.block_length, system="")

    def read(self, fields: Fields, draw: random.Random) -> Readings:
        """Both readings by the subset's rules."""
        response = text_of(fields.get(self.key))
        match self.kind:
            case "open":
                return judged_open(fields.get("score"))
            case "qa":
                return judged_answer(fields, response)
            case "mcq":
                return phrases.mcq(response, str(fields["reference"]), draw, _LETTERS)
            case "bbh":
                return phrases.bbh(response, str(fields["id"]), str(fields["reference"]), draw)
            case "ifeval":
                return ifeval.read(fields, response)
        return phrases.refusal(response)

    def missed(self, fields: Fields) -> Readings:
        """Wrong for both parsers; the least of five points where a judge gives points."""
        least = 1.0 if self.kind == "open" else 0.0
        parts = (0.0, 0.0, 0.0, 0.0, 1.0) if self.kind == "ifeval" else ()
        return {name: Reading(None, least, parts=parts) for name in self.parsers}

    def summary(self, parser: str, readings: Sequence[Reading]) -> dict[str, Any]:
        """What the official script reports besides, and versions that move scores."""
        if self.kind == "ifeval" and parser == "official":
            return ifeval.summary(readings)
        if self.kind == "mcq" and parser == "official":
            return {"fail": round(sum(r.guessed for r in readings) / len(readings), 6)}
        if self.kind == "qa" and parser == "official":
            return {"qa_metrics": qa_metrics_version()}
        return {}

    def export(self, rows: Sequence[Row], stem: str) -> dict[str, str]:
        """JSONL as ``main.py`` writes it: the columns without audio, and ``response``."""
        split = "usa" if self.subset == "sd-qa" else "test"
        return {f"diffa-{self.subset}-{split}-audio.jsonl": as_jsonl([r.fields for r in rows])}


def judged_open(replies: Any) -> Readings:
    """The mean of all points of all rows, and, fixed, of each row's own mean.

    A row that the judge did not rate leaves the official mean, and gets the least points in the
    fixed one; both wait for rows that no judge was asked about (None).
    """
    if replies is None:
        return dict.fromkeys(("official", "fixed"), Reading(None, 0.0, 0.0))
    found = [points(reply) for reply in replies]
    kept = [value for value in found if value is not None]
    answer = ", ".join(f"{value:g}" for value in kept) or None
    mean = sum(kept) / len(kept) if kept else 1.0
    return {
        "official": Reading(answer, sum(kept), float(len(kept))),
        "fixed": Reading(answer, mean),
    }


def points(reply: Any) -> float | None:
    """A judge's points: the reply as a number, else the first ``[[number]]``."""
    try:
        return float(reply)
    except (TypeError, ValueError):
        found = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", str(reply))
        return float(found[1]) if found else None


def judged_answer(fields: Fields, response: str) -> Readings:
    """The mean of PEDANT and the judge's majority, and, fixed, the majority alone."""
    if fields.get("score") is None:
        return dict.fromkeys(("official", "fixed"), Reading(None, 0.0, 0.0))
    replies = [str(reply).lower() for reply in fields["score"]]
    yes = replies.count("yes") > len(replies) / 2
    fixed = Reading("yes" if yes else "no" if replies else None, float(yes))
    panda = pedant(str(fields["reference"]), response, text_of(fields.get("prompt")))
    if panda is None or not replies:
        return {"official": Reading(None, 0.0, 0.0), "fixed": fixed}
    return {"official": Reading(fixed.answer, (panda + yes) / 2), "fixed": fixed}


def pedant(reference: str, response: str, prompt: str) -> bool | None:
    """PEDANT's verdict, arguments in the official script's order; None where it cannot judge."""
    scorer, _ = _pedant()
    if scorer is None:
        return None
    return bool(scorer.evaluate([reference.lower()], response.lower(), prompt.lower()))


@lru_cache
def _pedant() -> tuple[Any, str]:
    """The judge, once it has judged something, and why there is none."""
    try:
        judge = import_module("qa_metrics.pedant").PEDANT()
        judge.evaluate(["a"], "a", "a")
    except ImportError:
        return None, "not installed: no official score (pip install qa_metrics)"
    except Exception as error:  # its classifiers are fetched when it begins: anything may go wrong
        return None, f"PEDANT does not begin: no official score ({error})".replace("\n", " ")
    return judge, ""


def qa_metrics_version() -> str:
    """The version of qa_metrics, which moves PEDANT's scores by tens of points."""
    fault = _pedant()[1] if _pedant.cache_info().currsize else ""  # asked only where it judged
    try:
        return fault or version("qa_metrics")
    except PackageNotFoundError:
        return "not installed: no official score (pip install qa_metrics)"


def overall(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Score every subset's file in a folder; ``overall_7`` is DIFFA's mean, ``overall_9`` the
    leaderboard's, both of 100 and None while a subset is missing.

    Of judged subsets the files with judgements (``result-...``) are taken.
    """
    from diffa.evaluation.score_file import subset_of

    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.jsonl"), key=lambda f: f.name.startswith("result-")):
        if name := subset_of(file):
            files[name] = file
    if not files:
        raise EvaluationError(f"{folder} holds no file that names a subset of voicebench")
    reports = {
        name: score(VoiceBench(name), Table(file).rows, seed=seed)[0]
        for name, file in files.items()
    }
    made: dict[str, Any] = {
        "suite": "voicebench",
        "items": sum(r["items"] for r in reports.values()),
    }
    for parser in ("official", "fixed"):
        column = {name: _of_100(name, report[parser]) for name, report in reports.items()}
        made[parser] = {
            "parser": f"voicebench/{parser}",
            **column,
            "overall_7": _mean(column, SEVEN),
            "overall_9": _mean(column, NINE),
        }
    return {**made, "subsets": reports}


def _of_100(name: str, found: Mapping[str, Any]) -> float | None:
    """A subset's number as the leaderboard adds it up: points of five count twenty each."""
    value = found["score"] if SUBSETS[name].kind == "open" else found["accuracy"]
    times = 20 if SUBSETS[name].kind == "open" else 100
    return None if value is None else round(value * times, 4)


def _mean(column: Mapping[str, float | None], names: Sequence[str]) -> float | None:
    values = [value for name in names if (value := column.get(name)) is not None]
    return round(sum(values) / len(names), 4) if len(values) == len(names) else None
