"""What a run writes: a header, a line per row as answers come, and the whole once all are in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffa.evaluation.items import EvaluationError
from diffa.runtime.files import write_text

HEADER, RECORDS, TIMES, SCORES = "run.json", "records.jsonl", "times.jsonl", "scores.json"


class Folder:
    """A run's folder. Lines are only appended, by each process to a file of its own.

    Args:
        path: made if it is missing.
        rank: of this process.

    Raises:
        EvaluationError: the folder cannot be written.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.path, self.rank = Path(path).expanduser(), rank
        try:
            (self.path / "parts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"{self.path} cannot be written: {error}") from error

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the header, or check that the run in the folder is the same one.

        Raises:
            EvaluationError: the folder holds another run; says in what it differs.
        """
        file = self.path / HEADER
        if not file.is_file():
            self.write(HEADER, json.dumps(header, indent=1, ensure_ascii=False) + "\n")
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(k for k in {*found, *header} if found.get(k) != header.get(k))
        if differing:
            told = "; ".join(_apart(k, found.get(k), header.get(k)) for k in differing[:4])
            raise EvaluationError(
                f"{self.path} holds another run ({told}): finish it as it was begun, "
                "or choose another --out"
            )

    def done(self) -> dict[int, dict[str, Any]]:
        """Lines of all processes by row; a line that was cut off is as if it was not there."""
        rows: dict[int, dict[str, Any]] = {}
        for part in sorted((self.path / "parts").glob("answers-*.jsonl")):
            for line in whole_lines(part):
                rows.setdefault(line["row"], line)
        return rows

    def append(
        self, answers: Iterable[Mapping[str, Any]], times: Iterable[Mapping[str, Any]]
    ) -> None:
        """Add lines to this process's files."""
        for name, lines in (("times", times), ("answers", answers)):
            file = self.path / "parts" / f"{name}-{self.rank:03d}.jsonl"
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with file.open("ab") as opened:
                opened.write(text.encode())

    def mend(self) -> None:
        """Cut off what a killed process left of its last line."""
        for file in (self.path / "parts").glob(f"*-{self.rank:03d}.jsonl"):
            data = file.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with file.open("r+b") as opened:
                    opened.truncate(whole)

    def times(self) -> list[dict[str, Any]]:
        """How long each row took, in the order of rows; empty where it was not kept."""
        rows: dict[int, dict[str, Any]] = {}
        for part in sorted((self.path / "parts").glob("times-*.jsonl")):
            rows.update({line["row"]: line for line in whole_lines(part)})
        return [rows[number] for number in sorted(rows)]

    def write(self, name: str, text: str) -> Path:
        """Put a file in place at once, so that a reader never sees half of it."""
        return write_text(self.path / name, text)


def _apart(name: str, old: Any, new: Any) -> str:
    """Say where two values of a header differ, down to the first such field of a mapping."""
    while isinstance(old, Mapping) and isinstance(new, Mapping):
        key = min(str(k) for k in {*old, *new} if old.get(k) != new.get(k))
        name, old, new = f"{name}.{key}", old.get(key), new.get(key)
    shown = [text if len(text) <= 60 else f"{text[:57]}..." for text in (repr(old), repr(new))]
    return f"{name}: {shown[0]}, now {shown[1]}"


def whole_lines(file: Path) -> Iterable[dict[str, Any]]:
    """Values of the lines that end in a line break."""
    for line in file.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def read_records(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the records of a finished run; raises EvaluationError."""
    folder = Path(path).expanduser()
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        return header, list(whole_lines(folder / RECORDS))
    except FileNotFoundError as error:
        raise EvaluationError(
            f"{folder} holds no finished run: there is no {Path(str(error.filename)).name}; "
            "`diffa eval run` writes one, and goes on with one that was stopped"
        ) from error
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{folder} cannot be read as a run: {error}") from error
