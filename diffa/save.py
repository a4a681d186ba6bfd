"""Save a model and load it again: spec.json beside model.safetensors, written atomically.

The package's ``__init__`` imports this module, so torch is imported inside the functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffa.errors import CheckpointError, SpecError
from diffa.runtime.files import replace_folder
from diffa.runtime.text import parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffa.model import Model
    from diffa.spec.spec import Spec

SPEC, WEIGHTS = "spec.json", "model.safetensors"
_LORA = "backbone.lora."
_NOTES = "diffa"  # the key of a saved model's notes in the header of its weights


def save(model: Model, folder: str | Path) -> None:
    """Write a model to a folder: its resolved spec, and the weights that no checkpoint has.

    A frozen part with a checkpoint is loaded from that checkpoint again. The folder appears
    complete or not at all; one that holds nothing but a saved model is replaced, any other refused.

    Raises:
        CheckpointError: The folder holds something else, or cannot be written.
        SpecError: The spec holds a class instead of a name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from diffa import __version__

    folder = Path(folder)
    spec = absolute_checkpoints(model.spec)
    if options := lora_options(model):
        spec = spec.change(options)
    tensors, tied = _split_tied(saved_state(model))
    # safetensors writes several notes in a random order: equal models need equal files.
    notes = {"version": __version__, "spec": spec.to_json(), "tied": tied}
    _check_replaceable(folder)
    try:
        with replace_folder(folder) as draft:
            (draft / SPEC).write_text(spec.to_json() + "\n", encoding="utf-8")
            save_file(tensors, draft / WEIGHTS, {_NOTES: json.dumps(notes, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error}; nothing was changed"
        ) from error


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    merge: bool = False,
) -> Model:
    """Return the model that ``save`` wrote, with exactly the weights it wrote.

    Args:
        folder: Folder of the saved model.
        device: Device of the model.
        dtype: Dtype of the backbone, as in ``build``.
        merge: Merge LoRA pairs into the backbone's weights: faster, and no longer trainable.

    Raises:
        CheckpointError: Files are missing or damaged, or do not match the installed parts.
        SpecError: The spec does not fit the installed parts, or there is nothing to merge.
    """
    import torch

    from diffa import __version__
    from diffa.assembly import assemble
    from diffa.checkpoints.read import load_config, tensor_faults
    from diffa.spec.spec import Spec

    folder = Path(folder)
    spec = Spec(load_config(folder, SPEC)).resolve()
    tensors, notes = _read_tensors(folder / WEIGHTS)
    stored = {path for path in spec.parts() if any(k.startswith(f"{path}.") for k in tensors)}
    if "backbone" in stored and all(k.startswith(_LORA) for k in tensors if k[:9] == "backbone."):
        stored = stored - {"backbone"} | {"backbone.lora"}
    model = assemble(spec, torch.device(device), dtype, stored=stored)
    state = saved_state(model)
    missing, extra = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    if missing or extra:
        raise CheckpointError(
            f"{folder} does not match the installed parts. missing: {missing[:6]} unexpected: "
            f"{extra[:6]} it was built with diffa {notes.get('version')}, this is {__version__}"
        )
    if faults := tensor_faults(state, tensors):
        raise CheckpointError(f"{folder / WEIGHTS} is unusable: {'; '.join(faults[:6])}")
    with torch.no_grad():
        for key, target in state.items():
            if not target.is_meta:
                target.copy_(tensors[key])
    return merge_lora(model, folder) if merge else model


def merge_lora(model: Model, folder: Path) -> Model:
    """Merge a model's LoRA pairs, saved in ``folder``, into its backbone.

    Raises:
        SpecError: The backbone has no LoRA pairs.
    """
    from diffa.backbones.lora import merge_lora_pairs
    from diffa.spec.spec import Spec

    if not merge_lora_pairs(model.backbone):
        raise SpecError(f"{folder}: the backbone has no live LoRA pairs to merge")
    data = model.spec.data
    lora = data["backbone"]["lora"]
    options = {**lora, "merge": True} if lora.get("checkpoint") else None
    if {"backbone", "backbone.lora"} & set(data["train"]):  # then ``folder`` holds the pairs
        alpha = lora.get("alpha", 16.0)
        options = {"checkpoint": str(folder.resolve()), "alpha": alpha, "merge": True}
    has_checkpoint = data["backbone"].get("checkpoint") is not None
    data["backbone"]["lora"] = options if has_checkpoint else None
    data["train"] = [name for name in data["train"] if name != "backbone.lora"]
    model.spec = Spec.read(data).resolve()
    return model


def lora_options(model: Model) -> dict[str, Any]:
    """Return the spec's options of the backbone's LoRA pairs, by path; {} without pairs.

    Pairs from a checkpoint have their own rank and layers, which the spec may leave out.
    """
    from torch import nn

    pairs = getattr(model.backbone, "lora", None)
    state = pairs.state_dict() if isinstance(pairs, nn.Module) else {}
    downs = {k.partition(".lora_A.")[0]: v for k, v in state.items() if ".lora_A." in k}
    if not downs:
        return {}
    return {
        "backbone.lora.rank": min(len(down) for down in downs.values()),
        "backbone.lora.target_modules": sorted({name.rpartition(".")[2] for name in downs}),
    }


def saved_state(model: Model) -> dict[str, Tensor]:
    """Return the weights that ``save`` writes: of parts that are trained or have no checkpoint."""
    train = model.spec.data["train"]
    state: dict[str, Tensor] = {}
    for path, part in model.spec.parts().items():
        if part.kind not in ("encoder", "adapter", "backbone"):
            continue
        trained = path in train or path.partition(".")[0] in train
        if trained or not part.options.get("checkpoint"):
            inner = model.get_submodule(path).state_dict(keep_vars=False)
            state.update({f"{path}.{key}": value for key, value in inner.items()})
    if "backbone.lora" in train and not any(key.startswith("backbone.") for key in state):
        inner = model.get_submodule("backbone.lora").state_dict()
        state.update({f"{_LORA}{key}": value for key, value in inner.items()})
    return state


def absolute_checkpoints(spec: Spec) -> Spec:
    """Make the folders in a spec absolute, so that it works from any folder."""
    changes = {}
    for path, part in spec.parts().items():
        for option in ("checkpoint", "tokenizer"):
            name = part.options.get(option)
            if isinstance(name, str) and Path(name).is_dir():
                changes[f"{path}.{option}"] = str(Path(name).resolve())
        lora = part.options.get("lora")
        name = lora.get("checkpoint") if isinstance(lora, dict) else None
        if isinstance(name, str) and Path(name).is_dir():
            changes[f"{path}.lora.checkpoint"] = str(Path(name).resolve())
    return spec.change(changes) if changes else spec


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything that ``save`` did not write."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is no folder: choose another place")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder} is the working directory: choose a folder inside it")
    names = {path.name for path in folder.iterdir()}
    foreign = sorted(names - {SPEC, WEIGHTS})
    if not foreign and names:
        try:
            _, notes = _read_tensors(folder / WEIGHTS, ())
        except CheckpointError:
            notes = {}
        foreign = [] if notes else sorted(names)
    if foreign:
        raise CheckpointError(
            f"{folder} holds files that diffa.save did not write ({', '.join(foreign[:4])}): move "
            "them, or choose another place"
        )


def _split_tied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors without those that share storage with an earlier one, and these by name."""
    first: dict[tuple[int, Any], str] = {}
    own, tied = {}, {}
    for key, value in state.items():
        storage = (value.data_ptr(), value.shape)
        if value.numel() and storage in first:
            tied[key] = first[storage]
        else:
            first[storage] = key
            own[key] = value.detach().cpu().contiguous()
    return own, tied


def _read_tensors(
    path: Path, keys: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a saved model's tensors (None: all, tied ones included) and its notes.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: is it a saved model?")
    try:
        with safe_open(path, framework="pt") as file:
            notes = parse_json((file.metadata() or {}).get(_NOTES, "{}"))
            tensors = {key: file.get_tensor(key) for key in (file.keys() if keys is None else keys)}
        if keys is None:
            tensors.update({key: tensors[source] for key, source in notes.get("tied", {}).items()})
    except (SafetensorError, ValueError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return tensors, notes
