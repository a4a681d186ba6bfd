"""Progress of a stage: a progress bar and ``log.jsonl``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.trainer_callback import TrainerCallback

from diffa.runtime.files import write_text
from diffa.runtime.text import parse_json

_LINE_SECONDS = 30.0  # between two lines where there is no terminal


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Show steps, loss, accuracy on masked tokens and time left; lines without a terminal.

    Args:
        name: Name of the stage.
        console: Where to show it.
    """

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console
        self.progress: Progress | None = None
        self.task: Any = None
        self._last_line = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar at the current step."""
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            self.name, total=state.max_steps, completed=state.global_step, numbers=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the latest metrics."""
        if self.progress is None or not logs:
            return
        numbers = [f"{k} {v:.3g}" for k, v in logs.items() if k in ("loss", "accuracy")]
        evaluated = [f"{k.removeprefix('eval_')} {v:.3g}" for k, v in logs.items() if "eval_" in k]
        if numbers:
            self.progress.update(self.task, numbers=" ".join(numbers))
        if evaluated:
            self.progress.console.print(f"{self.name} {state.global_step}: {' '.join(evaluated)}")
        elif (
            numbers
            and not self.console.is_terminal
            and time.monotonic() - self._last_line > _LINE_SECONDS
        ):
            self._last_line = time.monotonic()
            self.console.print(
                f"{self.name} {state.global_step}/{state.max_steps}: {' '.join(numbers)}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the bar."""
        self.close()

    def close(self) -> None:
        """Stop the bar; may be called twice."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class JsonlLog(TrainerCallback):  # type: ignore[misc]
    """Append every report to a file; on resume, remove the lines after the checkpoint.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the lines up to the current step."""
        if not state.is_world_process_zero:
            return
        rows = [row for row in read_log(self.path) if row["step"] <= state.global_step]
        rows = rows if state.global_step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append a line."""
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return
        row = {"step": state.global_step, **{k: v for k, v in logs.items() if k != "epoch"}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a log; a line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(parse_json(line))
        except ValueError:
            continue
    return rows
