"""Measure the code base: python benchmarks/codebase.py [--json FILE].

Counts every Python file below diffa/, tests/ and benchmarks/. A line is code, docstring, comment or
blank; a line with code and a comment counts as code. The comment share is comment tokens per code
line. A function's length leaves its docstring out.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PARTS = ("model", "sampler", "objective")  # parameters that must not be typed Any


class File(NamedTuple):
    """What one file holds: its folder, lines by kind, comment tokens, functions' lengths."""

    folder: str
    code: int
    docstring: int
    comment: int
    blank: int
    comments: int
    functions: list[tuple[int, str]]
    untyped: list[str]

    @property
    def lines(self) -> int:
        """All lines of the file."""
        return self.code + self.docstring + self.comment + self.blank


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the line numbers of all docstrings."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found |= set(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return found


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def untyped_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield parameters named model, sampler or objective whose annotation is Any."""
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        annotation = argument.annotation
        if argument.arg in PARTS and isinstance(annotation, ast.Name) and annotation.id == "Any":
            yield argument.arg


def measure(path: Path) -> File:
    """Count the lines and functions of one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docs = docstring_lines(tree)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    lines = text.splitlines()
    alone = {t.start[0] for t in comments if lines[t.start[0] - 1].lstrip().startswith("#")}
    blank = {n for n, line in enumerate(lines, 1) if not line.strip()} - docs
    relative = path.relative_to(ROOT)
    functions, untyped = [], []
    for function in functions_of(tree):
        span = set(range(function.lineno, (function.end_lineno or function.lineno) + 1))
        name = f"{relative}:{function.lineno} {function.name}"
        functions.append((len(span - docs), name))
        untyped += [f"{name}({parameter})" for parameter in untyped_parameters(function)]
    return File(
        folder="/".join(relative.parts[:2][: len(relative.parts) - 1]),
        code=len(lines) - len(docs) - len(alone - docs) - len(blank),
        docstring=len(docs),
        comment=len(alone - docs),
        blank=len(blank),
        comments=len(comments),
        functions=functions,
        untyped=untyped,
    )


def spread(values: Sequence[int]) -> dict[str, float]:
    """Return median, 90th percentile and maximum."""
    ordered = sorted(values) or [0]
    ninety = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return {"median": median(ordered), "p90": ninety, "max": ordered[-1]}


def summary(files: Sequence[File]) -> dict[str, Any]:
    """Add up files."""
    code = sum(file.code for file in files)
    return {
        "files": len(files),
        "code": code,
        "docstring": sum(file.docstring for file in files),
        "comment": sum(file.comment for file in files),
        "blank": sum(file.blank for file in files),
        "comment_share": round(sum(file.comments for file in files) / max(1, code), 4),
    }


def report() -> dict[str, Any]:
    """Measure the whole code base."""
    files = {
        top: [measure(path) for path in sorted((ROOT / top).rglob("*.py"))]
        for top in ("diffa", "tests", "benchmarks")
    }
    package = files["diffa"]
    lengths = sorted((entry for file in package for entry in file.functions), reverse=True)
    top_level = [path.stem for path in (ROOT / "diffa").glob("*.py") if path.stem != "__init__"]
    folders = sorted({file.folder for file in package})
    everything = {top: sum(file.lines for file in found) for top, found in files.items()}
    return {
        "top_level_modules": len(top_level) + 1,
        "folders": {f: summary([x for x in package if x.folder == f]) for f in folders},
        "total": {top: summary(found) for top, found in files.items()},
        "file_length": spread([file.lines for file in package]),
        "function_length": spread([length for length, _ in lengths]),
        "functions_over_60": [name for length, name in lengths if length > 60],
        "functions_over_30": len([name for length, name in lengths if length > 30]),
        "parameters_typed_any": [name for file in package for name in file.untyped],
        "test_lines_per_line": round(everything["tests"] / everything["diffa"], 3),
    }


def main() -> None:
    """Print the tables, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="Write the figures to this file.")
    options = parser.parse_args()
    found = report()
    print(f"{'folder':24s} files   code docstring comment blank  comments/code")
    rows = {**found["folders"], **{f"all of {k}": v for k, v in found["total"].items()}}
    for name, row in rows.items():
        print(
            f"{name:24s} {row['files']:5d} {row['code']:6d} {row['docstring']:9d} "
            f"{row['comment']:7d} {row['blank']:5d}  {row['comment_share']:.1%}"
        )
    for name in ("file_length", "function_length"):
        print(name.replace("_", " "), found[name])
    print("top-level modules:", found["top_level_modules"])
    print("functions over 60 lines:", len(found["functions_over_60"]), found["functions_over_60"])
    print("functions over 30 lines:", found["functions_over_30"])
    untyped = found["parameters_typed_any"]
    print("parameters model, sampler, objective typed Any:", len(untyped))
    print("test lines per line of the package:", found["test_lines_per_line"])
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
