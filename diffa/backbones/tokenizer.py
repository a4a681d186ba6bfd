"""Load the tokenizer of a backbone's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffa.checkpoints import read as checkpoint
from diffa.errors import CheckpointError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(name: str | None, folder: Path | None) -> Any:
    """Return the tokenizer of ``name`` (a folder or Hub id), else of ``folder``, else None.

    Returns None in a dry run. No remote code is run.

    Raises:
        CheckpointError: ``name`` has no tokenizer, or the files cannot be read.
    """
    if checkpoint.is_meta():
        return None
    source = folder if name is None else checkpoint.find_checkpoint(name, weights=False)
    if source is None or not any((source / file).is_file() for file in _FILES):
        if name is not None:
            raise CheckpointError(f"{source} holds no tokenizer: expected one of {_FILES}")
        return None
    from transformers import AutoTokenizer, PretrainedConfig

    # Where the tokenizer's class is named, an empty config keeps transformers from warning about
    # model types that it does not know, such as LLaDA's.
    fields = checkpoint.load_config(source, _FILES[2]) if (source / _FILES[2]).is_file() else {}
    options = {"config": PretrainedConfig()} if fields.get("tokenizer_class") else {}
    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, **options)
    except Exception as error:  # the readers raise many types for damaged files
        raise CheckpointError(f"{source}: the tokenizer cannot be read: {error}") from error
