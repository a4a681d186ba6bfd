"""The commands ``diffa eval run | score | judge | compare | table | nano-suite``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from diffa.cli.ask import DEVICE, DTYPE, load_model
from diffa.cli.output import print_json, print_table, say
from diffa.cli.spec import JSON, SAMPLER_PRESET, SET, SPEC
from diffa.errors import SpecError

app = typer.Typer(
    help="Run and score benchmarks by their official rules.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
SUITE = Annotated[
    str,
    typer.Argument(metavar="SUITE", help="mmsu, mmau, mmar, voicebench, asr, spokenqa, nano-suite"),
]
SUBSET = Annotated[str, typer.Option("--subset", help="Of voicebench: sd-qa, ifeval, ...")]
SEED = Annotated[int, typer.Option("--seed", help="Of guesses, draws and intervals.")]
JUDGE = Annotated[
    str, typer.Option("--url", help="An OpenAI-compatible endpoint: http://localhost:8000/v1")
]
JUDGE_MODEL = Annotated[str, typer.Option("--model", help="The judge's name there.")]
OUT = Annotated[Path, typer.Option("--out", help="Folder for records, official files and scores.")]


@app.callback()
def evaluation() -> None:
    """Run and score benchmarks by their official rules."""


@app.command()
def run(
    suite: SUITE,
    data: Annotated[Path, typer.Option("--data", help="JSON, JSONL, Parquet, or their folder.")],
    out: OUT,
    spec: SPEC = "",
    subset: SUBSET = "",
    prompt: Annotated[str, typer.Option("--prompt", help="Id of an official prompt.")] = "",
    mode: Annotated[str, typer.Option("--mode", help="generate or likelihood.")] = "generate",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows at once, at most.")] = 16,
    budget: Annotated[
        float, typer.Option("--budget", help="Seconds of audio at once, padding counted.")
    ] = 480.0,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Instead of the paper's.")
    ] = None,
    block: Annotated[
        int | None, typer.Option("--block", min=1, help="Instead of the paper's.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Draws per choice, for likelihoods.")
    ] = 128,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first rows.")
    ] = None,
    audio: Annotated[
        Path | None, typer.Option("--audio", help="Where relative audio paths start.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Of this process, without accelerate.")] = 0,
    world: Annotated[int, typer.Option("--world", help="Processes, without accelerate.")] = 1,
    seed: SEED = 0,
    changes: SET = None,
    sampler_preset: SAMPLER_PRESET = "",
    device: DEVICE = "auto",
    dtype: DTYPE = None,
    as_json: JSON = False,
) -> None:
    """Ask a model a whole benchmark and score it; goes on where it was stopped."""
    from diffa.evaluation import distributed as processes
    from diffa.evaluation import runner
    from diffa.evaluation.files import Table
    from diffa.evaluation.suites import suite as find

    chosen, table = find(suite, subset or _subset(suite, data)), Table(data, audio)
    place = processes.place(rank, world, device)
    model, _ = load_model(spec, changes, sampler_preset, place.device, dtype)
    settings = runner.Settings(
        prompt=prompt,
        mode=cast(Literal["generate", "likelihood"], mode),
        batch=batch,
        budget=budget,
        max_tokens=max_tokens,
        block=block,
        samples=samples,
        seed=seed,
        limit=limit,
        rank=place.rank,
        world=place.world,
    )
    shown = processes.shown(place)
    report = runner.run(model, chosen, table, out, settings, on_progress=shown)
    if place.wait is not None:
        place.wait()
        if report is None and place.rank == 0:
            report = runner.run(model, chosen, table, out, settings)
    if report is None:
        say(f"this process is done; {out} is scored when the others are")
    elif place.rank == 0 or place.wait is None:
        show(report, as_json)
        later = getattr(chosen, "kind", "") in ("open", "qa")
        if later:  # without a judge there are answers, but no score
            files = " ".join(str(file) for file in sorted(out.glob("diffa-*.jsonl")))
            say(f"not judged yet: diffa eval judge {files} --url URL --model NAME")
        say(f"records, official files and scores: {out}")


@app.command()
def score(
    suite: SUITE,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Predictions, official format.")],
    subset: SUBSET = "",
    reference: Annotated[
        Path | None, typer.Option("--reference", help="For asr: `id text` lines of what is said.")
    ] = None,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Score predictions in the suite's official format, without a model; accuracies are shares."""
    from diffa.evaluation import score_file as scoring

    show(scoring.score_file(suite, file, subset=subset, reference=reference, seed=seed), as_json)


@app.command()
def judge(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="VoiceBench answers (JSONL).")],
    url: JUDGE,
    model: JUDGE_MODEL = "gpt-4o-mini",
    subset: SUBSET = "",
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder of judgements [default: beside FILE]."),
    ] = None,
    per_minute: Annotated[
        float | None, typer.Option("--per-minute", help="Requests per minute, at most.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Requests at once.")] = 4,
) -> None:
    """Let a judge read answers to alpacaeval, commoneval, wildvoice or sd-qa.

    The key of the service is read from OPENAI_API_KEY.
    """
    from diffa.evaluation.judge import Judge
    from diffa.evaluation.judge_file import judge_file
    from diffa.llm.client import Endpoint

    asked = Judge(
        Endpoint(url, model, per_minute=per_minute), cache or file.with_name("judgements")
    )
    result, failed = judge_file(file, asked, subset=subset, workers=workers)
    print(result)
    for number, reason in failed[:20]:
        say(f"row {number} was not judged: {reason}")
    say(f"next: diffa eval score voicebench {result}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another of the same rows.")],
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Compare two runs of one benchmark with paired tests."""
    from diffa.evaluation.compare import compare as weigh

    report = weigh(a, b, seed=seed)
    if as_json:
        print_json(report)
        return
    parsers = [name for name, value in report.items() if isinstance(value, dict) and "a" in value]
    columns = ["a", "b", "difference", "interval", "p_permutation", "p_mcnemar", "only_a", "only_b"]
    rows = [[name, *(_cell(report[name][column]) for column in columns)] for name in parsers]
    print_table(["parser", *columns], rows)
    say(f"{report['equal_answers']} of {report['items']} answers are the same text")


@app.command()
def table(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    parser: Annotated[str, typer.Option("--parser", help="official or fixed.")] = "fixed",
    group: Annotated[str, typer.Option("--group", help="Rows by: task_name, category, ...")] = "",
) -> None:
    """Print several runs of one benchmark side by side, as Markdown."""
    from diffa.evaluation.tables import table as drawn

    print(drawn(runs, parser=parser, group=group), end="")


@app.command("nano-suite")
def nano_suite(
    out: Annotated[Path, typer.Option("--out", help="Folder for audio/ and nano-suite.jsonl.")],
    per_task: Annotated[
        int, typer.Option("--per-task", min=1, help="Questions for each of the nine tasks.")
    ] = 50,
    fsdd: Annotated[str, typer.Option("--fsdd", help="Folder of the FSDD recordings.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Another seed, another suite.")] = 20_261_121,
) -> None:
    """Make a small real benchmark of spoken digits in MMSU's shape."""
    from diffa.nano.suite_files import TASKS, write_suite

    print(write_suite(out, fsdd=fsdd or None, seed=seed, per_task=per_task))
    say(
        f"{per_task * len(TASKS)} questions; next: diffa eval run nano-suite --data {out} --out RUN"
    )


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print a report as JSON, or as a table of parsers and one of groups."""
    if as_json:
        print_json(report)
        return
    parsers = [
        name for name, value in report.items() if isinstance(value, dict) and "parser" in value
    ]
    columns = list(dict.fromkeys(k for name in parsers for k in report[name] if k != "groups"))
    rows = [[name, *(_cell(report[name].get(k)) for k in columns)] for name in parsers]
    print_table(["", *columns], rows, f"{report['suite']}, {report['items']} items")
    for group in report[parsers[0]].get("groups", {}) if parsers else ():
        found = [report[name]["groups"][group] for name in parsers]
        lines = [
            [
                value,
                str(found[0][value]["items"]),
                *(_cell(next(iter(f[value].values()))) for f in found),
            ]
            for value in found[0]
        ]
        print_table([group, "items", *parsers], lines)
    for kind in ("faults", "repeated", "failed", "notes"):
        for fault in report.get(kind, [])[:20]:
            say(f"row {fault['row']} {fault['reason']}" if isinstance(fault, dict) else str(fault))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " to ".join(_cell(part) for part in value)
    return str(value)


def _subset(suite: str, path: Path) -> str:
    """VoiceBench's subset by the names of its files and folders."""
    if suite != "voicebench":
        return ""
    from diffa.evaluation.score_file import subset_of

    found = subset_of(path)
    if not found:
        raise SpecError(f"which part of voicebench is {path}? name it with --subset")
    return found
