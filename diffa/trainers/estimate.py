"""What a stage would take: rows, tokens, hours of audio, steps, and memory on each device."""

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
from diffa.data.samples import Sample, TimedSource
from diffa.errors import CheckpointError
from diffa.model import Model
from diffa.objectives.likelihood import MAX_LOGITS
from diffa.trainers.config_sections import Stage
from diffa.types import Features

_ROWS = 64  # of each source that are looked at
_LETTERS = 4.0  # per token, where no tokenizer is here to ask
_FRAMES = 32  # of a clip that shows what an adapter keeps
_SLOTS = 256  # read to see what one costs
_WINDOW = 30.0  # seconds of the longest row, where a source does not say


class Size(NamedTuple):
    """What rows of a source are like: seconds of audio and tokens of text, mean and most.

    ``questions`` about one recording, their mean, count as one row.
    """

    seconds: float
    tokens: float
    longest: float
    most: float
    questions: float = 1.0


class Expected:
    """A manifest that is not here yet, as the recipe describes it.

    Args:
        name: of the manifest.
        rows: how many there will be.
        hours: of audio in all of them.
        tokens: of text per row, prompt and answer.
    """

    faults = ()

    def __init__(self, name: str, *, rows: float, hours: float, tokens: float = 128) -> None:
        self.name, self.rows = name, int(rows)
        seconds = 3600 * hours / rows
        self.size = Size(seconds, tokens, max(_WINDOW, seconds), 2 * tokens)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Sample:
        """Refuse: there is nothing to read."""
        raise FileNotFoundError(self.name)


class Memory(NamedTuple):
    """Bytes on one device: weights, gradients, the optimiser's state, and what a batch needs."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Estimate(NamedTuple):
    """What one stage takes.

    Attributes:
        tokens: of text per epoch.
        sounds: audio embeddings per epoch.
        hours: of audio per epoch.
        memory: on each device.
        guessed: whether tokens were counted in letters, for want of a tokenizer.
    """

    tokens: int
    sounds: int
    hours: float
    memory: Memory
    guessed: bool


def estimate(model: Model, stage: Stage, mixed: Mixture, *, half: bool) -> Estimate:
    """Estimate what a stage takes; ``model`` is on the meta device, as the stage sees it.

    Args:
        model: the stage's parts; what learns is released.
        stage: how rows make batches.
        mixed: the stage's data.
        half: whether the backbone runs in bfloat16.
    """
    sizes = [measure(source, model) for source in mixed.sources]
    packed = float(stage.aids.get("packed", 0.0))  # the questions share what is heard
    if packed == 1:
        sizes = [size._replace(questions=1.0) for size in sizes]
    copies = 2 if stage.kind == "preferences" else 1
    counted = list(zip(mixed.shares, sizes, strict=True))
    sample_times = [packed + (1 - packed) * size.questions for size in sizes]
    heard = sum(
        n * often * embeddings(model, size.seconds)
        for (n, size), often in zip(counted, sample_times, strict=True)
    )
    slots = max(size.questions * embeddings(model, size.longest) + size.most for size in sizes)
    clip = max(size.longest for size in sizes)
    return Estimate(
        tokens=round(copies * sum(n * size.tokens for n, size in counted)),
        sounds=round(copies * heard),
        hours=sum(n * size.seconds for n, size in counted) / 3600,
        memory=memory(model, stage, slots=round(slots), seconds=clip, half=half),
        guessed=model.backbone.tokenizer is None,
    )


def tokenizer_of(model: Model) -> Any:
    """Return the backbone's tokenizer, which a dry build leaves out, if it is on this machine."""
    options = model.spec.parts()["backbone"].options
    names = [options.get("tokenizer"), options.get("checkpoint")]
    try:
        found = [find_checkpoint(name, weights=False) for name in names if name]
        return next(iter(filter(None, (load_tokenizer(None, place) for place in found))), None)
    except CheckpointError:
        return None


def measure(source: Any, model: Model) -> Size:
    """Look at rows of a source, evenly spread; raises what reading them raises."""
    if isinstance(source, Expected):
        return source.size
    count = len(source)
    rows = sorted({i * count // _ROWS for i in range(_ROWS)})
    samples = [source[i] for i in rows]
    timed = source if isinstance(source, TimedSource) else None
    seconds = [
        _seconds(s, timed.seconds(i) if timed else 0.0) for s, i in zip(samples, rows, strict=True)
    ]
    tokens = [count_tokens(sample, model) for sample in samples]
    asked = sum(1 + len(sample.extra_questions) for sample in samples) / len(rows)
    return Size(sum(seconds) / len(rows), sum(tokens) / len(rows), max(seconds), max(tokens), asked)


def _seconds(sample: Sample, told: float) -> float:
    if isinstance(sample.audio, Tensor) and sample.rate:
        return len(sample.audio) / sample.rate
    return told if sample.audio is not None else 0.0


def count_tokens(sample: Sample, model: Model) -> float:
    """Tokens of a row, prompt and answer (the mean of both answers of a pair)."""
    answers = [sample.target, *([sample.rejected] if sample.rejected else [])]
    asked = [(sample.question, answer) for answer in answers]
    asked += list(sample.extra_questions)
    if model.backbone.tokenizer is not None:
        rows = [len(model.chat_format.encode_example(q, a).tokens) for q, a in asked]
    else:
        turns = model.spec.data["prompt"]
        header = len(turns["system"]) + len(turns["user"]) + 60  # and the template's marks
        rows = [round((header + len(q) + len(a)) / _LETTERS) for q, a in asked]
    return sum(rows) / (len(rows) if sample.rejected else 1)


def embeddings(model: Model, seconds: float) -> int:
    """Audio embeddings that the adapters make of a recording."""
    if seconds <= 0:
        return 0
    frames = torch.tensor([max(1, round(seconds * model.encoder.out.rate))])
    counts: list[int] = [int(a.out_lengths(frames)) for a in _adapters(model)]
    return sum(counts)


def _adapters(model: Model) -> list[Any]:
    return list(model.adapters.values())


def memory(model: Model, stage: Stage, *, slots: int, seconds: float, half: bool) -> Memory:
    """Estimate the memory of one device, everything replicated on each (DDP)."""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    halved = {id(p) for p in model.backbone.parameters() if half and not p.requires_grad}
    weights = sum(p.numel() * (2 if id(p) in halved else 4) for p in model.parameters())
    pairs = stage.kind == "preferences"
    weights += 4 * learning if pairs else 0  # the reference
    draws = 2 * getattr(model.objective, "samples", 1) if pairs else 1
    moments = 1 if stage.optimizer.get("name") == "muon" else 2
    held = _encoded(model, stage.batch, seconds)
    if any(p.requires_grad for p in model.adapters.parameters()):
        held += sum(_adapted(a, model, stage.batch, seconds) for a in _adapters(model))
    if stage.kind != "listening":
        held += _read(model, stage.batch * draws, slots, half=half) + 3 * 4 * MAX_LOGITS
    return Memory(weights, 4 * learning, 4 * moments * learning, held)


def _encoded(model: Model, clips: int, seconds: float) -> int:
    """States of every layer in float32, and what one layer needs on the way."""
    out = model.encoder.out
    frames = max(1, round(max(seconds, _window(model)) * out.rate))
    kept = out.layers + 1 + 8
    if any(p.requires_grad for p in model.encoder.parameters()):
        kept += 16 * out.layers  # norms, projections, the feed-forward and attention of each layer
    return int(4 * clips * frames * out.width * kept)


def _window(model: Model) -> float:
    """Seconds that the encoder pads every clip to, if it has a window; 0 otherwise."""
    config = getattr(getattr(model.encoder, "encoder", None), "config", None)
    return float(getattr(config, "max_source_positions", 0)) / float(model.encoder.out.rate)


def _adapted(adapter: nn.Module, model: Model, clips: int, seconds: float) -> int:
    """Activations of an adapter: measured on two short clips, continued in a straight line."""
    real = copy.deepcopy(adapter).to_empty(device="cpu").train()
    for value in [*real.parameters(), *real.buffers()]:
        value.data.zero_()
    out = model.encoder.out
    found = []
    for frames in (_FRAMES, 2 * _FRAMES):
        lengths = torch.tensor([frames])
        states = tuple(torch.zeros(1, frames, out.width) for _ in range(out.layers + 1))
        found.append(saved(real, partial(real, Features(states, lengths, lengths))))
    more = max(seconds, _window(model)) * float(out.rate) / _FRAMES - 1
    return clips * max(0, round(found[0] + (found[1] - found[0]) * more))


def _read(model: Model, rows: int, slots: int, *, half: bool) -> int:
    """Activations of the backbone, which grow with the slots that it reads."""
    learns = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    half = half and all(".lora_" in name for name in learns)
    return round(rows * slots * _per_slot(model.backbone, half, bool(learns)))


@lru_cache(maxsize=4)
def _per_slot(backbone: Any, half: bool, learns: bool) -> float:
    """Bytes that a backbone keeps for each slot, traced on the meta device; ``learns`` is a key."""
    dtype = torch.bfloat16 if half else torch.float32
    backbone.to(dtype)  # an earlier stage may have left it in the other
    embeds = torch.empty(1, _SLOTS, backbone.width, device="meta", dtype=dtype).requires_grad_()
    positions = torch.arange(_SLOTS, device="meta")[None]
    body: Any = getattr(backbone, "transformer", None)
    again = getattr(body, "gradient_checkpointing", False)
    backbone.train()
    try:
        kept = saved(backbone, lambda: backbone(embeds, positions, AttentionContext()))
        if again:  # one layer at a time is computed again
            body.gradient_checkpointing = False
            whole = saved(backbone, lambda: backbone(embeds, positions, AttentionContext()))
            kept += whole // max(1, len(body.blocks))
    except (RuntimeError, NotImplementedError):  # it looks at values, and here are none
        return _by_layers(backbone, dtype.itemsize)
    finally:
        backbone.eval()
        if again:
            body.gradient_checkpointing = True
    return kept / _SLOTS


def _by_layers(module: nn.Module, size: int) -> float:
    """Guess the bytes kept for each slot: what every linear layer reads and writes."""
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    widest = max((m.out_features for m in linear), default=0)  # the head, which is not kept
    return float(size * sum(m.in_features + m.out_features % widest for m in linear))


def saved(module: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of ``run``, the weights left out."""
    own = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(size for size, _ in kept.values())
