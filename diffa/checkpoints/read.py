"""Published checkpoints: find a folder, read its configuration and tensors, load a module."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffa.checkpoints import hub
from diffa.errors import CheckpointError, SpecError, show
from diffa.runtime.files import expand
from diffa.runtime.text import parse_json

_ASSETS = Path(__file__).parent.parent / "assets"


def is_meta() -> bool:
    """Return whether modules are built on the meta device, without weights."""
    return torch.get_default_device().type == "meta"


def find_checkpoint(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint.

    Args:
        name: A folder, ``package:FOLDER`` for weights inside diffa, or a Hub id ``org/name``
            (``org/name/sub`` for a folder in it).
        revision: Branch, tag or commit on the Hub. Default: the main branch.
        weights: False if the configuration is enough; diffa ships those of the published models.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    if name.startswith("package:"):
        return _inside(_ASSETS / "weights", name.removeprefix("package:"), name)
    folder = expand(name)
    if name and os.path.isdir(folder):  # False for names that the system refuses
        return folder
    if os.path.isfile(folder):
        raise CheckpointError(f"checkpoint {name!r} is a file: give the folder that holds it")
    repository, sub = _hub_id(name)
    shipped = _ASSETS / "configs" / repository.replace("/", "--") / sub
    if not weights and (shipped / "config.json").is_file():
        return shipped
    return hub.fetch_checkpoint(repository, sub, revision, weights=weights)


def _inside(root: Path, sub: str, name: str) -> Path:
    folder = (root / sub).resolve()
    if not (folder.is_relative_to(root.resolve()) and folder.is_dir()):
        raise CheckpointError(f"checkpoint {name!r}: diffa ships no such weights in {root}")
    return folder


def _hub_id(name: str) -> tuple[str, str]:
    parts = name.split("/")
    if len(parts) < 2 or not all(parts) or parts[0] in (".", "..", "~") or ".." in parts:
        raise CheckpointError(
            f"checkpoint {show(name)} is neither a folder here (looked in {Path.cwd()}) "
            "nor a Hub id such as 'openai/whisper-small'"
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def load_config(folder: Path, file: str) -> dict[str, Any]:
    """Return the JSON object in a checkpoint's file; raises CheckpointError."""
    path = Path(folder) / file
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {file}: is it a checkpoint folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def read_weights(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors whose keys start with ``prefix``, which is stripped.

    Reads safetensors, else PyTorch files (``weights_only``), whole or sharded. Tensors stay
    memory-mapped, in the file's dtype.

    Raises:
        CheckpointError: The files are missing or damaged.
    """
    folder = Path(folder)
    for file in hub.WEIGHT_FILES:
        index = folder / f"{file}.index.json"
        if (folder / file).is_file():
            names = [file]
        elif index.is_file():
            names = _shards(index, prefix)
        else:
            continue
        state: dict[str, Tensor] = {}
        for name in names:
            state.update(_read_file(folder / name, prefix))
        return {key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)}
    raise CheckpointError(
        f"{folder} holds no weights: expected {' or '.join(hub.WEIGHT_FILES)}, "
        "or shards with an index"
    )


def _shards(index: Path, prefix: str) -> list[str]:
    """Return the files that an index names for keys below ``prefix``."""
    weight_map = load_config(index.parent, index.name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no 'weight_map' object")
    files = sorted({str(file) for key, file in weight_map.items() if key.startswith(prefix)})
    for file in files:
        if Path(file).name != file or not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names {file!r}, which is not in {index.parent}")
    return files


def _read_file(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        return (
            _read_safetensors(path, prefix) if path.suffix == ".safetensors" else _read_pickle(path)
        )
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:  # torch advises to run the file's code
        raise CheckpointError(
            f"{path} is no PyTorch file, or holds more than tensors; such a file can run code when "
            "it is read, so diffa refuses it: take a version in safetensors"
        ) from error
    except Exception as error:  # damaged files raise a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({reason}): it may be cut short; fetch it again"
        ) from error


def _read_safetensors(path: Path, prefix: str) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # files from before torch 1.6 are no zip archives and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} should map names to tensors and nothing else")
    return dict(state)


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Load ``state`` into ``module``, every key and shape equal.

    A module on the meta device takes the tensors themselves (their dtype, no copy); any other
    keeps its own dtype and device.

    Args:
        module: The module to load.
        state: Its tensors by name.
        source: Where the state came from, for errors.

    Raises:
        CheckpointError: Keys are missing or unexpected, or tensors do not fit.
    """
    own = module.state_dict()
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "unusable": tensor_faults(own, state),
    }
    lines = [f"{name}: {_first_few(keys)}" for name, keys in faults.items() if keys]
    if lines:
        kind = type(module).__name__
        raise CheckpointError(f"{source} does not fit this {kind}. " + ". ".join(lines))
    assign = any(value.is_meta for value in own.values())
    module.load_state_dict(dict(state), strict=True, assign=assign)


def tensor_faults(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Say which tensors cannot be the weights ``own``: other shapes, no floats, not finite."""
    pairs = ((key, _fault(state[key], target)) for key, target in own.items() if key in state)
    return [f"{key} {fault}" for key, fault in pairs if fault]


def check_weights(state: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Refuse weights that are not finite; for modules that another library loads.

    Raises:
        CheckpointError: Names the first few.
    """
    if faults := tensor_faults(state, state):
        raise CheckpointError(f"{source} has unusable weights: {_first_few(faults)}")


def _fault(value: Tensor, target: Tensor) -> str | None:
    """Say what is wrong with a tensor, or return None."""
    if value.shape != target.shape:
        return f"has shape {tuple(value.shape)} where {tuple(target.shape)} is needed"
    if value.is_floating_point() != target.is_floating_point():
        return f"is {str(value.dtype).removeprefix('torch.')}: weights are floating-point numbers"
    if not value.is_floating_point() or value.is_meta or not value.numel():
        return None
    low, high = value.aminmax()  # one pass without a copy; NaN spreads to both
    return None if bool(torch.isfinite(low) & torch.isfinite(high)) else "is not finite"


def _first_few(keys: list[str], count: int = 6) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more


def resolve_config(
    checkpoint: str | None, revision: str | None, config: Mapping[str, Any] | None
) -> tuple[Path | None, Mapping[str, Any]]:
    """Return a checkpoint's folder and configuration, or None and the given configuration.

    Raises:
        SpecError: Neither or both are given.
    """
    if (checkpoint is None) == (config is None):
        raise SpecError("give either checkpoint (a folder or Hub id) or config (a mapping)")
    if checkpoint is None:
        assert config is not None
        return None, config
    folder = find_checkpoint(checkpoint, revision, weights=not is_meta())
    return folder, load_config(folder, "config.json")
