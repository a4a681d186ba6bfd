"""LoRA (arXiv 2106.09685) on a backbone: live through peft, or folded into the frozen weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffa.checkpoints import read as checkpoint
from diffa.errors import CheckpointError, SpecError, suggest

# Where pairs stand: in DIFFA-2's checkpoint, and in a model that diffa saved.
PREFIXES = ("llm_model.base_model.model.model.transformer.", "backbone.lora.")
TARGETS = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")  # DIFFA-2's
_NAME = "default"  # peft's name of the pairs, part of DIFFA-2's keys


class Pair(NamedTuple):
    """Low-rank factors of one weight's change: down (r, in), up (out, r)."""

    down: Tensor
    up: Tensor


class Options(NamedTuple):
    """What ``lora`` may say in a spec; the defaults are DIFFA-2's.

    Attributes:
        checkpoint: folder or Hub id that holds pairs; drawn anew (no change at first) where None.
        revision: of the Hub repository.
        rank: of new pairs; read ones know theirs.
        alpha: the change counts alpha / rank times; checkpoints do not say it.
        dropout: before the pairs, in training.
        target_modules: last names of the layers that get a pair.
        merge: fold the pairs into the weights at load; they are gone then. True by default where
            there is a checkpoint.
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


def adapt(body: nn.Module, lora: Mapping[str, Any] | None, targets: Collection[str] = ()) -> None:
    """Give a backbone's body the pairs that its ``lora`` option asks for; None for none.

    Args:
        body: the module whose linear layers are adapted.
        lora: the option's mapping; see ``Options``.
        targets: last names of layers that get a pair where the option does not say; every linear
            layer but the head where empty.

    Raises:
        SpecError: an unknown or impossible option, or peft is missing.
        CheckpointError: no pairs, half a pair, or a pair that fits no weight.
    """
    if lora is None:
        return
    chosen = read(lora)
    found: dict[str, Pair] = {}
    if chosen.checkpoint is not None and not checkpoint.is_meta():
        found = read_pairs(chosen.checkpoint, chosen.revision)
    if chosen.merge:
        for name, pair in found.items():
            _fold(_weight(body, name, pair, chosen), pair, chosen.alpha)
        return
    names = [*found] or _targeted(body, chosen.target_modules or tuple(targets))
    rank = len(next(iter(found.values())).down) if found else chosen.rank or 8
    if chosen.rank is not None and chosen.rank != rank:
        raise SpecError(f"lora.rank is {chosen.rank}, but {chosen.checkpoint} holds rank {rank}")
    for name, pair in found.items():
        _weight(body, name, pair, chosen)
    _inject(body, names, rank, chosen)
    _start(body, found, chosen.seed)


def read(lora: Mapping[str, Any]) -> Options:
    """Check the ``lora`` option of a spec; raises SpecError."""
    for option in lora:
        if option not in Options._fields:
            raise SpecError(f"lora.{option}: unknown option{suggest(option, Options._fields)}")
    given = {key: value for key, value in lora.items() if value is not None}
    chosen = Options(**{"merge": "checkpoint" in given, **given})
    if chosen.merge and chosen.checkpoint is None:
        raise SpecError("lora.checkpoint: needed to merge, the folder or Hub id with the pairs")
    for name, lowest in (("rank", 1), ("alpha", 0.0), ("dropout", 0.0), ("seed", 0)):
        value = given.get(name)
        if value is not None and not (isinstance(value, int | float) and value >= lowest):
            raise SpecError(f"lora.{name} must be at least {lowest}, got {value!r}")
    if not chosen.dropout < 1:
        raise SpecError(f"lora.dropout must lie in [0, 1), got {chosen.dropout}")
    if chosen.target_modules is not None and (
        isinstance(chosen.target_modules, str) or not chosen.target_modules
    ):
        raise SpecError(
            f"lora.target_modules must be a list of layer names, got {chosen.target_modules!r}"
        )
    return chosen


def read_pairs(name: str, revision: str | None = None) -> dict[str, Pair]:
    """Read pairs in DIFFA-2's keys, or from a model that ``diffa.save`` wrote."""
    folder = checkpoint.find_checkpoint(name, revision)
    for prefix in PREFIXES:
        if found := checkpoint.read_weights(folder, prefix):
            return pairs(found, str(folder))
    raise CheckpointError(f"{folder} holds no LoRA pairs ({PREFIXES[0]}*.lora_A.*)")


def pairs(found: Mapping[str, Tensor], source: str) -> dict[str, Pair]:
    """Group keys ``NAME.lora_{A,B}.default.weight`` into NAME -> its pair."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in found.items():
        name, _, half = key.removesuffix(f".{_NAME}.weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise CheckpointError(f"{source}: {key} is not part of a LoRA pair")
        halves.setdefault(name, {})[half] = value
    for name, pair in halves.items():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise CheckpointError(f"{source}: the LoRA pair of {name!r} is not whole")
    return {name: Pair(pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}


def view(body: nn.Module) -> nn.Module:
    """Return the live pairs of a body as a module of their own, sharing its weights.

    Its names are the checkpoint's (``blocks.0.q_proj.lora_A.default.weight``); it is empty where
    there are none. It is made anew on every call, so it is no part of the body.
    """
    root = nn.Module()
    for name, layer in layers(body):
        node = root
        for step in name.split("."):
            if step not in node._modules:
                node.add_module(step, nn.Module())
            node = node.get_submodule(step)
        node.add_module("lora_A", layer.lora_A)
        node.add_module("lora_B", layer.lora_B)
    return root


def layers(body: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the adapted layers of a body and their names."""
    for name, module in body.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def wake(body: nn.Module, awake: bool | None = None) -> None:
    """Let live pairs count or not; where None, they count once any of them changes anything."""
    found = [layer for _, layer in layers(body)]
    if awake is None:
        ups = [layer.lora_B[_NAME].weight for layer in found]
        awake = any(up.is_meta or bool(up.any()) for up in ups)
    for layer in found:
        learning = {p: p.requires_grad for p in layer.parameters()}
        layer.enable_adapters(awake)  # peft also says who learns; that is not asked here
        for weight, learns in learning.items():
            weight.requires_grad_(learns)


@torch.no_grad()
def fold(body: nn.Module) -> int:
    """Add live pairs to the weights they adapt and drop them; return how many there were."""
    found = list(layers(body))
    for name, layer in found:
        pair = Pair(layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight)
        base = layer.base_layer
        change = layer.scaling[_NAME] * (pair.up.float() @ pair.down.float())
        change = change.T if getattr(layer, "fan_in_fan_out", False) else change
        base.weight.copy_((base.weight.float() + change).to(base.weight.dtype))
        parent, _, field = name.rpartition(".")
        setattr(body.get_submodule(parent), field, base)
    return len(found)


def _weight(body: nn.Module, name: str, pair: Pair, chosen: Options) -> Tensor:
    """Find the weight (out, in) that a pair changes; raises CheckpointError."""
    weight: Tensor | None = dict(body.named_parameters()).get(f"{name}.weight")
    if weight is not None and type(body.get_submodule(name)).__name__ == "Conv1D":
        weight = weight.T  # GPT-2's layers hold it the other way round
    if weight is None or weight.shape != (len(pair.up), pair.down.shape[1]):
        raise CheckpointError(f"{chosen.checkpoint}: the LoRA pair of {name!r} fits no weight here")
    return weight


@torch.no_grad()
def _fold(weight: Tensor, pair: Pair, alpha: float) -> None:
    up, down = (half.to(weight.device).float() for half in (pair.up, pair.down))
    weight.copy_((weight.float() + alpha / len(down) * (up @ down)).to(weight.dtype))


def _targeted(body: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Return the names of linear layers whose last name is a target, the head left out."""
    linear = {
        name: module
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    tables = [m.num_embeddings for m in body.modules() if isinstance(m, nn.Embedding)]
    words = max(tables, default=0)  # others count positions or kinds of token
    heads = {
        name for name, module in linear.items() if getattr(module, "out_features", None) == words
    }
    last = {name: name.rpartition(".")[2] for name in linear if name not in heads}
    for target in targets:
        if target not in last.values():
            raise SpecError(
                f"lora.target_modules: no layer is called {target!r}{suggest(target, set(last.values()))}"
            )
    return [name for name, own in last.items() if not targets or own in targets]


def _inject(body: nn.Module, names: list[str], rank: int, chosen: Options) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SpecError("live LoRA needs peft: pip install 'diffa-audio[train]'") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=chosen.alpha,
        lora_dropout=chosen.dropout,
        target_modules=names,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        inject_adapter_in_model(config, body, _NAME)


@torch.no_grad()
def _start(body: nn.Module, found: Mapping[str, Pair], seed: int) -> None:
    """Put pairs in place: what was read, or A drawn from the seed (LoRA's start) and B zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers(body):
        down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        if down.is_meta:
            continue
        if name in found:
            down.copy_(found[name].down)
            up.copy_(found[name].up)
            continue
        bound = 1 / math.sqrt(down.shape[1])  # kaiming uniform at a = sqrt(5)
        down.copy_((2 * torch.rand(down.shape, generator=generator) - 1) * bound)
        up.zero_()
