"""Read the tokenizer that lies beside a backbone's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffa.checkpoints import read as checkpoint
from diffa.errors import CheckpointError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def read_tokenizer(name: str | None, folder: Path | None) -> Any:
    """Return the tokenizer of ``name`` (a folder or Hub id), else of ``folder``, else None.

    Under the meta device (a dry run) there is none. No remote code is run.

    Raises:
        CheckpointError: files are there but no tokenizer can be read from them.
    """
    if checkpoint.is_meta():
        return None
    place = folder if name is None else checkpoint.find_checkpoint(name, weights=False)
    if place is None or not any((place / file).is_file() for file in _FILES):
        if name is not None:
            raise CheckpointError(f"{place} holds no tokenizer: expected one of {_FILES}")
        return None
    from transformers import AutoTokenizer, PretrainedConfig

    # With its class named, a tokenizer needs no model's config, and transformers, which does not
    # know LLaDA's, would warn about it.
    named = (place / _FILES[2]).is_file() and checkpoint.load_config(place, _FILES[2])
    known = {"config": PretrainedConfig()} if named and named.get("tokenizer_class") else {}
    try:
        return AutoTokenizer.from_pretrained(str(place), trust_remote_code=False, **known)
    except Exception as error:  # the readers raise many types for damaged files
        raise CheckpointError(f"{place}: the tokenizer cannot be read: {error}") from error
