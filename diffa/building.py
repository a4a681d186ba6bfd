"""Build a model from a spec, and exchange a part of one."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffa.errors import CheckpointError, SpecError
from diffa.model import Model
from diffa.schema import schema
from diffa.spec import Chosen, Spec, mismatch

_GIB = 2**30


def build(
    spec: Spec | Mapping[str, Any] | str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> Model:
    """Build the model that a spec names: a mapping, a path, or the name of a preset.

    Args:
        spec: what to build.
        device: where to; ``meta`` is a dry run that loads no weights and needs no network for
            the published models.
        dtype: of the backbone; bfloat16 on a GPU and float32 elsewhere where None. The encoder
            and the adapters stay in float32.

    Raises:
        SpecError: the spec has faults, or its parts do not fit each other.
        PluginError: a part cannot be imported or is not what it should be.
        CheckpointError: weights are missing or do not fit, or memory will not hold them.
    """
    return assemble(Spec.read(spec).resolve(), torch.device(device), dtype)


def assemble(
    spec: Spec,
    place: torch.device,
    dtype: torch.dtype | str | None,
    stored: Container[str] = (),
) -> Model:
    """Build a resolved spec; parts at ``stored`` paths wait for ``load`` to fill them."""
    precise = _dtype(dtype, place)
    chosen = spec.choices()
    _await_lora(chosen["backbone"], stored)
    if place.type != "meta" and chosen["backbone"].options.get("checkpoint"):
        _check_memory(chosen["backbone"], place, precise)
    with torch.device("meta" if place.type == "meta" else "cpu"):
        encoder = make(chosen["encoder"])
        backbone = make(chosen["backbone"])
        adapters = {}
        for path, part in chosen.items():
            if part.kind != "adapter":
                continue
            if path in stored and "checkpoint" in part.options:
                part.options["checkpoint"] = None
            adapters[path.partition(".")[2]] = make(part, source=encoder.out, width=backbone.width)
    rules = {kind: make(chosen[kind], vocab=backbone.vocab) for kind in ("sampler", "objective")}
    for kind, rule in rules.items():
        _check_decoding(kind, chosen, rule.decoding, backbone.decoding)
    model = Model(encoder=encoder, adapters=adapters, backbone=backbone, spec=spec, **rules)
    if place.type != "meta":
        encoder.to(place, torch.float32)
        model.adapters.to(place, torch.float32)
        backbone.to(place, precise)
    learn(model, spec.data["train"])
    if place.type != "meta" and "backbone.lora" in spec.data["train"]:
        model.get_submodule("backbone.lora").float()  # small steps need all their digits
    return model.eval()


def swap(model: Model, **parts: Any) -> Model:
    """Return a model with some parts exchanged and the rest shared.

    ``swap(model, sampler={"name": "blockwise", "threshold": 0.9})`` replaces a whole part:
    options that are left out take their defaults. ``adapters`` takes a mapping of all of them.

    Raises:
        SpecError: a part that a spec does not have, or one that does not fit the others.
    """
    known = ("encoder", "adapters", "backbone", "sampler", "objective")
    if wrong := [kind for kind in parts if kind not in known]:
        raise SpecError(f"swap knows no part {wrong[0]!r}; it exchanges {', '.join(known)}")
    data = model.spec.data
    data.update(parts)
    if data.get("train"):  # what is gone cannot learn
        data["train"] = [name for name in data["train"] if name not in _gone(model, parts)]
    spec = Spec.read(data).resolve()
    chosen = spec.choices()
    encoder = _moved(model, chosen["encoder"]) if "encoder" in parts else model.encoder
    backbone = model.backbone
    if "backbone" in parts:
        backbone = make(chosen["backbone"]).to(model.device, model.dtype)
    adapters: Mapping[str, nn.Module] = dict(model.adapters.items())
    if {"encoder", "backbone", "adapters"} & set(parts):
        adapters = {
            path.partition(".")[2]: _moved(model, part, source=encoder.out, width=backbone.width)
            for path, part in chosen.items()
            if part.kind == "adapter"
        }
    rules = {}
    for kind in ("sampler", "objective"):
        fresh = kind in parts or "backbone" in parts
        rules[kind] = make(chosen[kind], vocab=backbone.vocab) if fresh else getattr(model, kind)
        _check_decoding(kind, chosen, rules[kind].decoding, backbone.decoding)
    swapped = Model(encoder=encoder, adapters=adapters, backbone=backbone, spec=spec, **rules)
    learn(swapped, spec.data["train"])
    if "backbone" in parts and "backbone.lora" in spec.data["train"]:
        swapped.get_submodule("backbone.lora").float()  # as in assemble
    return swapped.train(model.training)


def _gone(model: Model, parts: Mapping[str, Any]) -> set[str]:
    """Names of what could learn in a model, and is not in the parts that replace its own."""
    kept = set(parts.get("adapters", model.adapters))
    gone = {f"adapters.{key}" for key in model.adapters if key not in kept}
    backbone = parts.get("backbone", model.spec.data["backbone"])
    lora = isinstance(backbone, Mapping) and backbone.get("lora")
    return gone if lora else {*gone, "backbone.lora"}


def make(part: Chosen, **wires: Any) -> Any:
    """Construct a part, giving it the wires that it asks for by name."""
    cls = part.load()
    try:
        return cls(**{name: wires[name] for name in schema(cls).wires}, **part.options)
    except Exception as error:
        set_options = {key: value for key, value in part.options.items() if value is not None}
        error.add_note(f"while building {part.kind} {part.name!r} with options {set_options}")
        raise


def learn(model: Model, train: list[str]) -> None:
    """Let the parts that ``train`` names learn, and freeze the others."""
    model.requires_grad_(False)
    for name in train:
        part = model.get_submodule(name)
        if name == "backbone.lora" and not any(True for _ in part.parameters()):
            raise SpecError("train: backbone.lora is folded in; set backbone.lora.merge to false")
        part.requires_grad_(True)


def _await_lora(part: Chosen, stored: Container[str]) -> None:
    """Leave LoRA's weights to ``load`` where they are stored, with the backbone or alone."""
    lora = part.options.get("lora")
    if lora and ("backbone.lora" in stored or "backbone" in stored):
        merged = lora.get("merge", bool(lora.get("checkpoint")))
        fresh = {**lora, "checkpoint": None, "merge": False}
        part.options["lora"] = None if merged and "backbone" in stored else fresh


def _moved(model: Model, part: Chosen, **wires: Any) -> Any:
    return make(part, **wires).to(model.device, torch.float32)


def _check_decoding(kind: str, chosen: Mapping[str, Chosen], own: str, rule: str) -> None:
    if own != rule:
        names = [
            str(getattr(chosen[k].name, "__name__", chosen[k].name)) for k in (kind, "backbone")
        ]
        raise SpecError(mismatch(kind, names[0], own, names[1], rule))


def _dtype(dtype: torch.dtype | str | None, place: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if place.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    usual = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not isinstance(found, torch.dtype) or found not in usual:
        raise SpecError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def _check_memory(part: Chosen, place: torch.device, dtype: torch.dtype) -> None:
    """Compare what the backbone needs with what is free, before gigabytes are read."""
    with torch.device("meta"):
        count = sum(weight.numel() for weight in make(part).parameters())
    need = count * dtype.itemsize
    free = _free(place)
    half = "dtype='bfloat16', " if dtype.itemsize > 2 else ""
    if free is not None and need > free:
        raise CheckpointError(
            f"backbone {part.name!r} needs {need / _GIB:.1f} GiB in {dtype} and {place} has "
            f"{free / _GIB:.1f} GiB free: try {half}another device, or a smaller "
            "checkpoint (device='meta' builds without weights)"
        )


def _free(place: torch.device) -> int | None:
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kilobytes.get("MemAvailable", 0) * 1024 or None


def usable(name: str | torch.device) -> torch.device:
    """The device of a name; raises SpecError where there is none or it does not work."""
    try:
        torch.empty(0, device=name)
        return torch.device(name)  # as it was named: of "cuda", each process takes its own
    except Exception as error:  # torch raises several types, with long texts
        reason = str(error).partition("\n")[0]
        raise SpecError(f"{name}: {reason}; `diffa doctor` shows what is here") from error
