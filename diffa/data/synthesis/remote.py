"""A writer that asks a chat model over HTTP, many conversations at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from diffa.data.samples import DataError
from diffa.data.synthesis.writers import Conversation, Reply
from diffa.errors import SpecError
from diffa.llm.client import ChatClient, ChatError, RequestRefused


class EndpointWriter:
    """A writer that asks an endpoint.

    Args:
        endpoint: what answers.
        sampling: sent along: ``temperature``, ``top_p``, ``max_tokens``, ``seed`` ...
        workers: requests at once.

    Raises:
        SpecError: no workers.
    """

    def __init__(
        self, endpoint: ChatClient, *, sampling: Mapping[str, Any] | None = None, workers: int = 8
    ) -> None:
        if workers < 1:
            raise SpecError(f"workers must be at least 1, got {workers}")
        self.endpoint, self.workers = endpoint, workers
        self.name, self.settings = endpoint.model, dict(sampling or {})

    def write(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """Yield replies as they come; raises DataError once the endpoint as a whole fails.

        What other requests had answered by then is yielded first.
        """
        if not conversations:
            return
        cancel = threading.Event()
        failure: DataError | None = None
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {
                pool.submit(self._ask, one, cancel): i for i, one in enumerate(conversations)
            }
            try:
                for future in as_completed(futures):
                    try:
                        reply = future.result()
                    except DataError as error:
                        failure = failure or error
                        cancel.set()
                    else:
                        if reply is not None:
                            yield futures[future], reply
            finally:  # the caller may leave early: what has not begun need not
                cancel.set()
        if failure:
            raise failure

    def _ask(self, turns: Conversation, cancel: threading.Event) -> Reply | None:
        """Return one conversation's reply; None once the endpoint has been given up."""
        try:
            choices = self.endpoint.complete(turns, self.settings, cancel)
        except RequestRefused as error:
            if error.fatal:
                raise DataError(str(error)) from error
            return Reply(fault=error.reason)
        except ChatError as error:
            raise DataError(
                f"{error} Replies so far are kept where a cache was given: run the same again to "
                "go on"
            ) from error
        if not choices:
            return None
        text, reason = choices[0]
        if not text:
            return Reply(fault=f"the model said nothing ({reason})")
        if reason == "length":
            return Reply(fault="the reply was cut off: raise max_tokens")
        return Reply(text)
