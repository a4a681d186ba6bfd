"""The folder of a run: header, a line per answer as it comes, and all records at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from diffa.evaluation.items import EvaluationError
from diffa.runtime.files import expand, locked, remove_stale_drafts, write_json, write_text
from diffa.runtime.text import parse_json, to_unicode

HEADER, RECORDS, TIMES, SCORES = "run.json", "records.jsonl", "times.jsonl", "scores.json"


class RunFolder:
    """A run's folder. Each process appends lines to files of its own.

    Args:
        path: Created if it is missing.
        rank: Rank of this process.

    Raises:
        EvaluationError: The folder cannot be written.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.path, self.rank = expand(path), rank
        try:
            (self.path / "parts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"{self.path} cannot be written: {error}") from error

    def write_header(self, header: Mapping[str, Any]) -> None:
        """Write the header, or check that the folder holds a run with the same header.

        Raises:
            EvaluationError: The folder holds another run; says how the headers differ.
        """
        file = self.path / HEADER
        if not file.is_file():
            write_json(file, header)
            return
        old = parse_json(file.read_text(encoding="utf-8"))
        keys = sorted(k for k in {*old, *header} if old.get(k) != header.get(k))
        if keys:
            differences = "; ".join(_difference(k, old.get(k), header.get(k)) for k in keys[:4])
            raise EvaluationError(
                f"{self.path} holds another run ({differences}): continue it with the same "
                "options, or choose another --out"
            )

    def answers(self) -> dict[int, dict[str, Any]]:
        """Return the answers of all processes by row number."""
        return self._lines("answers")

    def times(self) -> list[dict[str, Any]]:
        """Return the seconds of each row, in the order of rows."""
        return [line for _, line in sorted(self._lines("times").items())]

    def append(
        self, answers: Iterable[Mapping[str, Any]], times: Iterable[Mapping[str, Any]]
    ) -> None:
        """Append lines to this process's files."""
        # Times first: a row counts as done when its answer is there.
        for name, lines in (("times", times), ("answers", answers)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with (self.path / "parts" / f"{name}-{self.rank:03d}.jsonl").open("ab") as file:
                file.write(to_unicode(text).encode())

    def locked(self) -> AbstractContextManager[None]:
        """Hold this process's files; raises DiffaError if another process has the same rank."""
        remove_stale_drafts(self.path)
        return locked(self.path, "diffa eval run", name=f".rank-{self.rank}.lock")

    def truncate_partial_lines(self) -> None:
        """Cut off the last line of this process's files if a killed process left it unfinished."""
        for path in (self.path / "parts").glob(f"*-{self.rank:03d}.jsonl"):
            data = path.read_bytes()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                with path.open("r+b") as file:
                    file.truncate(end)

    def write(self, name: str, text: str) -> None:
        """Write a file atomically."""
        write_text(self.path / name, to_unicode(text))

    def _lines(self, name: str) -> dict[int, dict[str, Any]]:
        lines: dict[int, dict[str, Any]] = {}
        for part in sorted((self.path / "parts").glob(f"{name}-*.jsonl")):
            for line in complete_lines(part):
                lines.setdefault(line["row"], line)
        return lines


def complete_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the values of the lines that end in a line break."""
    for line in file.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield parse_json(line)


def load_run(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the records of a finished run; raises EvaluationError."""
    folder = expand(path)
    try:
        header = parse_json((folder / HEADER).read_text(encoding="utf-8"))
        return header, list(complete_lines(folder / RECORDS))
    except FileNotFoundError as error:
        raise EvaluationError(
            f"{folder} holds no finished run: there is no {Path(str(error.filename)).name}; "
            "`diffa eval run` writes one, and continues one that was stopped"
        ) from error
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{folder} cannot be read as a run: {error}") from error


def _difference(name: str, old: Any, new: Any) -> str:
    """Describe the first difference of two header values, down to the key in nested mappings."""
    while isinstance(old, Mapping) and isinstance(new, Mapping):
        key = min(str(k) for k in {*old, *new} if old.get(k) != new.get(k))
        name, old, new = f"{name}.{key}", old.get(key), new.get(key)
    texts = [text if len(text) <= 60 else f"{text[:57]}..." for text in (repr(old), repr(new))]
    return f"{name}: {texts[0]}, now {texts[1]}"
