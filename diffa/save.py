"""Save a model and load it again: spec.json beside model.safetensors, written atomically.

The package's ``__init__`` imports this module, so torch is imported inside the functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffa.errors import CheckpointError, SpecError
from diffa.runtime.files import replace_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffa.model import Model
    from diffa.spec.spec import Spec

SPEC, WEIGHTS = "spec.json", "model.safetensors"
_LORA = "backbone.lora."


def save(model: Model, folder: str | Path) -> None:
    """Write the resolved spec and the weights that no checkpoint pins.

    A part is left to its checkpoint when it has one and does not learn. The folder appears whole
    or not at all; one that holds a saved model is replaced, any other is refused.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
        SpecError: a class stands for a name in the spec.
    """
    from safetensors.torch import save_file

    from diffa import __version__

    folder = Path(folder)
    spec = absolute_checkpoints(model.spec)
    if found := lora_options(model):
        spec = spec.change(found)
    tensors, tied = _unshared(saved_state(model))
    notes = {"format": "pt", "diffa": __version__, "spec": spec.to_json()}
    with replacing(folder) as fresh:
        (fresh / SPEC).write_text(spec.to_json() + "\n", encoding="utf-8")
        save_file(tensors, fresh / WEIGHTS, {**notes, "tied": json.dumps(tied)})


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    merge: bool = False,
) -> Model:
    """Build the model that ``save`` wrote, with exactly the weights it wrote.

    Args:
        folder: where it was saved.
        device: where to put it.
        dtype: of the backbone, as in ``build``.
        merge: fold live LoRA pairs into the backbone's weights: faster, and no longer trained.

    Raises:
        CheckpointError: files are missing or damaged, or do not match the installed parts.
        SpecError: the spec does not fit the installed parts, or there is nothing to merge.
    """
    import torch

    from diffa import __version__
    from diffa.assembly import assemble
    from diffa.checkpoints.read import load_config
    from diffa.spec.spec import Spec

    folder = Path(folder)
    spec = Spec(load_config(folder, SPEC)).resolve()
    tensors, version = _read(folder / WEIGHTS)
    found = {path for path in spec.parts() if any(k.startswith(f"{path}.") for k in tensors)}
    if found & {"backbone"} and all(k.startswith(_LORA) for k in tensors if k[:9] == "backbone."):
        found = found - {"backbone"} | {"backbone.lora"}
    model = assemble(spec, torch.device(device), dtype, stored=found)
    wanted = saved_state(model)
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"{folder} does not match the installed parts. missing: {missing[:6]} unexpected: "
            f"{extra[:6]} it was built with diffa {version}, this is {__version__}"
        )
    with torch.no_grad():
        for key, target in wanted.items():
            if target.shape != tensors[key].shape:
                sizes = f"{tuple(tensors[key].shape)} where {tuple(target.shape)} is needed"
                raise CheckpointError(f"{folder}: {key} has shape {sizes}")
            if not target.is_meta:
                target.copy_(tensors[key])
    return merge_lora(model, folder) if merge else model


def merge_lora(model: Model, folder: Path) -> Model:
    """Fold a model's live LoRA pairs into its backbone; ``folder`` is where they are saved.

    Raises:
        SpecError: the backbone has no live pairs.
    """
    from diffa.backbones.lora import merge_lora_pairs
    from diffa.spec.spec import Spec

    if not merge_lora_pairs(model.backbone):
        raise SpecError(f"{folder}: the backbone has no live LoRA pairs to merge")
    data = model.spec.data
    lora = data["backbone"]["lora"]
    kept = {**lora, "merge": True} if lora.get("checkpoint") else None
    if {"backbone", "backbone.lora"} & set(data["train"]):  # the folder holds the pairs
        alpha = lora.get("alpha", 16.0)
        kept = {"checkpoint": str(folder.resolve()), "alpha": alpha, "merge": True}
    pinned = data["backbone"].get("checkpoint") is not None
    data["backbone"]["lora"] = kept if pinned else None
    data["train"] = [name for name in data["train"] if name != "backbone.lora"]
    model.spec = Spec.read(data).resolve()
    return model


def lora_options(model: Model) -> dict[str, Any]:
    """Return what a spec says of the backbone's live LoRA pairs, by path; {} where there are none.

    Pairs that were read know their rank and layers, which their spec need not say.
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
    """Weights that ``save`` writes, by name: of parts that learn or have no checkpoint."""
    train = model.spec.data["train"]
    state: dict[str, Tensor] = {}
    for path, part in model.spec.parts().items():
        if part.kind not in ("encoder", "adapter", "backbone"):
            continue
        learns = path in train or path.partition(".")[0] in train
        if learns or not part.options.get("checkpoint"):
            inner = model.get_submodule(path).state_dict(keep_vars=False)
            state.update({f"{path}.{key}": value for key, value in inner.items()})
    if "backbone.lora" in train and not any(key.startswith("backbone.") for key in state):
        inner = model.get_submodule("backbone.lora").state_dict()
        state.update({f"{_LORA}{key}": value for key, value in inner.items()})
    return state


def absolute_checkpoints(spec: Spec) -> Spec:
    """Write relative checkpoint folders out in full, so that the spec works from anywhere."""
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


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``folder`` at the end, or vanishes.

    Raises:
        CheckpointError: ``folder`` holds something that is no saved model, or cannot be written.
    """
    from safetensors import SafetensorError

    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (folder / SPEC).is_file():
        raise CheckpointError(f"{folder} exists and is no saved model: choose another place")
    try:
        with replace_folder(folder) as fresh:
            yield fresh
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error}; nothing was changed"
        ) from error


def _unshared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Leave out tensors that share storage with an earlier one, and say which those are."""
    first: dict[tuple[int, Any], str] = {}
    kept, tied = {}, {}
    for key, value in state.items():
        place = (value.data_ptr(), value.shape)
        if value.numel() and place in first:
            tied[key] = first[place]
        else:
            first[place] = key
            kept[key] = value.detach().cpu().contiguous()
    return kept, tied


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a saved model, tied ones repeated, and the version that wrote them."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: is it a saved model?")
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        tied = json.loads(notes.get("tied", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    tensors.update({key: tensors[source] for key, source in tied.items()})
    return tensors, notes.get("diffa", "?")
