"""The plan of a run of ``diffa map``: written once, so that every process does the same."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffa.errors import SpecError
from diffa.mapping.rows import QuestionManifest
from diffa.runtime.files import is_occupied, write_text
from diffa.runtime.text import parse_json

if TYPE_CHECKING:
    from diffa.model import Model

PLAN_FILE = "map.json"
log = logging.getLogger(__name__)


class ModelSource(NamedTuple):
    """A model that other processes can load: its spec, or the folder of a saved model."""

    spec: dict[str, Any]
    folder: str | None
    device: str
    dtype: str | None

    def load(self, device: str | None = None) -> Model:
        """Build or load the model. Default device: the source's."""
        import diffa

        device = device or self.device
        if self.folder is None:
            return diffa.build(self.spec, device=device, dtype=self.dtype)
        model = diffa.load(self.folder, device=device, dtype=self.dtype)
        return diffa.swap(model, sampler=self.spec["sampler"])


class MapPlan(NamedTuple):
    """Rows, questions, shards and the model of a run.

    Attributes:
        manifest: Path of the manifest.
        folder: Folder of relative audio paths. None: the manifest's own folder.
        digest: SHA-256 of the manifest.
        question: Question about every recording. None: each row's own.
        system: System prompt. None: as in the spec.
        max_tokens: Answer length.
        num_rows: Rows of the manifest.
        shard_size: Rows per shard.
        batch_size: Rows per batch.
        source: The model.
        threads: CPU threads of each process; the last digits of sums depend on them.
    """

    manifest: str
    folder: str | None
    digest: str
    question: str | None
    system: str | None
    max_tokens: int
    num_rows: int
    shard_size: int
    batch_size: int
    source: ModelSource
    threads: int

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_rows // self.shard_size)

    def shard_path(self, out: Path, index: int) -> Path:
        """Return the file of a shard."""
        return out / f"part-{index:05d}-of-{self.num_shards:05d}.parquet"

    def missing_shards(self, out: Path) -> list[int]:
        """Return the shards without a complete file; a damaged file is logged."""
        return [i for i in range(self.num_shards) if not _is_complete(self.shard_path(out, i))]

    def open_manifest(self) -> QuestionManifest:
        """Open the manifest in another process.

        Raises:
            SpecError: The manifest has changed since the run began.
        """
        manifest = QuestionManifest(self.manifest, question=self.question, folder=self.folder)
        if manifest.digest != self.digest:
            raise SpecError(f"{self.manifest} has changed since the run began: use another --out")
        return manifest

    def to_json(self) -> str:
        """Return the plan as JSON, always with the same bytes."""
        fields = {**self._asdict(), "source": self.source._asdict()}
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _is_complete(shard: Path) -> bool:
    """Return whether a Parquet file is there and ends as one; a full disk cuts files."""
    if not shard.is_file():
        return False
    with shard.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4))
        complete = file.read() == b"PAR1"
    if not complete:
        log.warning("%s is damaged (%d bytes): it is written again", shard, size)
    return complete


def planned_threads(out: Path) -> int | None:
    """Return the threads of the run in a folder; None if it holds no run."""
    file = out / PLAN_FILE
    if not file.is_file():
        return None
    threads: int = parse_json(file.read_text(encoding="utf-8"))["threads"]
    return threads


def write_plan(plan: MapPlan, out: Path) -> None:
    """Write the plan into a new folder, or check that the folder holds a run of the same plan.

    Raises:
        SpecError: The folder holds another run or something else.
    """
    file = out / PLAN_FILE
    if file.is_file():
        old, new = parse_json(file.read_text(encoding="utf-8")), json.loads(plan.to_json())
        if changed := sorted(key for key in new if old.get(key) != new[key]):
            raise SpecError(
                f"{out} holds a run that differs in {', '.join(changed)}: use another --out, or "
                "give the same options to continue it"
            )
        return
    if is_occupied(out):
        raise SpecError(f"{out} exists and holds no run of diffa map: choose another folder")
    write_text(file, plan.to_json())
