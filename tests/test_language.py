"""Plain English: every help text, option and public docstring exists and reads like a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from helpers import ROOT

from diffa.cli import app
from diffa.spec import registry
from diffa.spec.docstrings import option_descriptions
from diffa.spec.schema import read_schema

MAX_WORDS = 25

# Words of this project's past that its readers do not know, and what to write instead.
PROSE = {
    r"aids": "auxiliary losses",
    r"blur(red|s)?": "recognition errors, noise",
    r"by heart": "memorised",
    r"cohorts?": "batch",
    r"ears": "encoder cache",
    r"foresees?": "estimates",
    r"forwards": "forward passes",
    r"got wrong": "corrupted",
    r"guess(es|ed)?": "prediction",
    r"heard": "encoded, embedded",
    r"hears?": "encodes",
    r"kin": "related",
    r"lanes?": "worker",
    r"quota": "transfer schedule",
    r"roomy": "answer padding",
    r"sees": "attends to",
    r"told": "passed, reported",
    r"system turns?": "system prompt",
    r"sampler settings?": "sampler preset",
    r"wired": "set automatically",
}

# Names that say nothing about the value, and names of this project's past.
NAMES = {
    "aids", "asked", "begun", "chosen", "cohort", "ears", "found", "given", "hears", "heard",
    "held", "kept", "kin", "lane", "made", "opened", "pull", "roomy", "said", "say", "seen", "sees",
    "shown", "spoken", "taken", "telling", "told", "wanted", "weigh",
}  # fmt: skip


# Names that are the field's word in one place: the answers of a preference pair.
ALLOWED = {("trainers/learners/preferences.py", "chosen")}


class Text(NamedTuple):
    """A text and where it stands."""

    where: str
    text: str


def sentence_faults(text: str, limit: int = MAX_WORDS) -> list[str]:
    """Return what is wrong with a text of one or more sentences."""
    if not text.strip():
        return ["missing"]
    faults = []
    if not re.match(r"[A-Z0-9`\"'(*\[]", text.strip()):
        faults.append("does not begin with a capital")
    if not text.strip().endswith((".", ":")):
        faults.append("does not end with a full stop")
    for sentence in re.split(r"(?<=[.;:])\s+|\n\s*\n", text.strip()):
        if len(sentence.split()) > limit:
            faults.append(f"{len(sentence.split())} words: {sentence[:60]!r}")
    return faults + word_faults(text)


def word_faults(text: str) -> list[str]:
    """Return the words of a text that readers do not know."""
    plain = re.sub(r"``?[^`]*``?", "", text)
    return [
        f"{match[0]!r}: write {better!r}"
        for pattern, better in PROSE.items()
        if (match := re.search(rf"\b{pattern}\b", plain, re.IGNORECASE))
    ]


def help_texts() -> Iterator[Text]:
    """Every command's and every parameter's help text."""

    def walk(command: Any, path: str) -> Iterator[Text]:
        yield Text(path, command.help or "")
        for parameter in command.params:
            if parameter.name != "help":
                yield Text(f"{path} {parameter.opts[0]}", parameter.help or "")
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{path} {name}")

    yield from walk(typer.main.get_command(app), "diffa")


def option_texts() -> Iterator[Text]:
    """Every option of every built-in part."""
    for kind in registry.PLUGIN_KINDS:
        for part in registry.list_parts(kind):
            if part.is_builtin:
                cls = registry.load_part(kind, part.name)
                texts = option_descriptions(cls)
                for option in read_schema(cls).options:
                    where = f"{kind} {part.name}, option {option}"
                    yield Text(where, texts.get(option, ""))


def modules() -> Iterator[tuple[Path, ast.Module]]:
    """Every module of the package: its path and its syntax tree."""
    for path in sorted((ROOT / "diffa").rglob("*.py")):
        yield path.relative_to(ROOT / "diffa"), ast.parse(path.read_text("utf-8"))


def docstrings(path: Path, tree: ast.Module) -> Iterator[Text]:
    """The docstrings of a module, its public classes and functions, and their public methods."""
    yield Text(str(path), ast.get_docstring(tree) or "")

    def walk(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Text]:
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if child.name.startswith("_") or is_overload(child):
                continue
            yield Text(f"{prefix}{child.name}", ast.get_docstring(child) or "")
            if isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")

    yield from walk(tree, f"{path}: ")


def is_overload(node: ast.AST) -> bool:
    """Whether a function is a signature for type checkers, or sets a property."""
    names = {ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())}
    return "overload" in names or any(name.endswith(".setter") for name in names)


def assigned_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that a module binds: variables, attributes, parameters, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


@pytest.mark.parametrize("entry", list(help_texts()), ids=lambda entry: entry.where)
def test_help_text_is_a_plain_sentence(entry: Text) -> None:
    assert sentence_faults(entry.text) == []


def test_options_of_parts_are_described_in_plain_sentences() -> None:
    faults = [
        f"{entry.where}: {fault}"
        for entry in option_texts()
        for fault in sentence_faults(entry.text)
    ]
    assert not faults, "\n".join(faults)


def test_public_docstrings_begin_with_a_plain_sentence() -> None:
    faults = []
    for path, tree in modules():
        for where, text in docstrings(path, tree):
            first = text.split("\n\n")[0]
            rest = text[len(first) :]
            faults += [f"{where}: {fault}" for fault in sentence_faults(first) + word_faults(rest)]
    assert not faults, "\n".join(faults)


def test_names_are_nouns_that_say_what_a_value_is() -> None:
    faults = [
        f"diffa/{path}:{line} {name}"
        for path, tree in modules()
        for line, name in assigned_names(tree)
        if name.strip("_").lower() in NAMES and (path.as_posix(), name) not in ALLOWED
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "missing"),
        ("of the backbone.", "capital"),
        ("Data type", "full stop"),
        (" ".join(["Word"] * 26) + ".", "26 words"),
        ("Number of forwards.", "forward passes"),
    ],
)
def test_the_check_of_a_sentence_finds_the_fault(text: str, fault: str) -> None:
    assert any(fault in found for found in sentence_faults(text))
