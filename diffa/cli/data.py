"""The commands that make and check data: ``diffa data nano | manifest | check | ...``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffa.cli import synthesis
from diffa.cli.manifests import cell, read_manifests, with_progress
from diffa.cli.models import load_model, resolve_device
from diffa.cli.options import (
    DeviceOption,
    FsddOption,
    JsonOption,
    ManifestOutOption,
    Split,
)
from diffa.cli.output import print_json, print_note, print_notes, print_table

app = typer.Typer(help="Make and check training data.", no_args_is_help=True, rich_markup_mode=None)
app.command()(synthesis.captions)
app.command()(synthesis.rewrite)
app.command()(synthesis.preferences)

if TYPE_CHECKING:
    from diffa.data.synthesis.transcribers import Transcriber

ManifestsArgument = Annotated[
    list[Path],
    typer.Argument(metavar="MANIFEST...", help="Manifests: .json, .jsonl or .parquet files."),
]
CheckAudioOption = Annotated[
    bool, typer.Option("--audio/--no-audio", help="Open the recordings, too.")
]
BandOption = Annotated[
    list[str] | None,
    typer.Option(
        "--band",
        metavar="NAME=LOW,HIGH",
        help="Limits between low, normal and high of a measure, such as speed=2,4; "
        "may be repeated.",
    ),
]


@app.callback()
def data() -> None:
    """Make and check training data."""


@app.command("nano")
def make_nano_corpus(
    out: Annotated[Path, typer.Option("--out", help="Folder for audio/ and the manifest.")],
    split: Annotated[Split, typer.Option("--split", help="Recordings to use.")] = "train",
    count: Annotated[int, typer.Option("--count", min=1, help="Number of rows.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the corpus.")] = 0,
    questions: Annotated[
        int,
        typer.Option("--questions-per-utterance", min=1, help="Number of questions per recording."),
    ] = 1,
    form: Annotated[
        Literal["jsonl", "json"], typer.Option("--format", help="Format of the manifest.")
    ] = "jsonl",
    fsdd: FsddOption = "",
    exclude_speakers: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude-speaker", help="Speaker to leave out; may be repeated (default: none)."
        ),
    ] = None,
) -> None:
    """Write the nano corpus: spoken digits, sounds and melodies with questions about them."""
    from diffa.nano.corpus.examples import write_corpus

    manifest = write_corpus(
        out,
        split,
        seed,
        count,
        fsdd=fsdd or None,
        exclude_speakers=tuple(exclude_speakers or ()),
        questions_per_utterance=questions,
        form=form,
    )
    print(manifest)
    print_note(f"{count} rows of the {split} recordings, seed {seed}")


@app.command("corpora")
def list_corpora(as_json: JsonOption = False) -> None:
    """List the published corpora that diffa reads, and their labels."""
    from diffa.data.corpora.readers import CORPORA

    rows = [
        {"name": name, "corpus": one.title, "labels": list(one.labels), "layout": one.layout}
        for name, one in CORPORA.items()
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])


@app.command("manifest")
def write_manifest(
    corpus: Annotated[str, typer.Argument(help="Corpus name; `diffa data corpora` lists them.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the corpus.")],
    out: ManifestOutOption,
    split: Annotated[
        str, typer.Option("--split", help="Split of the corpus, such as train (default: all).")
    ] = "",
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, help="Number of recordings to draw (default: all)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed for --count.")] = 0,
    measured: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Measure pitch, volume and speaking rate."),
    ] = True,
    instructions: Annotated[
        Path | None,
        typer.Option(
            "--instructions", help="File of instructions, one per line (default: built-in ones)."
        ),
    ] = None,
    band: BandOption = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Number of processes.")] = 1,
    transcriber: Annotated[
        str,
        typer.Option(
            "--transcriber",
            metavar="MODEL",
            help="Model for recordings without transcripts: a spec, or a speech recogniser of "
            "transformers (default: none).",
        ),
    ] = "",
    device: DeviceOption = "auto",
) -> None:
    """Write a manifest of a published corpus with measured and labelled attributes."""
    from diffa.data.corpora.readers import read_corpus
    from diffa.data.formats import write_rows
    from diffa.data.synthesis.rows import clip_rows, read_instructions, sample_clips

    bands = synthesis.parse_bands(band)
    texts = read_instructions(instructions) if instructions else ()
    source = read_corpus(corpus, folder, split)
    clips = source.clips if count is None else sample_clips(source.clips, count, seed)
    faults: list[str] = []
    rows = clip_rows(
        clips,
        faults,
        measured=measured,
        workers=workers,
        bands=bands,
        instructions=texts,
        transcriber=_load_transcriber(transcriber, device) if transcriber else None,
    )
    entries = with_progress(rows, len(clips))
    print(write_rows(out, entries))
    if transcriber:
        count = sum("transcribed_by" in row for row in entries)
        print_note(f"{count} of {len(entries)} rows transcribed by {transcriber}")
    print_notes([*source.problems, *faults], "could not be used")
    print_note(f"{len(clips) - len(faults)} rows of {corpus}")


def _load_transcriber(name: str, device: str) -> Transcriber:
    """Load a spec's model, or a checkpoint of transformers (a folder or ORGANISATION/NAME)."""
    from diffa.data.synthesis.transcribers import DiffusionTranscriber, SpeechRecognizer

    path = Path(name)
    is_spec = path.suffix in (".yaml", ".yml", ".json") or (path / "spec.json").is_file()
    if is_spec or ("/" not in name and not path.is_dir()):
        return DiffusionTranscriber(load_model(name, None, "", device)[0])
    return SpeechRecognizer(name, device=resolve_device(device))


@app.command("attributes")
def measure_attributes(
    audio: Annotated[list[Path], typer.Argument(metavar="AUDIO...", help="Recordings.")],
    band: BandOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure pitch, volume and speaking rate of recordings."""
    from diffa.audio import prepare
    from diffa.data.synthesis.attributes import describe_attributes
    from diffa.data.synthesis.measures import RATE, measure_speech

    bands, rows = synthesis.parse_bands(band), []
    for path in audio:
        measures = measure_speech(prepare(path, RATE).numpy())
        words = describe_attributes({}, measures, "", bands)
        numbers = {k: None if v is None else round(v, 2) for k, v in measures._asdict().items()}
        rows.append({"audio": str(path), **numbers, "attributes": words})
    if as_json:
        print_json(rows)
        return
    columns = ["audio", "seconds", "Hz", "dBFS", "syllables/s", "words"]
    print_table(columns, [[cell(value) for value in row.values()] for row in rows])


@app.command("check")
def check_manifests(
    manifests: ManifestsArgument, audio: CheckAudioOption = True, as_json: JsonOption = False
) -> None:
    """Check every row of manifests; exit code 1 if training could not use one.

    Parquet files and conversations are checked in the form that `diffa data convert` writes.
    """
    from diffa.data.validation import validate_manifest

    reports = {str(path): validate_manifest(path, listen=audio) for path in manifests}
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
            counts = f"{len(report.faults)} unusable, {len(report.warnings)} warnings"
            print(f"{name}: {report.rows} rows, {counts}")
            print_notes([str(fault) for fault in report.faults], "unusable")
            print_notes([str(warning) for warning in report.warnings], "warnings")
    if any(report.faults for report in reports.values()):
        raise typer.Exit(1)


@app.command("stats")
def count_samples(manifests: ManifestsArgument, as_json: JsonOption = False) -> None:
    """Count samples and hours per dataset, and the values of each attribute."""
    from diffa.data.statistics import attribute_counts, corpus_statistics

    rows = read_manifests(manifests)
    lines = corpus_statistics(rows)
    if as_json:
        print_json({"table": [line._asdict() for line in lines], "values": attribute_counts(rows)})
        return
    print_table(list(lines[0]._fields), [[cell(value) for value in line] for line in lines])
    for name, counts in attribute_counts(rows).items():
        print(f"{name}: {', '.join(f'{value} {count}' for value, count in counts.items())}")


@app.command("leaks")
def find_leaks(
    train: Annotated[Path, typer.Argument(help="Manifest of the training split.")],
    test: Annotated[
        Path | None,
        typer.Argument(
            help="Manifest of the test split (default: none; duplicates in TRAIN are reported)."
        ),
    ] = None,
    audio: CheckAudioOption = True,
    near: Annotated[
        bool,
        typer.Option("--near", help="Also find recordings copied at another volume or coding."),
    ] = False,
    ignored: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="KIND",
            help="Kind of leak to ignore: id, audio, sound, speaker, text or question; "
            "may be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find samples that two splits share, or duplicates in one; exit code 1 if there are any.

    Kinds: id, audio (the same samples), sound (with --near), speaker, text, question.
    """
    from diffa.data.leakage import compare_splits, find_duplicates

    rows = read_manifests([train])
    if test is None:
        report = find_duplicates(rows, listen=audio)
    else:
        report = compare_splits(rows, read_manifests([test]), listen=audio, near=near)
    shared = [one for one in report.shared if one.kind not in (ignored or ())]
    if as_json:
        print_json({"shared": [one._asdict() for one in shared], "notes": report.notes})
    else:
        for one in shared:
            print(f"{one.kind}: {one.what} (rows {cell(one.left)} and {cell(one.right)})")
        print(f"{len(shared)} shared")
        print_notes(report.notes, "notes")
    if shared:
        raise typer.Exit(1)


@app.command("convert")
def convert_manifest(
    source: Annotated[
        Path, typer.Argument(help="Manifest to read: a .json, .jsonl or .parquet file.")
    ],
    out: Annotated[Path, typer.Argument(help="Manifest to write; its ending decides the format.")],
    messages: Annotated[
        bool,
        typer.Option("--messages", help="Write the columns messages and audios of chat trainers."),
    ] = False,
) -> None:
    """Convert a manifest between JSON, JSONL and Parquet, and to or from chat messages."""
    from diffa.data.formats import read_rows, write_rows
    from diffa.data.samples import DataError, format_faults

    rows, faults = read_rows(source)
    if not rows:
        raise DataError(f"{source} holds no usable row\n{format_faults(faults, 3)}".rstrip())
    print(write_rows(out, rows, messages=messages))
    print_notes([str(fault) for fault in faults], "rows left out")
    print_note(f"{len(rows)} rows")
