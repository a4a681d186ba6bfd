"""The sections of a recipe: their options, types, ranges and defaults."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from diffa.errors import DiffaError, suggest
from diffa.spec import registry
from diffa.spec.schema import Report, coerce, read_schema

Part = str | Mapping[str, Any]


class Range(NamedTuple):
    """The values that a number may have; for a list or a mapping, each of its numbers."""

    rule: str
    contains: Callable[[float], bool]


SHARE = Range("from 0 to 1", lambda v: 0 <= v <= 1)
AT_LEAST_1 = Range("at least 1", lambda v: v >= 1)
POSITIVE = Range("above 0", lambda v: v > 0)
NOT_NEGATIVE = Range("at least 0", lambda v: v >= 0)
BELOW_1 = Range("at least 0 and below 1", lambda v: 0 <= v < 1)
SEED = Range("from 0 to 4294967295", lambda v: 0 <= v < 2**32)  # numpy's limit


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from: a manifest (``path``) or a generator (``source``).

    Args:
        path: Manifest (JSON or JSONL).
        source: Entry point of the group ``diffa.sources``.
        options: Options of the source.
        weight: How often the rows pass in one epoch (0.05: a twentieth of them).
        target: Manifest field that holds the answer.
        question: Question for every row. Default: each row's ``input``.
        questions: File of questions, one drawn per row (``transcribe``: 25 that diffa ships).
        expected_size: Size of a manifest that does not exist yet: ``rows``, ``hours`` and
            optionally ``tokens`` of text per row. Only a dry run uses it.
        audio_folder: Where relative audio paths start. Default: the manifest's folder.
        check_audio: Open every audio file's header before training.
        unique_ids: Refuse a second row of one ``audio_id``.
    """

    path: str | None = None
    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: Annotated[float, POSITIVE] = 1.0
    target: str = "target"
    question: str | None = None
    questions: str | None = None
    expected_size: Annotated[Mapping[str, float] | None, POSITIVE] = None
    audio_folder: str | None = None
    check_audio: bool = True
    unique_ids: bool = True


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer of a stage.

    Args:
        name: ``adamw``, or ``muon`` for matrices with AdamW for all other parameters.
        lr: Learning rate.
        weight_decay: Decoupled weight decay of matrices and embeddings.
        decay_norms_and_biases: Also decay norms, biases and other vectors, as DeepSpeed does when
            its configuration names the optimizer.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.
        matrix_lr: Muon's learning rate.
        momentum: Muon's momentum.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, NOT_NEGATIVE] = 1e-4
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    decay_norms_and_biases: bool = False
    betas: Annotated[list[float], BELOW_1] = field(default_factory=lambda: [0.9, 0.999])
    eps: Annotated[float, POSITIVE] = 1e-8
    matrix_lr: Annotated[float, NOT_NEGATIVE] = 0.02
    momentum: Annotated[float, BELOW_1] = 0.95


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule of a stage: warm-up, plateau, decay.

    Args:
        name: Shape of the decay.
        warmup_steps: Steps of warm-up; below 1, a share of all steps.
        warmup_type: Shape of the warm-up. ``log``: log(step + 1) / log(warmup_steps), the default
            of DeepSpeed's WarmupLR and WarmupDecayLR.
        stable_ratio: Share of the steps after warm-up that keep the full rate.
        min_lr_ratio: Final rate, as a share of the full rate.
    """

    name: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[float, NOT_NEGATIVE] = 0.0
    warmup_type: Literal["linear", "log"] = "linear"
    stable_ratio: Annotated[float, SHARE] = 0.0
    min_lr_ratio: Annotated[float, SHARE] = 0.0


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during a stage: held-out loss, generated answers, own functions.

    Args:
        data: Held-out data.
        eval_steps: Steps between two evaluations.
        max_samples: Held-out samples per evaluation.
        batch_size: Samples per forward pass.
        generate: Also generate answers and compare them with the targets.
        max_tokens: Length of the generated answers.
        evaluators: Names of functions passed to ``diffa.trainers.train(evaluators=...)``.
        best_metric: Metric whose best weights are kept. ``loss`` and ``error`` (word errors per
            word) should fall; ``accuracy``, ``exact`` and any other should rise.
    """

    data: list[DataConfig] = field(default_factory=list)
    eval_steps: Annotated[int, AT_LEAST_1] = 500
    max_samples: Annotated[int, AT_LEAST_1] = 64
    batch_size: Annotated[int, AT_LEAST_1] = 8
    generate: bool = True
    max_tokens: Annotated[int, AT_LEAST_1] = 64
    evaluators: list[str] = field(default_factory=list)
    best_metric: str = "loss"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Cache of a frozen encoder's features on disk.

    Args:
        folder: Folder of the cache, relative to the run's folder.
        dtype: Number format on disk.
        max_gigabytes: Size limit of the folder.
    """

    folder: str = "features"
    dtype: Literal["float16", "float32"] = "float16"
    max_gigabytes: Annotated[float, POSITIVE] = 50.0


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """A learner by name, and its options as its constructor declares them."""

    name: str = "answers"
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> type[Any]:
        """Import the learner's class."""
        return registry.load_part("learner", self.name)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: what is trained, on what data, and for how long.

    Args:
        name: Name of the stage's folder.
        learner: Entry point of the group ``diffa.learners``, or a mapping with its name and
            options: ``answers`` trains the model by its objective, ``preferences`` by one that
            compares pairs of answers.
        data: Training data.
        train: Parts that are trained: ``encoder``, ``adapters``, ``adapters.KEY``, ``backbone``,
            ``backbone.lora``.
        adapters: Adapters that the stage uses. Default: all of the spec.
        objective: Objective of the stage. Default: the spec's.
        optimizer: Optimizer.
        schedule: Learning-rate schedule.
        batch_size: Samples per device and forward pass (pairs for ``preferences``).
        gradient_accumulation_steps: Forward passes per optimizer step.
        devices: Devices that the batch size is meant for; a dry run assumes them, and a run on
            another number says so. Default: the recipe's.
        epochs: Passes over the data; excludes ``max_steps``.
        max_steps: Optimizer steps; excludes ``epochs``.
        answer_length: Tokens that an answer is padded to, or several lengths to choose from.
            Default: the longest answer of the batch (DIFFA).
        max_seq_len: Longest row, in tokens.
        group_by_length: Put recordings of similar duration in one batch.
        max_grad_norm: Gradient norm limit; 0: none.
        augment: Augmentation of the audio.
        cache: Cache of the frozen encoder's features. Default: none.
        evaluate: Evaluation during the stage. Default: none.
        load_best_model_at_end: Continue from the best evaluated weights, not from the last.
        save_steps: Steps between two checkpoints.
        logging_steps: Steps between two reports.
    """

    name: str = ""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    data: list[DataConfig] = field(default_factory=list)
    train: list[str] = field(default_factory=list)
    adapters: list[str] | None = None
    objective: Part | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch_size: Annotated[int, AT_LEAST_1] = 8
    gradient_accumulation_steps: Annotated[int, AT_LEAST_1] = 1
    devices: Annotated[int | None, AT_LEAST_1] = None
    epochs: Annotated[float | None, POSITIVE] = None
    max_steps: Annotated[int | None, AT_LEAST_1] = None
    answer_length: Annotated[int | list[int] | None, AT_LEAST_1] = None
    max_seq_len: Annotated[int, AT_LEAST_1] = 2048
    group_by_length: bool = True
    max_grad_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    augment: Mapping[str, Any] | None = None
    cache: CacheConfig | None = None
    evaluate: EvaluationConfig | None = None
    load_best_model_at_end: bool = False
    save_steps: Annotated[int, AT_LEAST_1] = 500
    logging_steps: Annotated[int, AT_LEAST_1] = 10

    @property
    def answer_lengths(self) -> list[int]:
        """Lengths that answers may be padded to; empty where the batch decides."""
        length = self.answer_length
        return length if isinstance(length, list) else [length] if length else []


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """A recipe: one spec, and stages that train it one after another.

    Args:
        spec: Preset, path or mapping.
        stages: Stages, in order.
        seed: Random seed of weights, data order and corruptions.
        precision: Number format of the forward pass. ``auto``: bf16 on GPUs that have it.
        gradient_checkpointing: Recompute the backbone's activations in the backward pass.
        num_workers: Data-loading processes per device.
        devices: Devices that the batch sizes are meant for; see the stage's option.
        loggers: Loggers besides the progress bar and ``log.jsonl``.
        save_total_limit: Checkpoints kept per stage.
    """

    spec: Part = ""
    stages: list[StageConfig] = field(default_factory=list)
    seed: Annotated[int, SEED] = 0
    precision: Literal["auto", "bf16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    num_workers: Annotated[int, NOT_NEGATIVE] = 0
    devices: Annotated[int | None, AT_LEAST_1] = None
    loggers: list[Literal["tensorboard", "trackio"]] = field(default_factory=list)
    save_total_limit: Annotated[int, AT_LEAST_1] = 2


Section = TypeVar("Section")


def parse_section(cls: type[Section], data: Any, path: str, report: Report) -> Section:
    """Return a section, and the sections within it, from a mapping.

    Args:
        cls: One of this module's dataclasses.
        data: The mapping.
        path: Dotted path of the section, for messages.
        report: Called with the path and the text of every fault; the option keeps its default.
    """
    if cls is LearnerConfig:
        return typing.cast(Section, parse_learner(data, path, report))
    if not isinstance(data, Mapping):
        report(path, f"expected a mapping, got {data!r}")
        return cls()
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{path}.{key}".lstrip(".")
        if key not in hints:
            report(where, f"unknown option{suggest(str(key), hints)}")
        else:
            _parse_option(values, key, value, hints[key], where, report)
    return cls(**values)


def parse_learner(data: Any, path: str, report: Report) -> LearnerConfig:
    """Return a learner from its name or a mapping, its options fitted to its constructor."""
    written = {"name": data} if isinstance(data, str) else data
    if not isinstance(written, Mapping) or not isinstance(written.get("name"), str):
        report(path, f"expected a name or a mapping with a name, got {data!r}")
        return LearnerConfig()
    options = {key: value for key, value in written.items() if key != "name"}
    try:
        cls = registry.load_part("learner", written["name"])
    except DiffaError as error:
        report(path, str(error))
        return LearnerConfig()
    return LearnerConfig(name=written["name"], options=fit_options(cls, options, path, report))


def fit_options(
    cls: type[Any], options: Mapping[str, Any], path: str, report: Report
) -> dict[str, Any]:
    """Return options as a constructor declares them; faults are reported and left out."""
    known = read_schema(cls).options
    fitted: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            report(f"{path}.{key}", f"unknown option{suggest(str(key), known)}")
        else:
            _coerce_option(fitted, key, value, known[key].hint, f"{path}.{key}", report)
    return fitted


def check_range(value: Any, limits: Range, path: str, report: Report) -> bool:
    """Report numbers out of range, those in lists and mappings too; return whether all fit."""
    inner = list(value.values()) if isinstance(value, Mapping) else value
    numbers = inner if isinstance(inner, list) else [] if inner is None else [inner]
    fits = all(limits.contains(number) for number in numbers)  # NaN is within nothing
    if not fits:
        report(path, f"must be {limits.rule}, got {value}")
    return fits


def _parse_option(
    values: dict[str, Any], key: str, value: Any, hint: Any, path: str, report: Report
) -> None:
    """Put an option's value among ``values`` unless it is faulty."""
    sections = [part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)]
    if sections and value is not None and get_origin(hint) is not list:
        values[key] = parse_section(sections[0], value, path, report)  # type: ignore[arg-type]
    elif sections and isinstance(value, list):
        values[key] = [
            parse_section(sections[0], entry, f"{path}.{i}", report)  # type: ignore[arg-type]
            for i, entry in enumerate(value)
        ]
    elif sections and (value is not None or type(None) not in get_args(hint)):
        report(path, f"expected a {'list' if get_origin(hint) is list else 'mapping'}, got {value}")
    elif not sections:
        _coerce_option(values, key, value, hint, path, report)
        limits = [part for part in get_args(hint) if isinstance(part, Range)]
        if key in values and not all(check_range(values[key], r, path, report) for r in limits):
            del values[key]


def _coerce_option(
    values: dict[str, Any], key: str, value: Any, hint: Any, path: str, report: Report
) -> None:
    """Put a value among ``values`` if it fits its type; report why it does not."""
    faults: list[tuple[str, str]] = []
    fitted = coerce(value, hint, path, lambda *fault: faults.append(fault))
    for fault in faults:
        report(*fault)
    if not faults:
        values[key] = fitted
