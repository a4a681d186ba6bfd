"""Assemble a model: construct the parts of a resolved spec and check that they fit."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from diffa.encoders.none import NoEncoder
from diffa.errors import CheckpointError, SpecError, show
from diffa.model import Model
from diffa.runtime.imports import imports_on_cpu
from diffa.spec.schema import read_schema
from diffa.spec.spec import PartSpec, Spec, decoding_mismatch

_GIB = 2**30


def assemble(
    spec: Spec,
    device: torch.device,
    dtype: torch.dtype | str | None,
    *,
    stored: Container[str] = (),
    shared: Mapping[str, Any] | None = None,
) -> Model:
    """Return the model of a resolved spec.

    Args:
        spec: Names every part.
        device: Device of the parts; ``meta`` builds without weights.
        dtype: Dtype of the backbone. Default: bfloat16 on a GPU, float32 elsewhere.
        stored: Paths of parts whose weights ``load`` copies in afterwards.
        shared: Existing parts by kind, used as they are.
    """
    shared = dict(shared or {})
    dtype = _resolve_dtype(dtype, device)
    parts = spec.parts()
    meta = device.type == "meta"
    if "encoder" not in parts:
        shared["encoder"] = NoEncoder()
    if "backbone" not in shared:
        _defer_lora(parts["backbone"], stored)
        if not meta and parts["backbone"].options.get("checkpoint"):
            _check_memory(parts["backbone"], device, dtype)

    def part_of(kind: str, **wires: Any) -> Any:
        return shared[kind] if kind in shared else make_part(parts[kind], **wires)

    with torch.device("meta" if meta else "cpu"):
        encoder = part_of("encoder")
        backbone = part_of("backbone")
        adapters = shared.get("adapters")
        if adapters is None:
            adapters = {}
            for path, part in parts.items():
                if part.kind != "adapter":
                    continue
                if path in stored and "checkpoint" in part.options:
                    part.options["checkpoint"] = None
                key = path.partition(".")[2]
                adapters[key] = make_part(part, source=encoder.out, width=backbone.width)
    rules = {kind: part_of(kind, vocab=backbone.vocab) for kind in ("sampler", "objective")}
    for kind, rule in rules.items():
        _check_decoding(kind, parts, rule.decoding, backbone.decoding)
    model = Model(encoder=encoder, adapters=adapters, backbone=backbone, spec=spec, **rules)
    if not meta:
        for kind in ("encoder", "adapters", "backbone"):
            if kind not in shared:
                module = model.get_submodule(kind)
                module.to(device, dtype if kind == "backbone" else torch.float32)
    set_trainable(model, spec.data["train"])
    if not meta and "backbone" not in shared and "backbone.lora" in spec.data["train"]:
        model.get_submodule("backbone.lora").float()  # bfloat16 would round small updates away
    return model.eval()


def make_part(part: PartSpec, **wires: Any) -> Any:
    """Return a new part, with the wires that its constructor names."""
    try:
        # A dry run constructs parts on the meta device; the libraries they import must not be.
        with imports_on_cpu():
            cls = part.load()
            own = {name: wires[name] for name in read_schema(cls).wires}
            return cls(**own, **part.options)
    except Exception as error:
        set_options = {key: value for key, value in part.options.items() if value is not None}
        error.add_note(f"while building {part.kind} {part.name!r} with options {show(set_options)}")
        raise


def set_trainable(model: Model, train: list[str]) -> None:
    """Make the parts named by ``train`` trainable, and freeze the others."""
    model.requires_grad_(False)
    for name in train:
        part = model.get_submodule(name)
        if name == "backbone.lora" and not any(True for _ in part.parameters()):
            raise SpecError("train: backbone.lora is folded in; set backbone.lora.merge to false")
        part.requires_grad_(True)


def _defer_lora(part: PartSpec, stored: Container[str]) -> None:
    """Build LoRA pairs empty where ``load`` copies their weights in, or leave merged ones out."""
    lora = part.options.get("lora")
    if lora and ("backbone.lora" in stored or "backbone" in stored):
        merged = lora.get("merge", bool(lora.get("checkpoint")))
        fresh = {**lora, "checkpoint": None, "merge": False}
        part.options["lora"] = None if merged and "backbone" in stored else fresh


def _check_decoding(kind: str, parts: Mapping[str, PartSpec], own: str, rule: str) -> None:
    if own != rule:
        names = [str(getattr(parts[k].name, "__name__", parts[k].name)) for k in (kind, "backbone")]
        raise SpecError(decoding_mismatch(kind, names[0], own, names[1], rule))


def _resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    supported = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not isinstance(resolved, torch.dtype) or resolved not in supported:
        raise SpecError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return resolved


def _check_memory(part: PartSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a backbone that does not fit into free memory, before gigabytes are read."""
    with torch.device("meta"):
        count = sum(weight.numel() for weight in make_part(part).parameters())
    need = count * dtype.itemsize
    free = _free(device)
    half = "dtype='bfloat16', " if dtype.itemsize > 2 else ""
    if free is not None and need > free:
        raise CheckpointError(
            f"backbone {part.name!r} needs {need / _GIB:.1f} GiB in {dtype} and {device} has "
            f"{free / _GIB:.1f} GiB free: try {half}another device, or a smaller "
            "checkpoint (device='meta' builds without weights)"
        )


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kilobytes.get("MemAvailable", 0) * 1024 or None


def parse_device(name: str | torch.device) -> torch.device:
    """Return the device of a name; raises SpecError where it does not exist or work."""
    if torch.device(name).type == "mps" if not isinstance(name, str) else name.startswith("mps"):
        raise SpecError(
            f"{name}: Apple's GPUs have no float64, with which samplers and objectives draw: use "
            "cpu"
        )
    try:
        torch.empty(0, device=name)
        return torch.device(name)  # "cuda" stays without an index: each process takes its own
    except Exception as error:  # torch raises several types, with long texts
        reason = str(error).partition("\n")[0]
        raise SpecError(f"{name}: {reason}; `diffa doctor` shows what is here") from error
