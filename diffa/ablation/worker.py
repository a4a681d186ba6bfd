"""One training and its cells in a process of their own: ``python -m diffa.ablation.worker JOB``."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffa.errors import DiffaError

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.trainers.config import Recipe


class AblationError(DiffaError):
    """A run of a study failed; says which, why, and where its log is."""


class Job(NamedTuple):
    """A training and what is to be measured on it, as it passes between processes.

    Attributes:
        recipe: the training's mapping.
        folder: where its relative paths start.
        out: where the run is written.
        cells: by name, the recipe whose last stage and decoding measure the cell.
        results: where each cell's numbers are written.
        score: a command that measures a saved model, with ``{model}`` and ``{json}`` in it.
        device: where to train.
    """

    recipe: dict[str, Any]
    folder: str
    out: str
    cells: dict[str, dict[str, Any]]
    results: str
    score: str | None = None
    device: str | None = None


def work(job: Job) -> None:
    """Train, or go on where a training stopped, then measure the cells that have no result."""
    from diffa.trainers.checkpoints import save_json
    from diffa.trainers.config import Recipe
    from diffa.trainers.run import train

    folder, results = Path(job.folder), Path(job.results)
    begin = time.perf_counter()
    report = train(Recipe(job.recipe, folder), out=job.out, resume=True, device=job.device)
    assert report.model is not None  # it was no dry run
    seconds = time.perf_counter() - begin
    trained = {name: value for name, value in report.stages[-1].metrics.items() if name == "loss"}
    for name, data in job.cells.items():
        recipe = Recipe(data, folder)
        model = decoding_as(report.model, recipe)
        numbers = measure(model, recipe, Path(job.out)) or {
            f"training {key}": value for key, value in trained.items()
        }
        if job.score:
            numbers |= scored(model, job.score, Path(job.out) / "scored" / name)
        assert recipe.spec is not None  # the recipe was checked
        note = {
            "digest": recipe.spec.digest(),
            "seed": recipe.head.seed,
            "score": job.score,
            "stages": [stage.name for stage in recipe.stages],
            "parameters": parameters(model),
            "seconds": round(seconds, 1),
            "metrics": numbers,
        }
        save_json(note, results / f"{name}.json")


def decoding_as(model: Model, recipe: Recipe) -> Model:
    """Return a trained model with a recipe's sampler and prompt; weights are shared."""
    from diffa.build import swap
    from diffa.spec.spec import Spec

    assert recipe.spec is not None  # the recipe was checked
    wanted = recipe.spec.resolve().data
    seen = swap(model, sampler=wanted["sampler"])
    seen.spec = Spec(seen.spec.data | {"prompt": wanted["prompt"]}).resolve()
    return seen.eval()


def measure(model: Model, recipe: Recipe, out: Path) -> dict[str, float]:
    """Return the numbers of the last stage's ``evaluate`` on the weights as they are now."""
    import torch
    from rich.console import Console

    from diffa.trainers.session import Setting, mixture
    from diffa.trainers.stage import held_out, learner

    stage, number = recipe.stages[-1], len(recipe.stages) - 1
    if stage.evaluate is None:
        return {}
    quiet = Console(stderr=True, quiet=True)
    setting = Setting(recipe=recipe, out=out, device=model.device, console=quiet)
    optimised = learner(model, stage, mixture(stage, setting, number), setting).to(model.device)
    found = held_out(model, optimised.eval(), stage, setting)
    assert found is not None  # the stage evaluates
    with torch.no_grad():
        return found[0](0)


def scored(model: Model, command: str, folder: Path) -> dict[str, float]:
    """Save a model, run a command on it, and return every number in the JSON that it writes."""
    from diffa.save import save

    save(model, folder)
    file = folder / "score.json"
    places = {"{model}": str(folder), "{json}": str(file)}
    words = [places.get(word, word) for word in shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode or not file.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        told = lines[-1][:300] if lines and done.returncode else "it wrote no {json}"
        raise AblationError(f"--score: {command!r} ended with code {done.returncode}: {told}")
    return dict(numbers(json.loads(file.read_text())))


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON value by dotted path; a mapping with a ``value`` is that number."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, Mapping):
        if isinstance(value.get("value"), int | float):
            yield path, float(value["value"])
            return
        for key, inner in value.items():
            yield from numbers(inner, f"{path}.{key}".lstrip("."))


def parameters(model: Model) -> dict[str, int]:
    """Count parameters: all, those that learned in some stage, and those of every part."""
    parts = {"encoder": model.encoder, "backbone": model.backbone}
    parts |= {f"adapters.{key}": adapter for key, adapter in model.adapters.items()}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    learned = model.spec.data["train"]
    trained = [n for n in counts if n in learned or n.partition(".")[0] in learned]
    return {"total": sum(counts.values()), "trained": sum(counts[n] for n in trained), **counts}


def main(path: str) -> int:
    """Work on the job in a file; faults become one line, the last of the log."""
    try:
        work(Job(**json.loads(Path(path).read_text())))
    except DiffaError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
