"""The Hugging Face Hub: what of a repository is in the cache, and fetching only what is read."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffa.errors import CheckpointError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_TEXT = (".json", ".jinja", "merges.txt", "vocab.txt", "tokenizer.model")
_SECONDS = 5.0  # the Hub answers in well under a second, or it is not going to


def fetch_checkpoint(repository: str, sub: str, revision: str | None, *, weights: bool) -> Path:
    """Return the local folder of ``repository/sub``, from the cache or else from the network.

    Fetches configuration, tokenizer files and one set of weights, never code. Raises
    CheckpointError, within seconds when there is no network.
    """
    found = _cached(repository, sub, revision)
    if found is not None and not (weights and _weight_files(_names(found)) is None):
        return found
    name = f"{repository}/{sub}" if sub else repository
    if _offline():
        raise _absent(name, repository, "the Hub is switched off (HF_HUB_OFFLINE)")
    try:
        return _download(repository, sub, revision, weights=weights)
    except CheckpointError:
        raise
    except Exception as error:  # the http library's own types differ between its versions
        raise _absent(name, repository, _reason(error, repository, revision)) from error


def _cached(repository: str, sub: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", *WEIGHT_FILES, *(f"{whole}.index.json" for whole in WEIGHT_FILES)):
        inside = f"{sub}/{file}" if sub else file
        path = try_to_load_from_cache(repository, inside, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _offline() -> bool:
    from huggingface_hub import constants

    told = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return told or bool(constants.HF_HUB_OFFLINE)


def _names(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def _weight_files(names: Collection[str]) -> list[str] | None:
    """Return one whole set of weights among file names, safetensors first; None without one."""
    for whole in WEIGHT_FILES:
        stem, suffix = whole.rsplit(".", 1)
        if whole in names:
            return [whole]
        shards = [n for n in names if n.startswith(f"{stem}-") and n.endswith(f".{suffix}")]
        if f"{whole}.index.json" in names and shards and len(shards) == _count(shards[0]):
            return sorted(shards)
    return None


def _count(shard: str) -> int:
    """Return how many shards there are: 4 for ``model-00001-of-00004.safetensors``."""
    total = shard.rsplit(".", 1)[0].rsplit("-of-", 1)[-1]
    return int(total) if total.isdigit() else -1


def _download(repository: str, sub: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info: Any = HfApi().repo_info(repository, revision=revision, timeout=_SECONDS)
    start = f"{sub}/" if sub else ""
    files = [
        f.rfilename.removeprefix(start) for f in info.siblings if f.rfilename.startswith(start)
    ]
    names = [file for file in files if "/" not in file]
    wanted = [name for name in names if name.endswith(_TEXT)]
    if weights:
        tensors = _weight_files(names)
        if tensors is None:
            raise CheckpointError(
                f"{repository}/{sub} on the Hub holds no {' or '.join(WEIGHT_FILES)}"
            )
        wanted += tensors
    folder = snapshot_download(
        repository,
        revision=revision,
        allow_patterns=[start + name for name in wanted],
        etag_timeout=_SECONDS,
    )
    return Path(folder) / sub


def _reason(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"access is restricted: ask for it at https://huggingface.co/{repository}"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such repository, or it is private (hf auth login)"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub has no revision {revision!r} of it"
    return f"the Hub cannot be reached ({type(error).__name__}: {error})".splitlines()[0]


def _absent(name: str, repository: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {name!r} is not on this machine and {reason}. With a network, run "
        f"'hf download {repository}'; or give the path of a folder that holds it"
    )
