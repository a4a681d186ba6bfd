"""Estimate what a stage takes: tokens, hours of audio, and memory on each device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffa.backbones.tokenizer import load_tokenizer
from diffa.canvas.kv_cache import AttentionContext
from diffa.checkpoints.read import find_checkpoint
from diffa.data.mixture import Mixture
from diffa.data.samples import Sample, Source, TimedSource
from diffa.errors import CheckpointError
from diffa.model import Model
from diffa.objectives.likelihood import MAX_LOGITS
from diffa.trainers.config_sections import StageConfig
from diffa.trainers.learners.base import StageCost
from diffa.trainers.trainable import num_trained
from diffa.types import Features

_SAMPLES = 64  # of each source that are measured
_CHARS_PER_TOKEN = 4.0  # where there is no tokenizer
_FRAMES = 32  # of the clip that an adapter's activations are measured on
_SLOTS = 256  # of the sequence that a backbone's activations are measured on
_LONGEST = 30.0  # seconds of the longest row of an expected manifest


class RowSize(NamedTuple):
    """The size of a source's rows; all questions about one recording are one row.

    Attributes:
        seconds: Mean duration of the audio.
        tokens: Mean number of text tokens.
        max_seconds: Longest audio.
        max_tokens: Most text tokens.
        questions: Mean number of questions about one recording.
    """

    seconds: float
    tokens: float
    max_seconds: float
    max_tokens: float
    questions: float = 1.0


class ExpectedManifest:
    """A manifest that does not exist yet, as the recipe's ``expected_size`` describes it.

    Args:
        name: File name of the manifest.
        rows: Number of rows.
        hours: Hours of audio in all rows.
        tokens: Text tokens per row, prompt and answer.
    """

    faults = ()

    def __init__(self, name: str, *, rows: float, hours: float, tokens: float = 128) -> None:
        self.name, self.rows = name, int(rows)
        seconds = 3600 * hours / rows
        self.size = RowSize(seconds, tokens, max(_LONGEST, seconds), 2 * tokens)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Sample:
        """Raise FileNotFoundError."""
        raise FileNotFoundError(self.name)


class DeviceMemory(NamedTuple):
    """Bytes on one device: weights, gradients, optimizer state, and activations of a batch."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all four."""
        return sum(self)


class Estimate(NamedTuple):
    """What one stage takes.

    Attributes:
        tokens: Text tokens per epoch.
        audio_embeddings: Audio embeddings per epoch.
        hours: Hours of audio per epoch.
        memory: Bytes on each device.
        approximate: Whether tokens were counted in characters, as there is no tokenizer.
    """

    tokens: int
    audio_embeddings: int
    hours: float
    memory: DeviceMemory
    approximate: bool


def estimate(model: Model, stage: StageConfig, mixture: Mixture, *, half: bool) -> Estimate:
    """Return what a stage takes.

    Args:
        model: The stage's model, on the meta device; what is trained requires gradients.
        stage: The stage.
        mixture: The stage's data.
        half: Whether the backbone runs in bfloat16.
    """
    cost: StageCost = stage.learner.load().cost(stage, model)
    sizes = [measure_rows(source, model) for source in mixture.sources]
    packing = cost.packing_share
    if packing == 1:  # the questions always share their recording
        sizes = [size._replace(questions=1.0) for size in sizes]
    shares = list(zip(mixture.shares, sizes, strict=True))
    clips_per_row = [packing + (1 - packing) * size.questions for size in sizes]
    embeddings = sum(
        rows * clips * model.count_embeddings(size.seconds)
        for (rows, size), clips in zip(shares, clips_per_row, strict=True)
    )
    slots = max(
        size.questions * model.count_embeddings(size.max_seconds) + size.max_tokens
        for size in sizes
    )
    seconds = max(size.max_seconds for size in sizes)
    return Estimate(
        tokens=round(cost.answers * sum(rows * size.tokens for rows, size in shares)),
        audio_embeddings=round(cost.answers * embeddings),
        hours=sum(rows * size.seconds for rows, size in shares) / 3600,
        memory=device_memory(model, stage, cost, slots=round(slots), seconds=seconds, half=half),
        approximate=model.backbone.tokenizer is None,
    )


def tokenizer_of(model: Model) -> Any:
    """Return the backbone's tokenizer, which a dry build leaves out, or None if it is not here."""
    options = model.spec.parts()["backbone"].options
    names = [options.get("tokenizer"), options.get("checkpoint")]
    try:
        folders = [find_checkpoint(name, weights=False) for name in names if name]
        return next(iter(filter(None, (load_tokenizer(None, place) for place in folders))), None)
    except CheckpointError:
        return None


def measure_rows(source: Source, model: Model) -> RowSize:
    """Return the size of a source's rows, measured on evenly spaced samples."""
    if isinstance(source, ExpectedManifest):
        return source.size
    count = len(source)
    rows = sorted({i * count // _SAMPLES for i in range(_SAMPLES)})
    samples = [source[i] for i in rows]
    timed = source if isinstance(source, TimedSource) else None
    seconds = [
        _seconds(s, timed.seconds(i) if timed else 0.0) for s, i in zip(samples, rows, strict=True)
    ]
    tokens = [count_tokens(sample, model) for sample in samples]
    questions = sum(1 + len(sample.extra_questions) for sample in samples) / len(rows)
    mean_seconds, mean_tokens = sum(seconds) / len(rows), sum(tokens) / len(rows)
    return RowSize(mean_seconds, mean_tokens, max(seconds), max(tokens), questions)


def _seconds(sample: Sample, listed: float) -> float:
    if isinstance(sample.audio, Tensor) and sample.rate:
        return len(sample.audio) / sample.rate
    return listed if sample.audio is not None else 0.0


def count_tokens(sample: Sample, model: Model) -> float:
    """Return the tokens of a row, prompt and answer (the mean of both answers of a pair)."""
    answers = [sample.target, *([sample.rejected] if sample.rejected else [])]
    pairs = [(sample.question, answer) for answer in answers]
    pairs += list(sample.extra_questions)
    if model.backbone.tokenizer is not None:
        rows = [len(model.chat_format.encode_example(q, a).tokens) for q, a in pairs]
    else:
        turns = model.spec.data["prompt"]
        header = len(turns["system"]) + len(turns["user"]) + 60  # of the template
        rows = [round((header + len(q) + len(a)) / _CHARS_PER_TOKEN) for q, a in pairs]
    return sum(rows) / (len(rows) if sample.rejected else 1)


def _adapters(model: Model) -> list[Any]:
    return list(model.adapters.values())


def device_memory(
    model: Model, stage: StageConfig, cost: StageCost, *, slots: int, seconds: float, half: bool
) -> DeviceMemory:
    """Return the memory of one device if all weights are replicated on each (DDP)."""
    trained = num_trained(model)
    halved = {id(p) for p in model.backbone.parameters() if half and not p.requires_grad}
    weights = sum(p.numel() * (2 if id(p) in halved else 4) for p in model.parameters())
    weights += 4 * trained if cost.reference else 0
    moments = 1 if stage.optimizer.name == "muon" else 2
    activations = _encoder_activations(model, stage.batch_size, seconds)
    if any(p.requires_grad for p in model.adapters.parameters()):
        activations += sum(
            _adapter_activations(a, model, stage.batch_size, seconds) for a in _adapters(model)
        )
    if cost.runs_backbone:
        rows = stage.batch_size * cost.answers * cost.corruptions
        activations += _backbone_activations(model, rows, slots, half=half) + 3 * 4 * MAX_LOGITS
    return DeviceMemory(weights, 4 * trained, 4 * moments * trained, activations)


def _encoder_activations(model: Model, clips: int, seconds: float) -> int:
    """Return the bytes of all layers' states in float32, and of one layer's inner values."""
    out = model.encoder.out
    frames = max(1, round(max(seconds, model.window_seconds) * out.rate))
    values = out.layers + 1 + 8
    if any(p.requires_grad for p in model.encoder.parameters()):
        values += 16 * out.layers  # norms, projections, feed-forward and attention of each layer
    return int(4 * clips * frames * out.width * values)


def _adapter_activations(adapter: nn.Module, model: Model, clips: int, seconds: float) -> int:
    """Return the bytes of an adapter's activations, extrapolated from two short clips."""
    real = copy.deepcopy(adapter).to_empty(device="cpu").train()
    for value in [*real.parameters(), *real.buffers()]:
        value.data.zero_()
    out = model.encoder.out
    sizes = []
    for frames in (_FRAMES, 2 * _FRAMES):
        lengths = torch.tensor([frames])
        states = tuple(torch.zeros(1, frames, out.width) for _ in range(out.layers + 1))
        sizes.append(saved_bytes(real, partial(real, Features(states, lengths, lengths))))
    more = max(seconds, model.window_seconds) * float(out.rate) / _FRAMES - 1
    return clips * max(0, round(sizes[0] + (sizes[1] - sizes[0]) * more))


def _backbone_activations(model: Model, rows: int, slots: int, *, half: bool) -> int:
    """Return the bytes of the backbone's activations."""
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    half = half and all(".lora_" in name for name in trained)
    return round(rows * slots * _bytes_per_slot(model.backbone, half, bool(trained)))


@lru_cache(maxsize=4)
def _bytes_per_slot(backbone: Any, half: bool, trained: bool) -> float:
    """Return the activation bytes per slot, traced on the meta device (cached by ``trained``)."""
    dtype = torch.bfloat16 if half else torch.float32
    backbone.to(dtype)  # an earlier stage may have set the other
    embeds = torch.empty(1, _SLOTS, backbone.width, device="meta", dtype=dtype).requires_grad_()
    positions = torch.arange(_SLOTS, device="meta")[None]
    body: Any = getattr(backbone, "transformer", None)
    again = getattr(body, "gradient_checkpointing", False)
    backbone.train()
    try:
        total = saved_bytes(backbone, lambda: backbone(embeds, positions, AttentionContext()))
        if again:  # activations of one layer at a time are recomputed
            body.gradient_checkpointing = False
            full = saved_bytes(backbone, lambda: backbone(embeds, positions, AttentionContext()))
            total += full // max(1, len(body.blocks))
    except (RuntimeError, NotImplementedError):  # it reads values, which meta tensors lack
        return _linear_bytes_per_slot(backbone, dtype.itemsize)
    finally:
        backbone.eval()
        if again:
            body.gradient_checkpointing = True
    return total / _SLOTS


def _linear_bytes_per_slot(module: nn.Module, size: int) -> float:
    """Return the bytes per slot of the inputs and outputs of all linear layers."""
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    widest = max((m.out_features for m in linear), default=0)  # the head, which keeps nothing
    return float(size * sum(m.in_features + m.out_features % widest for m in linear))


def saved_bytes(module: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps for the backward pass of ``run``, without weights."""
    own = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes(), value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(size for size, _ in saved.values())
