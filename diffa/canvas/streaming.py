"""Pass the steps of an answer to a streamer of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from diffa.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from diffa.types import Step


class Streamer(Protocol):
    """A streamer as ``transformers.generate`` takes it, such as ``TextDiffusionStreamer``.

    One with ``put_draft`` also gets, at every step, the tokens that may still change.
    """

    def put(self, value: Tensor) -> object:
        """Take final tokens (L,)."""
        ...

    def end(self) -> object:
        """Take the end of the answer."""
        ...


class StreamerFeed:
    """Feeds a streamer: every final token once, when nothing before it is undecided.

    Raises:
        SpecError: There are several rows: a streamer shows one answer.
    """

    def __init__(self, streamer: Streamer, rows: int) -> None:
        if rows != 1:
            raise SpecError(f"a streamer shows one answer, got {rows} prompts")
        self._streamer = streamer
        self._sent = 0

    def put(self, step: Step) -> None:
        """Send what became final with a step, and the draft behind it."""
        final = int(step.final[0].long().cumprod(dim=0).sum())
        if final > self._sent:
            self._streamer.put(step.tokens[0, self._sent : final].cpu())
            self._sent = final
        if hasattr(self._streamer, "put_draft") and final < step.tokens.shape[1]:
            self._streamer.put_draft(step.tokens[0, final:].cpu())

    def end(self) -> None:
        """Send the end of the answer."""
        self._streamer.end()
