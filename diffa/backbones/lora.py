"""LoRA (arXiv 2106.09685) on a backbone: live through peft, or merged into the frozen weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffa.checkpoints import read as checkpoint
from diffa.errors import CheckpointError, SpecError, suggest

# Prefixes of LoRA's keys in DIFFA-2's checkpoint, and in a model that diffa saved.
_HEADS = ("lm_head", "ff_out", "head", "embed_out", "output_layer")
PREFIXES = ("llm_model.base_model.model.model.transformer.", "backbone.lora.")
DIFFA2_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")
_ADAPTER = "default"  # peft's name of the adapter, part of DIFFA-2's keys


class LoRAPair(NamedTuple):
    """Low-rank factors of one weight's change B @ A.

    Attributes:
        a: (rank, in).
        b: (out, rank).
    """

    a: Tensor
    b: Tensor


class LoRAOptions(NamedTuple):
    """The ``lora`` option of a backbone; the defaults are DIFFA-2's.

    Attributes:
        checkpoint: folder or Hub id of trained pairs. None: new pairs, without effect at first.
        revision: of the Hub repository.
        rank: of new pairs, 8 where None; a checkpoint's rank is read from its shapes.
        alpha: the change is scaled by alpha / rank; checkpoints do not store it.
        dropout: probability before the pairs, in training.
        target_modules: last names of the adapted layers. None: the backbone's default.
        merge: add the pairs to the weights at load. Default: true with a checkpoint.
        seed: of new pairs.
    """

    checkpoint: str | None = None
    revision: str | None = None
    rank: int | None = None
    alpha: float = 16.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None
    merge: bool = False
    seed: int = 0


def apply_lora(
    body: nn.Module, lora: Mapping[str, Any] | None, target_modules: Collection[str] = ()
) -> None:
    """Add or merge the LoRA pairs that a backbone's ``lora`` option describes.

    Args:
        body: the module whose linear layers are adapted.
        lora: the option's mapping, see ``LoRAOptions``. None: do nothing.
        target_modules: last names of the adapted layers if the option names none. Empty: every
            linear layer but the head.

    Raises:
        SpecError: an option is unknown or out of range, or peft is missing.
        CheckpointError: there are no pairs, half a pair, or a pair that fits no weight.
    """
    if lora is None:
        return
    options = parse_lora_options(lora)
    pairs: dict[str, LoRAPair] = {}
    if options.checkpoint is not None and not checkpoint.is_meta():
        pairs = load_lora_pairs(options.checkpoint, options.revision)
    weights = {n: _target_weight(body, n, pair, options) for n, pair in pairs.items()}
    if options.merge:
        for name, pair in pairs.items():
            _add_product(weights[name], pair, options.alpha / len(pair.a))
        return
    names = [*pairs] or _target_names(body, options.target_modules or tuple(target_modules))
    rank = len(next(iter(pairs.values())).a) if pairs else options.rank or 8
    if options.rank is not None and options.rank != rank:
        raise SpecError(f"lora.rank is {options.rank}, but {options.checkpoint} holds rank {rank}")
    _inject(body, names, rank, options)
    _init_pairs(body, pairs, options.seed)


def parse_lora_options(lora: Mapping[str, Any]) -> LoRAOptions:
    """Return the options in a spec's ``lora`` mapping.

    Raises:
        SpecError: an option is unknown or out of range.
    """
    fields = LoRAOptions._fields
    for name in lora:
        if name not in fields:
            raise SpecError(f"lora.{name}: unknown option{suggest(name, fields)}")
    values = {key: value for key, value in lora.items() if value is not None}
    options = LoRAOptions(**{"merge": "checkpoint" in values, **values})
    if options.merge and options.checkpoint is None:
        raise SpecError("lora.checkpoint: needed to merge, the folder or Hub id with the pairs")
    for name, lowest in (("rank", 1), ("alpha", 0.0), ("dropout", 0.0), ("seed", 0)):
        value = values.get(name)
        if value is not None and not (isinstance(value, int | float) and value >= lowest):
            raise SpecError(f"lora.{name} must be at least {lowest}, got {value!r}")
    if not options.dropout < 1:
        raise SpecError(f"lora.dropout must lie in [0, 1), got {options.dropout}")
    targets = options.target_modules
    if targets is not None and (isinstance(targets, str) or not targets):
        raise SpecError(f"lora.target_modules must be a list of layer names, got {targets!r}")
    return options


def load_lora_pairs(name: str, revision: str | None = None) -> dict[str, LoRAPair]:
    """Return the pairs of a checkpoint in DIFFA-2's keys or in those of ``diffa.save``."""
    folder = checkpoint.find_checkpoint(name, revision)
    for prefix in PREFIXES:
        if state := checkpoint.read_weights(folder, prefix):
            checkpoint.check_weights(state, source=folder)
            return group_lora_pairs(state, str(folder))
    raise CheckpointError(f"{folder} holds no LoRA pairs ({PREFIXES[0]}*.lora_A.*)")


def group_lora_pairs(state: Mapping[str, Tensor], source: str) -> dict[str, LoRAPair]:
    """Group keys ``NAME.lora_{A,B}.default.weight`` into NAME -> its pair.

    Raises:
        CheckpointError: a key has another form, or half of a pair is missing.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, half = key.removesuffix(f".{_ADAPTER}.weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise CheckpointError(f"{source}: {key} is not part of a LoRA pair")
        halves.setdefault(name, {})[half] = value
    for name, pair in halves.items():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise CheckpointError(f"{source}: the LoRA pair of {name!r} is not whole")
    return {name: LoRAPair(pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}


def lora_module(body: nn.Module) -> nn.Module:
    """Return the live pairs of a body as a module that shares their weights; empty without pairs.

    Its names are the checkpoint's (``blocks.0.q_proj.lora_A.default.weight``). It is created on
    every call, so it is not a submodule of the body.
    """
    root = nn.Module()
    for name, layer in lora_layers(body):
        node = root
        for step in name.split("."):
            if step not in node._modules:
                node.add_module(step, nn.Module())
            node = node.get_submodule(step)
        node.add_module("lora_A", layer.lora_A)
        node.add_module("lora_B", layer.lora_B)
    return root


def lora_layers(body: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the module of every adapted layer of a body."""
    for name, module in body.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def enable_lora(body: nn.Module, enabled: bool | None = None) -> None:
    """Enable or disable live pairs. None: enable them if any of them has an effect."""
    layers = [layer for _, layer in lora_layers(body)]
    if enabled is None:
        factors = [layer.lora_B[_ADAPTER].weight for layer in layers]
        enabled = any(b.is_meta or bool(b.any()) for b in factors)
    for layer in layers:
        # peft also changes which weights learn; restore that
        requires_grad = {p: p.requires_grad for p in layer.parameters()}
        layer.enable_adapters(enabled)
        for weight, learns in requires_grad.items():
            weight.requires_grad_(learns)


@torch.no_grad()
def merge_lora_pairs(body: nn.Module) -> int:
    """Add live pairs to the weights they adapt, remove them, and return how many there were."""
    layers = list(lora_layers(body))
    for name, layer in layers:
        pair = LoRAPair(layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight)
        base = layer.base_layer
        weight = base.weight.T if getattr(layer, "fan_in_fan_out", False) else base.weight
        _add_product(weight, pair, layer.scaling[_ADAPTER])
        parent, _, field = name.rpartition(".")
        setattr(body.get_submodule(parent), field, base)
    return len(layers)


@torch.no_grad()
def _add_product(weight: Tensor, pair: LoRAPair, scale: float) -> None:
    """Add scale * B @ A to a weight (out, in), computed in float32."""
    b, a = (half.to(weight.device).float() for half in (pair.b, pair.a))
    weight.copy_((weight.float() + scale * (b @ a)).to(weight.dtype))


def _target_weight(body: nn.Module, name: str, pair: LoRAPair, options: LoRAOptions) -> Tensor:
    """Return the weight (out, in) that a pair changes; raises CheckpointError."""
    weight: Tensor | None = dict(body.named_parameters()).get(f"{name}.weight")
    if weight is not None and _is_conv1d(body.get_submodule(name)):
        weight = weight.T
    if weight is None or weight.shape != (len(pair.b), pair.a.shape[1]):
        raise CheckpointError(
            f"{options.checkpoint}: the LoRA pair of {name!r} fits no weight here"
        )
    return weight


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def _target_names(body: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Return the names of linear layers whose last name is a target, without the head."""
    sizes = [m.num_embeddings for m in body.modules() if isinstance(m, nn.Embedding)]
    vocab_size = max(sizes, default=0)  # smaller embeddings are of positions or token types
    last_names = {
        name: name.rpartition(".")[2]
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear) or _is_conv1d(module)
    }
    for name in _head_names(body, vocab_size):
        del last_names[name]
    for target in targets:
        if target not in last_names.values():
            close = suggest(target, set(last_names.values()))
            raise SpecError(f"lora.target_modules: no layer is called {target!r}{close}")
    return [name for name, last in last_names.items() if not targets or last in targets]


def _head_names(body: nn.Module, vocab_size: int) -> list[str]:
    """Return the names of the linear layers that map to the vocabulary.

    Where other layers are as wide as the vocabulary, the head is the outermost one.
    """
    names = [
        name
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == vocab_size
    ]
    if len(names) > 1:
        outermost = min(name.count(".") for name in names)
        names = [name for name in names if name.count(".") == outermost]
    if len(names) > 1:  # a body without a head, or one whose layers have no blocks around them
        names = [name for name in names if name.rpartition(".")[2] in _HEADS]
    return names


def _inject(body: nn.Module, names: list[str], rank: int, options: LoRAOptions) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SpecError("live LoRA needs peft: pip install 'diffa-audio[train]'") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=names,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        inject_adapter_in_model(config, body, _ADAPTER)


@torch.no_grad()
def _init_pairs(body: nn.Module, pairs: Mapping[str, LoRAPair], seed: int) -> None:
    """Fill live pairs from a checkpoint's; new ones have A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in lora_layers(body):
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        if a.is_meta:
            continue
        if name in pairs:
            a.copy_(pairs[name].a)
            b.copy_(pairs[name].b)
            continue
        bound = 1 / math.sqrt(a.shape[1])  # Kaiming uniform with a = sqrt(5), as in peft
        a.copy_((2 * torch.rand(a.shape, generator=generator) - 1) * bound)
        b.zero_()
