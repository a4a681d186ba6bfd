"""Feed the steps of an answer to a streamer of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from diffa.types import Step


def relay(steps: Iterable[Step], streamer: Any) -> Iterator[Step]:
    """Pass the steps of one row on, telling a streamer of each.

    Follows ``TextDiffusionStreamer``: ``put`` gets tokens that are final with nothing undecided
    before them, once; ``put_draft``, where the streamer has it, all that follow, at every step;
    ``end`` is called last.

    Raises:
        ValueError: the steps are of several rows.
    """
    told = 0
    for step in steps:
        if len(step.tokens) != 1:
            raise ValueError(f"a streamer shows one row, not {len(step.tokens)}")
        sure = int(step.final[0].long().cumprod(dim=0).sum())
        if sure > told:
            streamer.put(step.tokens[0, told:sure].cpu())
            told = sure
        if hasattr(streamer, "put_draft") and sure < step.tokens.shape[1]:
            streamer.put_draft(step.tokens[0, sure:].cpu())
        yield step
    streamer.end()
