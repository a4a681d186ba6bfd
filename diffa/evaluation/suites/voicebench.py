"""VoiceBench (MatthewCYM/VoiceBench): spoken instructions in ten subsets, each with its rules."""

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
from diffa.evaluation.files import BenchmarkData
from diffa.evaluation.items import (
    EvaluationError,
    Fields,
    Item,
    ItemScore,
    ItemScores,
    Question,
    Suite,
    as_text,
    to_jsonl,
)
from diffa.evaluation.prompts import VOICEBENCH_DIFFA
from diffa.evaluation.scores import score_items
from diffa.evaluation.suites import ifeval, phrases


class Subset(NamedTuple):
    """The kind of scoring of a subset, and DIFFA's answer length and block length."""

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
_NINE = tuple(name for name in SUBSETS if name != "alpacaeval")  # the leaderboard's mean
_SEVEN = tuple(name for name in _NINE if name not in ("wildvoice", "bbh"))  # DIFFA's mean
_PARSERS = {
    "open": ("vb-open/official", "vb-open/every-row"),
    "qa": ("vb-sdqa/panda+gpt", "vb-sdqa/gpt"),
    "mcq": ("vb-mcq/official", "vb-mcq/fixed"),
    "bbh": ("vb-bbh/official", "vb-bbh/fixed"),
    "ifeval": ("vb-ifeval/mean-of-four", "vb-ifeval/prompt-strict"),
    "harm": ("vb-advbench/official", "vb-advbench/spoken"),
}
_REQUIRED = {"mcq": "reference", "bbh": "reference", "qa": "reference", "ifeval": "prompt"}
_NOT_INSTALLED = "not installed: no official score (pip install qa_metrics)"


class VoiceBench(Suite):
    """One subset of VoiceBench.

    The official input is audio alone, without a system prompt. ``voicebench@diffa`` adds DIFFA's
    instruction with the lengths of its appendix, and keeps the line break at its end, as DIFFA's
    prompt builder does; ``voicebench@diffa-trimmed`` lets the chat template strip it.
    ``voicebench@diffa-script`` has the lengths of the released script: 16 tokens in one block.

    Args:
        subset: Its name in the data set.

    Raises:
        SpecError: There is no such subset.
    """

    name = "voicebench"
    response_column = "response"
    prompts = (
        "voicebench@official",
        "voicebench@diffa",
        "voicebench@diffa-trimmed",
        "voicebench@diffa-script",
    )
    groups = (("task",), ("domain",), ("accent",))

    def __init__(self, subset: str) -> None:
        if subset not in SUBSETS:
            raise SpecError(f"voicebench has no subset {subset!r}{suggest(subset, SUBSETS)}")
        self.subset, self.kind = subset, SUBSETS[subset].kind
        self.metric = "score" if self.kind == "open" else "accuracy"
        self.needs_judge = self.kind in ("open", "qa")
        official, fixed = _PARSERS[self.kind]
        self.parsers: Mapping[str, str] = {"official": official, "fixed": fixed}

    def find_fault(self, fields: Fields) -> str:
        """Return what an item lacks to be scored."""
        required = _REQUIRED.get(self.kind)
        if required and fields.get(required) is None:
            return f"has no {required}"
        if self.kind == "bbh" and phrases.bbh_task(str(fields.get("id"))) is None:
            return f"has the id {fields.get('id')!r}, which names none of BBH's four tasks"
        if self.kind == "bbh" and str(fields["reference"]).lower() not in phrases.BBH_ANSWERS:
            return f"has the reference {fields['reference']!r}, not yes, no, (a) or (b)"
        return ifeval.find_ifeval_fault(fields) if self.kind == "ifeval" else ""

    def question(self, fields: Fields, prompt: str) -> Question:
        """Return audio alone or DIFFA's instruction, with the lengths of DIFFA's appendix."""
        _, max_tokens, block_length = SUBSETS[self.subset]
        if prompt == "voicebench@diffa-script":
            max_tokens = block_length = 16
        choices = tuple("ABCD") if self.kind == "mcq" else ()
        if prompt == "voicebench@official":
            return Question("", choices, max_tokens, block_length, system="")
        trim = prompt == "voicebench@diffa-trimmed"
        return Question(VOICEBENCH_DIFFA, choices, max_tokens, block_length, trim=trim)

    def score(self, fields: Fields, rng: random.Random) -> ItemScores:
        """Score a response by the subset's rules."""
        response = as_text(fields.get(self.response_column))
        reference = str(fields.get("reference"))
        match self.kind:
            case "open":
                return score_open(fields.get("score"))
            case "qa":
                return score_sdqa(fields, response)
            case "mcq":
                return phrases.score_mcq(response, reference, rng, dict.fromkeys("ABCD", ""))
            case "bbh":
                return phrases.score_bbh(response, str(fields["id"]), reference, rng)
            case "ifeval":
                return ifeval.score_ifeval(fields, response)
        return phrases.score_refusal(response)

    def score_missing(self, fields: Fields) -> ItemScores:
        """Return wrong for both parsers; the lowest of five points if a judge gives points."""
        lowest = 1.0 if self.kind == "open" else 0.0
        counts = (0.0, 0.0, 0.0, 0.0, 1.0) if self.kind == "ifeval" else ()
        return {name: ItemScore(None, lowest, counts=counts) for name in self.parsers}

    def extra_metrics(self, parser: str, scores: Sequence[ItemScore]) -> dict[str, Any]:
        """Return the official script's further numbers, and versions that move scores."""
        if parser != "official":
            return {}
        match self.kind:
            case "ifeval":
                return ifeval.ifeval_metrics(scores)
            case "mcq":
                return {"fail": round(sum(s.is_random for s in scores) / len(scores), 6)}
            case "qa":
                return {"qa_metrics": _qa_metrics_version()}
        return {}

    def export(self, items: Sequence[Item], stem: str) -> dict[str, str]:
        """Return JSONL as ``main.py`` writes it: the columns without audio, and ``response``."""
        split = "usa" if self.subset == "sd-qa" else "test"
        name = f"diffa-{self.subset}-{split}-audio.jsonl"
        return {name: to_jsonl([item.fields for item in items])}


def score_open(replies: Any) -> ItemScores:
    """Score by a judge's points. Official: mean over all replies. Fixed: mean over items.

    An item without points leaves the official mean and gets the lowest points in the fixed one.
    Both exclude items that no judge was asked about (None).
    """
    if replies is None:
        return dict.fromkeys(("official", "fixed"), ItemScore(None, 0.0, 0.0))
    points = [value for reply in replies if (value := _parse_points(reply)) is not None]
    answer = ", ".join(f"{value:g}" for value in points) or None
    return {
        "official": ItemScore(answer, sum(points), float(len(points))),
        "fixed": ItemScore(answer, sum(points) / len(points) if points else 1.0),
    }


def score_sdqa(fields: Fields, response: str) -> ItemScores:
    """Score SD-QA. Official: mean of PEDANT and the judge's majority. Fixed: the majority."""
    excluded = ItemScore(None, 0.0, 0.0)
    if fields.get("score") is None:
        return {"official": excluded, "fixed": excluded}
    replies = [str(reply).lower() for reply in fields["score"]]
    yes = replies.count("yes") > len(replies) / 2
    fixed = ItemScore("yes" if yes else "no" if replies else None, float(yes))
    pedant = pedant_verdict(str(fields["reference"]), response, as_text(fields.get("prompt")))
    if pedant is None or not replies:
        return {"official": excluded, "fixed": fixed}
    return {"official": ItemScore(fixed.answer, (pedant + yes) / 2), "fixed": fixed}


def pedant_verdict(reference: str, response: str, prompt: str) -> bool | None:
    """Return PEDANT's verdict with the official order of arguments; None if it cannot judge."""
    scorer, _ = _load_pedant()
    if scorer is None:
        return None
    return bool(scorer.evaluate([reference.lower()], response.lower(), prompt.lower()))


def score_folder(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Score every subset's file in a folder.

    Of judged subsets the files with judgements (``result-...``) are taken.

    Returns:
        A report with each subset's number and two means of 100: ``overall_7`` (DIFFA's) and
        ``overall_9`` (the leaderboard's). A mean is None while a subset is missing.

    Raises:
        EvaluationError: No file's name contains a subset.
    """
    files: dict[str, Path] = {}
    # result-... comes last, and so replaces the file without judgements.
    for file in sorted(folder.rglob("*.jsonl"), key=lambda f: f.name.startswith("result-")):
        if name := subset_from_name(file):
            files[name] = file
    if not files:
        raise EvaluationError(f"{folder} holds no file that names a subset of voicebench")
    reports = {
        name: score_items(VoiceBench(name), BenchmarkData(file).items, seed=seed)[0]
        for name, file in files.items()
    }
    report: dict[str, Any] = {
        "suite": "voicebench",
        "items": sum(r["items"] for r in reports.values()),
    }
    for parser in ("official", "fixed"):
        column = {name: _percent(name, entry[parser]) for name, entry in reports.items()}
        report[parser] = {
            "parser": f"voicebench/{parser}",
            **column,
            "overall_7": _mean(column, _SEVEN),
            "overall_9": _mean(column, _NINE),
        }
    return {**report, "subsets": reports}


def subset_from_name(path: Path) -> str:
    """Return the subset that a file's or folder's name contains; empty if there is none."""
    for part in (path.name, path.parent.name):
        words = f"-{part.lower().replace('.', '-').replace('_', '-')}-"
        for name in sorted(SUBSETS, key=len, reverse=True):
            if f"-{name.replace('_', '-')}-" in words:
                return name
    return ""


_POINTS = re.compile(
    r"(?:[^\w-]|_)*(?:(?:the )?(?:score|rating)(?: is)?(?:[^\w-]|_)*)?(\d{1,3}(?:\.\d+)?)"
    r"(?:\s*(?:/|out of)\s*5)?[\W_]*",
    re.IGNORECASE,
)


def _parse_points(reply: Any) -> float | None:
    """Return a judge's points from 1 to 5, or None: a number, ``Score: 4/5``, or ``[[4]]``."""
    text = str(reply)
    match = _POINTS.fullmatch(text) or re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", text)
    points = float(match[1]) if match else 0.0
    return points if 1.0 <= points <= 5.0 else None


@lru_cache
def _load_pedant() -> tuple[Any, str]:
    """Return PEDANT after a trial, and why there is none."""
    try:
        scorer = import_module("qa_metrics.pedant").PEDANT()
        scorer.evaluate(["a"], "a", "a")
    except ImportError:
        return None, _NOT_INSTALLED
    except Exception as error:  # it downloads its classifiers when it starts
        return None, f"PEDANT does not start: no official score ({error})".replace("\n", " ")
    return scorer, ""


def _qa_metrics_version() -> str:
    """Return the version of qa_metrics, which moves PEDANT's scores by tens of points."""
    # Without a judged item PEDANT was not loaded: a report must not download its classifiers.
    fault = _load_pedant()[1] if _load_pedant.cache_info().currsize else ""
    try:
        return fault or version("qa_metrics")
    except PackageNotFoundError:
        return _NOT_INSTALLED


def _percent(name: str, entry: Mapping[str, Any]) -> float | None:
    """Return a subset's number of 100; points of five count twenty each."""
    metric, factor = ("score", 20) if SUBSETS[name].kind == "open" else ("accuracy", 100)
    return None if entry[metric] is None else round(entry[metric] * factor, 4)


def _mean(column: Mapping[str, float | None], names: Sequence[str]) -> float | None:
    values = [value for name in names if (value := column.get(name)) is not None]
    return round(sum(values) / len(names), 4) if len(values) == len(names) else None
