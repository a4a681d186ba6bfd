"""What a run of ``diffa map`` does, fixed before it begins, so that every process does the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from diffa.errors import SpecError
from diffa.mapping.rows import Asking
from diffa.runtime.files import write_text

PLAN = "map.json"


class Source(NamedTuple):
    """The model: a spec, or the folder of a saved one; where it runs and in which precision."""

    spec: dict[str, Any]
    folder: str | None
    device: str
    dtype: str | None

    def load(self, device: str | None = None) -> Any:
        """Build the model, on another device where one is given."""
        import diffa

        place = device or self.device
        if self.folder is None:
            return diffa.build(self.spec, device=place, dtype=self.dtype)
        model = diffa.load(self.folder, device=place, dtype=self.dtype)
        return diffa.swap(model, sampler=self.spec["sampler"])


class Plan(NamedTuple):
    """Which rows are asked what, in which shards.

    Attributes:
        manifest: path of the manifest; ``folder`` is where its relative audio paths start.
        digest: SHA-256 of the manifest.
        question: asked of every row; each row's own where None.
        system: instead of the spec's system turn.
        max_tokens: length of the answers.
        rows: of the manifest.
        shard: rows per shard.
        batch: rows answered at once.
        source: the model.
        threads: CPU threads of each process: sums depend on it in the last digit.
    """

    manifest: str
    folder: str | None
    digest: str
    question: str | None
    system: str | None
    max_tokens: int
    rows: int
    shard: int
    batch: int
    source: Source
    threads: int

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard)

    def place(self, out: Path, index: int) -> Path:
        """File of a shard."""
        return out / f"part-{index:05d}-of-{self.shards:05d}.parquet"

    def pending(self, out: Path) -> list[int]:
        """Shards that are not there yet: a file appears whole or not at all."""
        return [index for index in range(self.shards) if not self.place(out, index).is_file()]

    def asking(self) -> Asking:
        """The rows, once more.

        Raises:
            SpecError: the manifest has changed since the run began.
        """
        found = Asking(self.manifest, question=self.question, folder=self.folder)
        if found.digest != self.digest:
            raise SpecError(f"{self.manifest} has changed since the run began: use another --out")
        return found

    def to_json(self) -> str:
        """As JSON, the same for the same plan."""
        fields = {**self._asdict(), "source": self.source._asdict()}
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def begun(out: Path) -> int | None:
    """Return the threads of the run that a folder holds; None where it holds none."""
    file = out / PLAN
    if not file.is_file():
        return None
    threads: int = json.loads(file.read_text(encoding="utf-8"))["threads"]
    return threads


def keep(plan: Plan, out: Path) -> None:
    """Write the plan into a new folder, or check that a begun run is of the same plan.

    Raises:
        SpecError: the folder holds another run or something else.
    """
    file = out / PLAN
    if file.is_file():
        old, new = json.loads(file.read_text(encoding="utf-8")), json.loads(plan.to_json())
        moved = sorted(key for key in new if old.get(key) != new[key])
        if moved:
            raise SpecError(
                f"{out} holds a run that differs in {', '.join(moved)}: use another --out, or give "
                "the same options to go on with it"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError(f"{out} exists and holds no run of diffa map: choose another folder")
    write_text(file, plan.to_json())
