"""Responses in OpenAI's format: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Protocol

from diffa.serving.errors import RequestError, error_body
from diffa.serving.requests import Event, FinishedEvent, StepEvent
from diffa.serving.service import EventStream, PreparedRequest, Service
from diffa.serving.streaming import (
    TextStream,
    count_tokens,
    cut_at_stop,
    format_draft,
    format_logprobs,
)

Json = dict[str, Any]


class FinishedAnswer:
    """A finished answer: its text, why it ended, and the numbers that responses carry."""

    def __init__(
        self, service: Service, prepared: PreparedRequest, event: FinishedEvent, seconds: float
    ) -> None:
        vocab = service.model.backbone.vocab
        text = service.chat.decode(event.tokens)
        self.text = cut_at_stop(text, prepared.stops)
        self.logprobs = format_logprobs(event, service.chat, vocab)
        num_tokens = count_tokens(event.tokens, vocab)
        ended = self.text != text or bool((event.tokens == vocab.eos).any())
        self.finish_reason = "stop" if ended else "length"
        num_prompt_tokens = len(prepared.request.prompt) + event.num_audio_embeds
        self.usage = {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
        }
        self.diffa = {
            "num_forwards": event.num_forwards,
            "tokens_per_forward": round(num_tokens / max(1, event.num_forwards), 3),
            "seconds": round(seconds, 4),
            "audio_seconds": round(prepared.audio_seconds, 3),
        }
        service.metrics.tokens.inc(num_tokens)


async def wait_for_answers(
    service: Service, prepared: PreparedRequest, count: int, disconnect: Awaitable[None]
) -> list[FinishedAnswer] | None:
    """Return answers to a request, or None if the client disconnects first.

    The first has the request's seed, the others have seeds drawn from it.

    Raises:
        RequestError: the request fails.
    """
    request, draws = prepared.request, random.Random(prepared.request.seed)
    seeds = [request.seed, *(draws.getrandbits(62) for _ in range(count - 1))]
    each = [prepared._replace(request=request._replace(seed=seed)) for seed in seeds]
    disconnected = asyncio.ensure_future(disconnect)
    tasks = [asyncio.ensure_future(_wait(service, one, disconnected)) for one in each]
    try:
        answers = [answer for answer in await asyncio.gather(*tasks) if answer is not None]
        return answers if len(answers) == count else None
    finally:
        for task in (disconnected, *tasks):
            task.cancel()


async def _wait(
    service: Service, prepared: PreparedRequest, disconnected: Awaitable[None]
) -> FinishedAnswer | None:
    with EventStream(service, prepared) as stream:
        while (event := await next_event(stream, disconnected)) is not None:
            if isinstance(event, FinishedEvent):
                return FinishedAnswer(service, prepared, event, stream.seconds)
    return None


async def next_event(stream: EventStream, disconnect: Awaitable[None]) -> Event | None:
    """Return the next event, or None if the client disconnects first."""
    disconnected = asyncio.ensure_future(disconnect)
    event = asyncio.ensure_future(stream.next())
    try:
        await asyncio.wait((event, disconnected), return_when=asyncio.FIRST_COMPLETED)
        return event.result() if event.done() else None
    finally:
        event.cancel()
        if disconnected is not disconnect:  # a future of the caller's is used again
            disconnected.cancel()


def chat_completion(model_name: str, answers: Sequence[FinishedAnswer], *, logprobs: bool) -> Json:
    """Return a ``chat.completion``; numbers that OpenAI's lacks are under ``diffa``."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": answer.logprobs if logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        for index, answer in enumerate(answers)
    ]
    usage = dict(answers[0].usage)
    usage["completion_tokens"] = sum(answer.usage["completion_tokens"] for answer in answers)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return {
        **_completion_fields(model_name, "chat.completion"),
        "choices": choices,
        "usage": usage,
        "diffa": max((answer.diffa for answer in answers), key=lambda numbers: numbers["seconds"]),
    }


def _completion_fields(model_name: str, kind: str) -> Json:
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model_name}


class StreamFormat(Protocol):
    """Turns the progress of an answer into the events of an endpoint."""

    def start(self) -> list[Json]:
        """Return the events before any text."""
        ...

    def text(self, piece: str) -> list[Json]:
        """Return the events of new text."""
        ...

    def draft(self, draft: Json) -> list[Json]:
        """Return the events of a step's canvas."""
        ...

    def end(self, answer: FinishedAnswer) -> list[Json]:
        """Return the last events."""
        ...


class ChatStream:
    """Events of ``/v1/chat/completions``: chunks with deltas; drafts under ``diffa``."""

    def __init__(self, model_name: str, *, include_usage: bool, logprobs: bool = False) -> None:
        self._fields = _completion_fields(model_name, "chat.completion.chunk")
        self._include_usage, self._logprobs = include_usage, logprobs

    def _chunk(
        self,
        delta: Json,
        finish_reason: str | None = None,
        logprobs: Json | None = None,
        **more: Any,
    ) -> Json:
        choice = {
            "index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason,
        }  # fmt: skip
        return {**self._fields, "choices": [choice], **more}

    def start(self) -> list[Json]:
        """Return a chunk with the role."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def text(self, piece: str) -> list[Json]:
        """Return a chunk with new text."""
        return [self._chunk({"content": piece})]

    def draft(self, draft: Json) -> list[Json]:
        """Return a chunk without text, which other clients ignore."""
        return [self._chunk({}, diffa={"draft": draft})]

    def end(self, answer: FinishedAnswer) -> list[Json]:
        """Return the chunk with the reason, and one with the usage if it is wanted."""
        logprobs = answer.logprobs if self._logprobs else None
        last = [self._chunk({}, answer.finish_reason, logprobs, diffa=answer.diffa)]
        usage = {**self._fields, "choices": [], "usage": answer.usage}
        return [*last, usage] if self._include_usage else last


class TranscriptStream:
    """Events of ``/v1/audio/transcriptions``: text deltas, then the whole text."""

    def start(self) -> list[Json]:
        """Return nothing."""
        return []

    def text(self, piece: str) -> list[Json]:
        """Return a delta."""
        return [{"type": "transcript.text.delta", "delta": piece}]

    def draft(self, draft: Json) -> list[Json]:
        """Return nothing."""
        return []

    def end(self, answer: FinishedAnswer) -> list[Json]:
        """Return the whole text."""
        return [{"type": "transcript.text.done", "text": answer.text}]


async def stream_answer(
    service: Service,
    stream: EventStream,
    prepared: PreparedRequest,
    style: StreamFormat,
    *,
    drafts: bool,
) -> AsyncIterator[str]:
    """Yield the server-sent events of a started request, ending in ``[DONE]``.

    The request is cancelled when the iterator is closed early, as it is at a disconnect.
    """
    try:
        for body in style.start():
            yield sse(body)
        async for body in _answer_events(service, stream, prepared, style, drafts=drafts):
            yield sse(body)
    except RequestError as error:  # the status is sent already: the error becomes an event
        yield sse(error.body())
    except Exception as error:
        yield sse(error_body(500, f"{type(error).__name__} while answering"))
        raise
    finally:
        stream.close()
    yield "data: [DONE]\n\n"


async def _answer_events(
    service: Service,
    stream: EventStream,
    prepared: PreparedRequest,
    style: StreamFormat,
    *,
    drafts: bool,
) -> AsyncIterator[Json]:
    text, has_text = TextStream(service.chat, prepared.stops), False
    vocab = service.model.backbone.vocab
    event: Event | None = None
    while not isinstance(event, FinishedEvent):
        event = await stream.next()
        piece = ""
        if isinstance(event, StepEvent):
            if drafts:
                for body in style.draft(format_draft(event, service.chat, vocab)):
                    yield body
            elif stream.has_event():
                continue  # a slow client skips steps: a later one has the same text and more
            piece = text.push(event)
        elif isinstance(event, FinishedEvent):
            piece = text.finish(event.tokens)
        if piece and not has_text:
            has_text = True
            service.metrics.time_to_first_text.observe(stream.seconds)
        for body in style.text(piece) if piece else ():
            yield body
    for body in style.end(FinishedAnswer(service, prepared, event, stream.seconds)):
        yield body


def sse(value: Json) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
