"""The sections of a recipe: their options, types and defaults."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from diffa.errors import suggest
from diffa.spec.schema import Report, coerce

Part = str | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where samples come from: a manifest (``path``) or a generator (``source``, ``options``).

    ``weight``: how often its rows pass in one epoch. ``questions`` names a file of questions, one
    of which is drawn for each row (``transcribe``: 25 that diffa ships). ``expects`` says what a
    manifest that is not here yet should hold (``rows``, ``hours``, ``tokens`` of text per row);
    only a dry run reads it. The rest is said in ``data.manifest``.
    """

    path: str | None = None
    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    target: str = "target"
    question: str | None = None
    questions: str | None = None
    expects: Mapping[str, float] | None = None
    folder: str | None = None
    probe: bool = True
    unique: bool = True


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """``adamw``, or ``muon`` for matrices (at ``matrix_lr``) with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    matrix_lr: float = 0.02
    momentum: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over a stage: up, steady, down to ``floor`` of itself.

    ``warmup`` is in steps, below 1 a share of them; ``hold`` is the share of the rest that stays
    at the top before the named way down.
    """

    name: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    hold: float = 0.0
    floor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss, and answers written and compared, every so many steps.

    ``best`` names the number whose best weights are kept: ``loss`` and ``error`` (word errors
    per word) fall, ``accuracy``, ``exact`` and any other rise. ``by`` names evaluators that were
    passed to ``run``.
    """

    data: list[Mapping[str, Any]] = field(default_factory=list)
    every: int = 500
    rows: int = 64
    batch: int = 8
    generate: bool = True
    max_tokens: int = 64
    by: list[str] = field(default_factory=list)
    best: str = "loss"


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where a frozen encoder's features are kept, and how much room they may take."""

    folder: str = "features"
    dtype: Literal["float16", "float32"] = "float16"
    gigabytes: float = 50.0


@dataclass(frozen=True, kw_only=True)
class Aids:
    """What helps small models beyond DIFFA's procedure; see ``trainers.auxiliary``.

    ``say`` weighs CTC for each adapter, read ``through`` the backbone's embeddings (by cosine) or
    its frozen head; ``blank`` is its empty token; ``match`` names adapters
    that begin as loud as the embeddings; ``blur`` and ``noise`` roughen text that stands for
    audio; ``roomy`` and ``header`` vary how much of a row is the answer. ``packed``: share of
    the batches whose questions about one recording share a row (``trainers.packing``).
    ``start``: whether the backbone begins by copying (``trainers.start``). ``numbers``: words
    that tell spoken words apart by their number, in scripts and at the start of adapters that
    number (``adapters.numbering``);
    ``hints``: ``layer`` and ``weight`` of labels that name them (``trainers.hints``).
    """

    say: Mapping[str, float] = field(default_factory=dict)
    sharpness: float = 10.0
    pull: float = 0.0
    through: Literal["embeddings", "head"] = "embeddings"
    blank: str | None = None
    match: list[str] = field(default_factory=list)
    blur: float = 0.0
    noise: float = 0.0
    roomy: float = 0.0
    header: float = 1.0
    packed: float = 0.0
    start: bool = False
    numbers: list[str] = field(default_factory=list)
    hints: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: what learns, from what, and for how long.

    ``kind``: ``answers`` trains the whole model by its objective, ``preferences`` by one that
    compares pairs of answers (``batch`` counts pairs), ``listening`` the encoder by labels (with
    ``options`` for its learner). ``batch`` rows pass at once on each device,
    ``accumulate`` times per step. ``answer_length``: room for an answer without its header, or
    several to choose from; padded to the batch's longest row where null, as in DIFFA. ``take``
    says whose weights go on to the next stage.
    """

    name: str = ""
    kind: Literal["answers", "preferences", "listening"] = "answers"
    data: list[Mapping[str, Any]] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    adapters: list[str] | None = None
    objective: Part | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    aids: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 8
    accumulate: int = 1
    epochs: float | None = None
    steps: int | None = None
    answer_length: int | list[int] | None = None
    longest: int = 2048
    grouped: bool = True
    clip: float = 1.0
    augment: Mapping[str, Any] | None = None
    cache: Mapping[str, Any] | None = None
    evaluate: Mapping[str, Any] | None = None
    take: Literal["last", "best"] = "last"
    save: int = 500
    log: int = 10


@dataclass(frozen=True, kw_only=True)
class Head:
    """What holds for every stage of a recipe; ``devices`` is what a dry run counts with."""

    spec: Part = ""
    stages: list[Mapping[str, Any]] = field(default_factory=list)
    seed: int = 0
    precision: Literal["auto", "bf16", "float32"] = "auto"
    checkpointing: bool = False
    workers: int = 0
    devices: int | None = None
    loggers: list[Literal["tensorboard", "trackio"]] = field(default_factory=list)
    keep: int = 2


Section = TypeVar("Section")

_SHARE = ("from 0 to 1", lambda v: 0 <= v <= 1)
_COUNT = ("at least 1", lambda v: v >= 1)
_ABOVE = ("above 0", lambda v: v > 0)
_FROM = ("at least 0", lambda v: v >= 0)
_DECAY = ("at least 0 and below 1", lambda v: 0 <= v < 1)
_SEED = ("from 0 to 4294967295", lambda v: 0 <= v < 2**32)  # what numpy takes

_LIMITS: dict[type, dict[str, tuple[str, Callable[[float], bool]]]] = {
    Data: {"weight": _ABOVE},
    Optimizer: {"lr": _FROM, "matrix_lr": _FROM, "eps": _ABOVE, "weight_decay": _FROM}
    | {"betas": _DECAY, "momentum": _DECAY},
    Schedule: {"warmup": _FROM, "hold": _SHARE, "floor": _SHARE},
    Evaluation: dict.fromkeys(("every", "rows", "batch", "max_tokens"), _COUNT),
    Cache: {"gigabytes": _ABOVE},
    Aids: {"say": _FROM, "sharpness": _ABOVE, "pull": _FROM, "noise": _FROM}
    | dict.fromkeys(("blur", "roomy", "header", "packed"), _SHARE),
    Stage: {"epochs": _ABOVE, "clip": _FROM}
    | dict.fromkeys(("batch", "accumulate", "steps", "answer_length", "longest"), _COUNT)
    | dict.fromkeys(("save", "log"), _COUNT),
    Head: {"seed": _SEED, "workers": _FROM, "devices": _COUNT, "keep": _COUNT},
}


def read(cls: type[Section], data: Any, path: str, report: Report) -> Section:
    """Return a section from a mapping, reporting every option that is unknown or does not fit."""
    if not isinstance(data, Mapping):
        report(path, f"expected a mapping, got {data!r}")
        return cls()
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    faults: list[str] = []

    def note(where: str, text: str) -> None:
        faults.append(where)
        report(where, text)

    values = {}
    for key, value in data.items():
        where = f"{path}.{key}".lstrip(".")
        if key not in names:
            note(where, f"unknown option{suggest(str(key), names)}")
            continue
        fitted = coerce(value, hints[key], where, note)
        if not any(fault.startswith(where) for fault in faults):
            values[key] = fitted
    return cls(**values)


def check_limits(section: Any, path: str, report: Report) -> None:
    """Report the numbers of a section that are out of range, those in lists and mappings too."""
    for name, (rule, within) in _LIMITS[type(section)].items():
        value = getattr(section, name)
        held = list(value.values()) if isinstance(value, Mapping) else value
        numbers = held if isinstance(held, list) else [] if held is None else [held]
        if not all(within(number) for number in numbers):  # NaN is within nothing
            report(f"{path}.{name}".lstrip("."), f"must be {rule}, got {value}")
    if isinstance(section, Optimizer) and len(section.betas) != 2:
        report(f"{path}.betas", f"are two numbers, got {len(section.betas)}")
