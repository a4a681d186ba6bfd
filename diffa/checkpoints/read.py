"""Published weights: find a folder, read its configuration and tensors, fill a module strictly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffa.checkpoints import hub
from diffa.errors import CheckpointError, SpecError

_ASSETS = Path(__file__).parent.parent / "assets"


def is_meta() -> bool:
    """Return whether modules are being built under ``torch.device("meta")``: load no weights."""
    return torch.get_default_device().type == "meta"


def find_checkpoint(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint; raises CheckpointError where there is none.

    ``name`` is a folder, ``package:FOLDER`` for weights inside diffa, or a Hub id
    ``org/name`` (``org/name/sub`` for a folder in it). Without ``weights`` configurations do,
    and those of the published models ship with diffa.
    """
    if name.startswith("package:"):
        return _inside(_ASSETS / "weights", name.removeprefix("package:"), name)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if folder.is_file():
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
            f"checkpoint {name!r} is neither a folder here (looked in {Path.cwd()}) "
            "nor a Hub id such as 'openai/whisper-small'"
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def load_config(folder: Path, file: str) -> dict[str, Any]:
    """Return the JSON object in ``folder / file``; raises CheckpointError."""
    path = Path(folder) / file
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {file}: is it a checkpoint folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def read_weights(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors whose keys start with ``prefix``, which is stripped.

    Reads safetensors, else PyTorch files (``weights_only``), whole or sharded; tensors stay
    memory-mapped, in the file's dtype. Raises CheckpointError for absent or damaged files.
    """
    folder = Path(folder)
    for whole in hub.WEIGHT_FILES:
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return _strip(_read(folder / whole, prefix), prefix)
        if index.is_file():
            state: dict[str, Tensor] = {}
            for shard in _shards(index, prefix):
                state.update(_read(folder / shard, prefix))
            return _strip(state, prefix)
    raise CheckpointError(
        f"{folder} holds no weights: expected {' or '.join(hub.WEIGHT_FILES)}, or shards with an index"
    )


def _shards(index: Path, prefix: str) -> list[str]:
    """Return the files that an index names for keys below ``prefix``."""
    table = load_config(index.parent, index.name).get("weight_map")
    if not isinstance(table, dict):
        raise CheckpointError(f"{index} has no 'weight_map' object")
    files = sorted({str(file) for key, file in table.items() if key.startswith(prefix)})
    for file in files:
        if Path(file).name != file or not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names {file!r}, which is not in {index.parent}")
    return files


def _read(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        return _read_safe(path, prefix) if path.suffix == ".safetensors" else _read_pickle(path)
    except CheckpointError:
        raise
    except Exception as error:  # the readers raise a dozen types for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({reason}): it may be cut short; fetch it again"
        ) from error


def _read_safe(path: Path, prefix: str) -> dict[str, Tensor]:
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


def _strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Put ``state`` into ``module``, every key in its place; raises CheckpointError otherwise.

    A module on the meta device takes the tensors themselves (their dtype, no copy); a real one
    keeps its own dtype and device. ``source`` says in errors where the state came from.
    """
    own = module.state_dict()
    shapes = [
        f"{key} {tuple(state[key].shape)} where {tuple(value.shape)} is needed"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "wrong shape": shapes,
    }
    told = [f"{what}: {_some(keys)}" for what, keys in faults.items() if keys]
    if told:
        kind = type(module).__name__
        raise CheckpointError(f"{source} does not fit this {kind}. " + ". ".join(told))
    assign = any(value.is_meta for value in own.values())
    module.load_state_dict(dict(state), strict=True, assign=assign)


def _some(keys: Iterable[str], most: int = 6) -> str:
    """Return the first few of ``keys`` and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def resolve_config(
    checkpoint: str | None, revision: str | None, config: Mapping[str, Any] | None
) -> tuple[Path | None, Mapping[str, Any]]:
    """Return a checkpoint's folder and configuration, or None and the configuration given.

    For parts that take either; raises SpecError for neither or both.
    """
    if (checkpoint is None) == (config is None):
        raise SpecError("give either checkpoint (a folder or Hub id) or config (a mapping)")
    if checkpoint is None:
        assert config is not None
        return None, config
    folder = find_checkpoint(checkpoint, revision, weights=not is_meta())
    return folder, load_config(folder, "config.json")
