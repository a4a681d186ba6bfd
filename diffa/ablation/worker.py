"""One training and its runs in a process of their own: ``python -m diffa.ablation.worker JOB``."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffa.errors import DiffaError
from diffa.runtime.text import parse_json

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.trainers.config import Recipe


class AblationError(DiffaError):
    """A run of a study failed; says which, why, and where its log is."""


class TrainingJob(NamedTuple):
    """A training and the runs that share it, as passed between processes.

    Attributes:
        recipe: Mapping of the training's recipe.
        folder: Folder of the recipe's relative paths.
        out: Folder of the training.
        runs: By name, the recipe whose last stage and decoding the run evaluates.
        results: Folder of the results.
        score: Command that measures a saved model, with ``{model}`` and ``{json}`` in it.
        device: Device of the training.
    """

    recipe: dict[str, Any]
    folder: str
    out: str
    runs: dict[str, dict[str, Any]]
    results: str
    score: str | None = None
    device: str | None = None


def run_job(job: TrainingJob) -> None:
    """Train, or continue an interrupted training, then evaluate the runs and write results."""
    from diffa.trainers.checkpoints import save_json
    from diffa.trainers.config import Recipe
    from diffa.trainers.run import train

    folder, results = Path(job.folder), Path(job.results)
    begin = time.perf_counter()
    report = train(Recipe(job.recipe, folder), out=job.out, resume=True, device=job.device)
    assert report.model is not None  # it was no dry run
    seconds = round(time.perf_counter() - begin, 1)
    losses = {name: value for name, value in report.stages[-1].metrics.items() if name == "loss"}
    for name, data in job.runs.items():
        recipe = Recipe(data, folder)
        model = _with_decoding(report.model, recipe)
        metrics = _evaluate_last_stage(model, recipe, Path(job.out))
        metrics = metrics or {f"training {key}": value for key, value in losses.items()}
        if job.score:
            metrics |= run_score_command(model, job.score, Path(job.out) / "scored" / name)
        assert recipe.spec is not None  # the recipe was checked
        result = {
            "spec_digest": recipe.spec.digest(),
            "seed": recipe.config.seed,
            "score": job.score,
            "stages": [stage.name for stage in recipe.stages],
            "parameters": parameter_counts(model),
            "seconds": seconds,
            "metrics": metrics,
        }
        save_json(result, results / f"{name}.json")


def run_score_command(model: Model, command: str, folder: Path) -> dict[str, float]:
    """Save a model, run a command on it, and return every number in the JSON that it writes.

    Raises:
        AblationError: The command fails or writes no JSON.
    """
    from diffa.save import save

    save(model, folder / "model")
    file = folder / "score.json"
    places = {"{model}": str(folder / "model"), "{json}": str(file)}
    words = [places.get(word, word) for word in shlex.split(command)]
    process = subprocess.run(words, capture_output=True, text=True)
    print(process.stdout, process.stderr, file=sys.stderr)
    if process.returncode or not file.is_file():
        lines = (process.stderr or process.stdout).strip().splitlines()
        reason = lines[-1][:300] if lines and process.returncode else "it wrote no {json}"
        raise AblationError(f"--score: {command!r} ended with code {process.returncode}: {reason}")
    return dict(flatten_numbers(parse_json(file.read_text())))


def flatten_numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a JSON value by dotted path; a mapping's ``value`` stands for it."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, Mapping):
        if isinstance(value.get("value"), int | float):
            yield path, float(value["value"])
            return
        for key, inner in value.items():
            yield from flatten_numbers(inner, f"{path}.{key}".lstrip("."))


def parameter_counts(model: Model) -> dict[str, int]:
    """Return the number of parameters: total, trained in some stage, and of every part."""
    parts = {"encoder": model.encoder, "backbone": model.backbone}
    parts |= {f"adapters.{key}": adapter for key, adapter in model.adapters.items()}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    train = model.spec.data["train"]
    trained = sum(
        count for n, count in counts.items() if n in train or n.partition(".")[0] in train
    )
    return {"total": sum(counts.values()), "trained": trained, **counts}


def main(path: str) -> int:
    """Run the job in a file; an error becomes one line, the last of the log."""
    try:
        run_job(TrainingJob(**parse_json(Path(path).read_text())))
    except DiffaError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    return 0


def _with_decoding(model: Model, recipe: Recipe) -> Model:
    """Return a trained model with a recipe's sampler and prompt; weights are shared."""
    from diffa.build import swap
    from diffa.spec.spec import Spec

    assert recipe.spec is not None  # the recipe was checked
    spec = recipe.spec.resolve().data
    model = swap(model, sampler=spec["sampler"])
    model.spec = Spec(model.spec.data | {"prompt": spec["prompt"]}).resolve()
    return model.eval()


def _evaluate_last_stage(model: Model, recipe: Recipe, out: Path) -> dict[str, float]:
    """Return the metrics of the last stage's ``evaluate`` with the model's current weights."""
    import torch
    from rich.console import Console

    from diffa.trainers.run_context import RunContext, stage_mixture
    from diffa.trainers.stage import build_evaluator, build_learner

    stage, number = recipe.stages[-1], len(recipe.stages) - 1
    if stage.evaluate is None:
        return {}
    console = Console(stderr=True, quiet=True, markup=False)
    context = RunContext(recipe=recipe, out=out, device=model.device, console=console)
    sources = stage_mixture(stage, context, number).sources
    learner = build_learner(model, stage, sources, context).to(model.device).eval()
    evaluator = build_evaluator(model, learner, stage, context)
    assert evaluator is not None  # the stage evaluates
    with torch.no_grad():
        return evaluator()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
