"""The commands that make data and look at it: ``diffa data nano | manifest | check | ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from diffa.cli import synthesis as construction
from diffa.cli.output import print_json, print_table, say
from diffa.errors import SpecError

app = typer.Typer(help="Make training data.", no_args_is_help=True, rich_markup_mode=None)
app.command()(construction.captions)
app.command()(construction.rewrite)
app.command()(construction.preferences)

JSON = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]
MANIFESTS = Annotated[
    list[Path], typer.Argument(metavar="MANIFEST...", help=".json, .jsonl or .parquet files.")
]
AUDIO = Annotated[bool, typer.Option("--audio/--no-audio", help="Open the recordings.")]


@app.callback()
def data() -> None:
    """Make training data."""


@app.command()
def nano(
    out: Annotated[Path, typer.Option("--out", help="Folder for audio/ and the manifest.")],
    split: Annotated[str, typer.Option("--split", help="train or test recordings.")] = "train",
    count: Annotated[int, typer.Option("--count", min=1, help="Rows to write.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Another seed, another corpus.")] = 0,
    per: Annotated[int, typer.Option("--per", min=1, help="Questions per utterance.")] = 1,
    form: Annotated[str, typer.Option("--format", help="jsonl or json.")] = "jsonl",
    fsdd: Annotated[str, typer.Option("--fsdd", help="Folder of the FSDD recordings.")] = "",
    leave_out: Annotated[
        list[str] | None, typer.Option("--leave-out", help="A speaker to leave out.")
    ] = None,
) -> None:
    """Write the nano corpus: spoken digits, sounds and melodies with questions about them."""
    if split not in ("train", "test"):
        raise SpecError(f"--split is 'train' or 'test', got {split!r}")
    if form not in ("jsonl", "json"):
        raise SpecError(f"--format is 'jsonl' or 'json', got {form!r}")
    from diffa.nano.corpus.examples import write_corpus

    manifest = write_corpus(
        out,
        cast(Literal["train", "test"], split),
        seed,
        count,
        fsdd=fsdd or None,
        leave_out=tuple(leave_out or ()),
        per=per,
        form=cast(Literal["json", "jsonl"], form),
    )
    print(manifest)
    say(f"{count} rows of the {split} recordings, seed {seed}")


@app.command()
def corpora(as_json: JSON = False) -> None:
    """List the published corpora that can be read, and what their labels say."""
    from diffa.data.corpora.readers import CORPORA

    rows = [
        {"name": name, "corpus": one.title, "labels": list(one.labels), "layout": one.layout}
        for name, one in CORPORA.items()
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(list(rows[0]), [[_cell(cell) for cell in row.values()] for row in rows])


@app.command()
def manifest(
    corpus: Annotated[str, typer.Argument(help="As `diffa data corpora` names it.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where it was unpacked.")],
    out: construction.OUT,
    split: Annotated[str, typer.Option("--split", help="Its own part: train, test ...")] = "",
    count: Annotated[int | None, typer.Option("--count", min=1, help="Draw so many.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of that draw.")] = 0,
    measured: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Pitch, volume and speaking rate.")
    ] = True,
    instructions: Annotated[
        Path | None, typer.Option("--instructions", help="A file of instructions, one per line.")
    ] = None,
    band: Annotated[
        list[str] | None, typer.Option("--band", metavar="NAME=LOW,HIGH", help="speed=2,4")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes.")] = 1,
) -> None:
    """Write a manifest of a published corpus, its attributes measured and labelled."""
    from diffa.data.corpora.readers import read_corpus
    from diffa.data.formats import write_rows
    from diffa.data.synthesis.rows import read_instructions, rows_of, spread

    bands, said = construction.bands(band), read_instructions(instructions) if instructions else ()
    found = read_corpus(corpus, folder, split)
    clips = found.clips if count is None else spread(found.clips, count, seed)
    faults: list[str] = []
    made = rows_of(
        clips, faults, measured=measured, workers=workers, bands=bands, instructions=said
    )
    print(write_rows(out, construction.shown(made, len(clips))))
    construction.tell([*found.problems, *faults], "could not be used")
    say(f"{len(clips) - len(faults)} rows of {corpus}")


@app.command()
def attributes(
    audio: Annotated[list[Path], typer.Argument(metavar="AUDIO...", help="Recordings.")],
    band: Annotated[list[str] | None, typer.Option("--band", metavar="NAME=LOW,HIGH")] = None,
    as_json: JSON = False,
) -> None:
    """Measure pitch, volume and speaking rate of recordings."""
    from diffa.audio import prepare
    from diffa.data.synthesis.attributes import describe
    from diffa.data.synthesis.measures import RATE, measure

    bands, rows = construction.bands(band), []
    for path in audio:
        found = measure(prepare(path, RATE).numpy())
        words = describe({}, found, "", bands)
        numbers = {k: None if v is None else round(v, 2) for k, v in found._asdict().items()}
        rows.append({"audio": str(path), **numbers, "attributes": words})
    if as_json:
        print_json(rows)
        return
    columns = ["audio", "seconds", "Hz", "dBFS", "syllables/s", "words"]
    print_table(columns, [[_cell(cell) for cell in row.values()] for row in rows])


@app.command()
def check(manifests: MANIFESTS, audio: AUDIO = True, as_json: JSON = False) -> None:
    """Check every row of manifests; exit 1 where training could not use one.

    Parquet and conversations are read as `diffa data convert` would write them for training.
    """
    from diffa.data.validation import validate

    reports = {str(path): validate(path, listen=audio) for path in manifests}
    if as_json:
        print_json(
            {
                name: {
                    "rows": report.rows,
                    "faults": [fault._asdict() for fault in report.faults],
                    "warnings": [warning._asdict() for warning in report.warnings],
                }
                for name, report in reports.items()
            }
        )
    else:
        for name, report in reports.items():
            bad, odd = len(report.faults), len(report.warnings)
            print(f"{name}: {report.rows} rows, {bad} unusable, {odd} warnings")
            construction.tell([str(fault) for fault in report.faults], "unusable")
            construction.tell([str(warning) for warning in report.warnings], "warnings")
    if any(report.faults for report in reports.values()):
        raise typer.Exit(1)


@app.command()
def stats(manifests: MANIFESTS, as_json: JSON = False) -> None:
    """Count samples and hours by dataset, as DIFFA's Table 1 does, and attributes' values."""
    from diffa.data.statistics import table, values

    rows = construction.all_rows(manifests)
    lines = table(rows)
    if as_json:
        print_json({"table": [line._asdict() for line in lines], "values": values(rows)})
        return
    print_table(list(lines[0]._fields), [[_cell(cell) for cell in line] for line in lines])
    for name, counts in values(rows).items():
        print(f"{name}: {', '.join(f'{value} {count}' for value, count in counts.items())}")


@app.command()
def leaks(
    train: Annotated[Path, typer.Argument(help="A manifest.")],
    test: Annotated[Path | None, typer.Argument(help="Another; TRAIN alone: duplicates.")] = None,
    audio: AUDIO = True,
    near: Annotated[
        bool, typer.Option("--near", help="Also find copies at another level or coding.")
    ] = False,
    ignored: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="KIND", help="speaker, text, ...")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Find what two splits share, or what one holds twice; exit 1 where there is something.

    Kinds: id, audio (the same samples), sound (--near), speaker, text, question.
    """
    from diffa.data.leakage import duplicates
    from diffa.data.leakage import leaks as find

    rows = construction.all_rows([train])
    if test is None:
        found = duplicates(rows, listen=audio)
    else:
        found = find(rows, construction.all_rows([test]), listen=audio, near=near)
    shared = [one for one in found.shared if one.kind not in (ignored or ())]
    if as_json:
        print_json({"shared": [one._asdict() for one in shared], "notes": found.notes})
    else:
        for one in shared:
            print(f"{one.kind}: {one.what} (rows {_cell(one.left)} and {_cell(one.right)})")
        print(f"{len(shared)} shared")
        construction.tell(found.notes, "notes")
    if shared:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help=".json, .jsonl or .parquet, in either form.")],
    out: Annotated[Path, typer.Argument(help="The same, in the form its name ends in.")],
    messages: Annotated[
        bool, typer.Option("--messages", help="Write messages + audios, as other trainers read.")
    ] = False,
) -> None:
    """Convert a manifest between JSON, JSONL and Parquet, and to or from messages + audios."""
    from diffa.data.formats import read_rows, write_rows
    from diffa.data.samples import DataError, listed

    rows, faults = read_rows(source)
    if not rows:
        raise DataError(f"{source} holds no usable row\n{listed(faults, 3)}".rstrip())
    print(write_rows(out, rows, messages=messages))
    construction.tell([str(fault) for fault in faults], "rows left out")
    say(f"{len(rows)} rows")


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(one) for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return "" if value is None else str(value)
