"""Writers of text for data: chat models with one interface, and a cache of their replies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from diffa.data.samples import DataError
from diffa.llm.cache import ReplyCache

Conversation = Sequence[Mapping[str, str]]
"""Turns with ``role`` and ``content``, the last of them the user's."""


class Reply(NamedTuple):
    """A model's text, or why there is none for this conversation."""

    text: str = ""
    fault: str = ""


class Writer(Protocol):
    """A chat model.

    Attributes:
        name: of the model, as data names its source.
    """

    name: str

    @property
    def settings(self) -> Mapping[str, Any]:
        """Whatever else decides the replies, such as the sampling parameters."""
        ...

    def write(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """Yield every conversation's index and reply, in any order, as they come."""
        ...


def conversation(question: str, system: str = "") -> list[dict[str, str]]:
    """Make the turns of one question."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": question}]


class CachedWriter:
    """A writer whose replies are cached in a folder, so that a stopped run repeats no request.

    A reply is found again by the model's name, its settings and the whole conversation. Faults
    are not kept. Several processes may share the folder.
    """

    def __init__(self, writer: Writer, folder: str | os.PathLike[str]) -> None:
        self.writer, self._replies = writer, ReplyCache(folder)
        self.name, self.settings, self.folder = writer.name, writer.settings, self._replies.folder
        self.num_cached = 0

    def write(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies that are kept, then those of the model, which are kept at once."""
        missing: list[int] = []
        for index, turns in enumerate(conversations):
            text = (self._replies.get(self._request(turns)) or {}).get("text")
            if text is None:
                missing.append(index)
            else:
                self.num_cached += 1
                yield index, Reply(text)
        for place, reply in self.writer.write([conversations[index] for index in missing]):
            if not reply.fault:
                self._keep(conversations[missing[place]], reply.text)
            yield missing[place], reply

    def _request(self, turns: Conversation) -> list[Any]:
        return [self.name, self.settings, [dict(turn) for turn in turns]]

    def _keep(self, turns: Conversation, text: str) -> None:
        whole = {"model": self.name, "messages": [dict(turn) for turn in turns], "text": text}
        try:
            self._replies.put(self._request(turns), whole)
        except OSError as error:
            raise DataError(f"a reply cannot be kept in {self.folder}: {error}") from error


def write_all(writer: Writer, conversations: Sequence[Conversation]) -> list[Reply]:
    """Return every conversation's reply, in order."""
    replies = dict(writer.write(conversations))
    return [replies[index] for index in range(len(conversations))]
