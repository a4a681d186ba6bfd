"""What a running stage shows and writes down: a progress bar and ``log.jsonl``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.trainer_callback import TrainerCallback

from diffa.runtime.files import write_text

_PLAIN = 30.0  # seconds between lines where there is no terminal to draw on


class Bar(TrainerCallback):  # type: ignore[misc]
    """Steps, loss, accuracy on masked tokens and time left; plain lines without a terminal."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console
        self.drawn: Progress | None = None
        self.task: Any = None
        self._said = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar from where the stage begins or goes on."""
        self.drawn = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.drawn.start()
        done = state.global_step
        self.task = self.drawn.add_task(
            self.name, total=state.max_steps, completed=done, numbers=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self.drawn is not None:
            self.drawn.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the latest numbers."""
        if self.drawn is None or not logs:
            return
        shown = [f"{k} {v:.3g}" for k, v in logs.items() if k in ("loss", "accuracy")]
        held = [f"{k.removeprefix('eval_')} {v:.3g}" for k, v in logs.items() if "eval_" in k]
        if shown:
            self.drawn.update(self.task, numbers=" ".join(shown))
        if held:
            self.drawn.console.print(f"{self.name} {state.global_step}: {' '.join(held)}")
        elif shown and not self.console.is_terminal and time.monotonic() - self._said > _PLAIN:
            self._said = time.monotonic()
            self.console.print(
                f"{self.name} {state.global_step}/{state.max_steps}: {' '.join(shown)}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the bar as it stands."""
        self.close()

    def close(self) -> None:
        """Stop drawing; may be called twice."""
        if self.drawn is not None:
            self.drawn.stop()
            self.drawn = None


class Log(TrainerCallback):  # type: ignore[misc]
    """Appends every report to ``log.jsonl``; on resume, lines past the checkpoint go first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the lines up to where the stage begins or goes on."""
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_log(self.path) if row["step"] <= state.global_step]
        kept = kept if state.global_step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append a line."""
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return
        row = {"step": state.global_step, **{k: v for k, v in logs.items() if k != "epoch"}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the whole lines of a log; one cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
