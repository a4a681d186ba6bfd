"""The commands ``diffa eval run | score | judge | compare | table | nano-suite``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffa.cli.models import load_model
from diffa.cli.options import (
    AudioFolderOption,
    DeviceOption,
    DtypeOption,
    FsddOption,
    JsonOption,
    PerMinuteOption,
    SamplerPresetOption,
    SetOption,
    SpecOption,
)
from diffa.cli.output import print_json, print_note, print_table

app = typer.Typer(
    help="Run and score benchmarks by their official rules.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Mode = Literal["generate", "likelihood"]

SuiteArgument = Annotated[
    str,
    typer.Argument(
        metavar="SUITE",
        help="Benchmark: mmsu, mmau, mmar, voicebench, asr, spokenqa or nano-suite.",
    ),
]
DataOption = Annotated[
    Path,
    typer.Option("--data", help="Benchmark data: a JSON, JSONL or Parquet file, or its folder."),
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Folder for records, files in the official format and scores.")
]
SubsetOption = Annotated[
    str,
    typer.Option(
        "--subset",
        help="Subset of voicebench, such as sd-qa or ifeval (default: by the file's name).",
    ),
]
PromptOption = Annotated[
    str, typer.Option("--prompt", help="Id of an official prompt (default: the first).")
]
ModeOption = Annotated[
    Mode,
    typer.Option("--mode", help="Answer by generation, or by the likelihood of each choice."),
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Maximum rows per batch.")]
BatchSecondsOption = Annotated[
    float,
    typer.Option("--batch-seconds", help="Maximum audio per batch with padding, in seconds."),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Answer length in tokens (default: the paper's)."),
]
BlockLengthOption = Annotated[
    int | None,
    typer.Option("--block-length", min=1, help="Block length in tokens (default: the paper's)."),
]
SamplesOption = Annotated[
    int,
    typer.Option("--samples", min=1, help="Monte Carlo samples per choice in likelihood mode."),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Number of rows to run (default: all).")
]
RankOption = Annotated[
    int, typer.Option("--rank", help="Rank of this process if accelerate does not set it.")
]
WorldSizeOption = Annotated[
    int, typer.Option("--world-size", help="Number of processes if accelerate does not set it.")
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", help="Random seed for fallback answers, samples and confidence intervals."
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


@app.callback()
def evaluation() -> None:
    """Run and score benchmarks by their official rules."""


@app.command("run")
def run_benchmark(
    suite: SuiteArgument,
    data: DataOption,
    out: OutOption,
    spec: SpecOption = "",
    subset: SubsetOption = "",
    prompt: PromptOption = "",
    mode: ModeOption = "generate",
    batch: BatchOption = 16,
    batch_seconds: BatchSecondsOption = 480.0,
    max_tokens: MaxTokensOption = None,
    block_length: BlockLengthOption = None,
    samples: SamplesOption = 128,
    limit: LimitOption = None,
    audio: AudioFolderOption = None,
    rank: RankOption = 0,
    world_size: WorldSizeOption = 1,
    seed: SeedOption = 0,
    overrides: SetOption = None,
    sampler_preset: SamplerPresetOption = "",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a model on a benchmark and score it; the same command continues an interrupted run."""
    from diffa.evaluation import distributed, runner
    from diffa.evaluation.files import BenchmarkData
    from diffa.evaluation.suites import load_suite

    benchmark, items = load_suite(suite, subset, data), BenchmarkData(data, audio)
    process = distributed.current_process(rank, world_size, device)
    model, _ = load_model(spec, overrides, sampler_preset, process.device, dtype)
    config = runner.EvalConfig(
        prompt=prompt, mode=mode, batch_size=batch, batch_seconds=batch_seconds,
        max_tokens=max_tokens, block_length=block_length, num_samples=samples,
        seed=seed, limit=limit,
        rank=process.rank, world_size=process.world_size,
    )  # fmt: skip
    on_progress = distributed.progress_printer(process)
    report = runner.evaluate(model, benchmark, items, out, config, on_progress=on_progress)
    if process.wait is not None:
        process.wait()
        if report is None and process.rank == 0:  # the last process may have been another one
            report = runner.evaluate(model, benchmark, items, out, config)
    if report is None:
        print_note(f"this process is done; {out} is scored when the others are")
    elif process.rank == 0 or process.wait is None:
        print_report(report, as_json)
        if benchmark.needs_judge:
            files = " ".join(str(file) for file in sorted(out.glob("diffa-*.jsonl")))
            print_note(f"next: diffa eval judge {files} --url URL --model NAME")
        print_note(f"records, official files and scores: {out}")


@app.command("score")
def score_predictions(
    suite: SuiteArgument,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Predictions in the suite's official format.")
    ],
    subset: SubsetOption = "",
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference", help="Reference transcripts of asr: lines of an id and its text."
        ),
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score predictions in the suite's official format; no model is needed."""
    from diffa.evaluation.score_file import score_file

    print_report(score_file(suite, file, subset=subset, reference=reference, seed=seed), as_json)


@app.command("judge")
def judge_answers(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="VoiceBench answers (JSONL).")],
    url: Annotated[
        str,
        typer.Option("--url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1."),
    ],
    model: Annotated[
        str, typer.Option("--model", help="Name of the judge model at the endpoint.")
    ] = "gpt-4o-mini",
    subset: SubsetOption = "",
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder that caches judgements (default: beside FILE)."),
    ] = None,
    per_minute: PerMinuteOption = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Number of parallel requests.")
    ] = 4,
) -> None:
    """Let a judge model rate answers to alpacaeval, commoneval, wildvoice or sd-qa.

    The variable OPENAI_API_KEY holds the endpoint's key.
    """
    from diffa.evaluation.judge import Judge
    from diffa.evaluation.judge_file import judge_file
    from diffa.llm.client import ChatClient

    endpoint = ChatClient(url, model, per_minute=per_minute)
    rater = Judge(endpoint, cache or file.with_name("judgements"))
    result, failed = judge_file(file, rater, subset=subset, workers=workers)
    print(result)
    for number, reason in failed[:20]:
        print_note(f"row {number} was not judged: {reason}")
    print_note(f"next: diffa eval score voicebench {result}")


@app.command("compare")
def compare_runs(
    a: RunArgument, b: RunArgument, seed: SeedOption = 0, as_json: JsonOption = False
) -> None:
    """Compare two runs of one benchmark with paired tests."""
    from diffa.evaluation.compare import compare_records

    report = compare_records(a, b, seed=seed)
    if as_json:
        print_json(report)
        return
    parsers = [name for name, value in report.items() if isinstance(value, dict) and "a" in value]
    columns = ["a", "b", "difference", "interval", "p_permutation", "p_mcnemar", "only_a", "only_b"]
    rows = [[name, *(_cell(report[name][column]) for column in columns)] for name in parsers]
    print_table(["parser", *columns], rows)
    print_note(f"{report['equal_responses']} of {report['items']} answers have the same text")


@app.command("table")
def tabulate_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    parser: Annotated[
        Literal["official", "fixed"], typer.Option("--parser", help="Answer parser to tabulate.")
    ] = "fixed",
    group: Annotated[
        str,
        typer.Option(
            "--group", help="Field that groups the rows, such as task_name (default: none)."
        ),
    ] = "",
) -> None:
    """Print several runs of one benchmark side by side, as Markdown."""
    from diffa.evaluation.tables import markdown_table

    print(markdown_table(runs, parser=parser, group=group), end="")


@app.command("nano-suite")
def make_nano_suite(
    out: Annotated[Path, typer.Option("--out", help="Folder for audio/ and nano-suite.jsonl.")],
    per_task: Annotated[
        int, typer.Option("--per-task", min=1, help="Questions for each of the nine tasks.")
    ] = 50,
    fsdd: FsddOption = "",
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the suite.")] = 20_261_121,
) -> None:
    """Make a small benchmark of spoken digits in MMSU's format."""
    from diffa.nano.suite_files import TASKS, write_suite

    print(write_suite(out, fsdd=fsdd or None, seed=seed, per_task=per_task))
    print_note(
        f"{per_task * len(TASKS)} questions; next: diffa eval run nano-suite --data {out} --out RUN"
    )


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Print a report as JSON, or as a table of parsers and one table per group."""
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
        scores = [report[name]["groups"][group] for name in parsers]
        lines = [
            [value, str(row["items"]), *(_cell(next(iter(s[value].values()))) for s in scores)]
            for value, row in scores[0].items()
        ]
        print_table([group, "items", *parsers], lines)
    for kind in ("invalid", "duplicates", "failed"):
        for note in report.get(kind, [])[:20]:
            print_note(f"row {note['row']} {note['reason']}" if isinstance(note, dict) else note)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " to ".join(_cell(part) for part in value)
    return str(value)
