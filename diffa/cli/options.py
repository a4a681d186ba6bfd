"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Split = Literal["train", "test"]

# The model.
SpecOption = Annotated[
    str,
    typer.Option(
        "--spec",
        help="Model to run: a preset, a YAML or JSON file, or a saved model's folder "
        "(default: DIFFA_SPEC, else the preset nano).",
    ),
]
SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC", help="Spec: a preset, a YAML or JSON file, or a saved model's folder."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Value to override in the spec, such as sampler.block_length=16; may be repeated.",
    ),
]
SamplerPresetOption = Annotated[
    str,
    typer.Option(
        "--sampler-preset",
        metavar="NAME",
        help="Sampler preset of the spec, such as exact or fast (default: the spec's sampler).",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="Device that runs the model: auto, cpu, cuda or cuda:1; auto takes the GPU "
        "if there is one.",
    ),
]
TrainingDeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Device to train on: cpu or cuda (default: the GPU if there is one).",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Data type of the backbone: bfloat16, float16 or float32 (default: the spec's).",
    ),
]

# The question.
SystemOption = Annotated[
    str | None,
    typer.Option("--system", help="System prompt that overrides the spec's."),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Answer length in tokens (default: the spec's)."),
]
WatchOption = Annotated[
    bool, typer.Option("--watch", help="Show the answer forming step by step on stderr.")
]

# Files.
JsonOption = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")]
ManifestArgument = Annotated[
    Path, typer.Argument(metavar="MANIFEST", help="Manifest: a .json, .jsonl or .parquet file.")
]
ManifestOutOption = Annotated[
    Path,
    typer.Option("--out", help="Manifest to write; the ending .json, .jsonl or .parquet decides."),
]
AudioFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--audio", help="Folder where relative audio paths start (default: the manifest's)."
    ),
]
FsddOption = Annotated[
    str,
    typer.Option(
        "--fsdd",
        help="Folder of the Free Spoken Digit Dataset (default: the variable DIFFA_FSDD).",
    ),
]
RecipeArgument = Annotated[
    str, typer.Argument(help="Training recipe: a shipped recipe's name or a YAML file.")
]
RecipeSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Value to override in the recipe, such as stages.0.max_steps=100; may be repeated.",
    ),
]

# Requests to a language model, and machines.
PerMinuteOption = Annotated[
    float | None,
    typer.Option("--per-minute", min=0.01, help="Maximum requests per minute (default: no limit)."),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", help="Ray cluster to run on: an address, 'auto' or 'local' (default: none)."
    ),
]
GpusOption = Annotated[
    float, typer.Option("--gpus", min=0, help="GPUs of each replica; needs --ray.")
]
