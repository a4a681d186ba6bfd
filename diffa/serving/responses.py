"""Responses in OpenAI's format: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
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
        self.logprobs: Json | None = None
        if prepared.logprobs:
            count = prepared.request.top_logprobs
            self.logprobs = format_logprobs(event, service.chat, vocab, count)
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


def repeat_request(prepared: PreparedRequest, count: int) -> list[PreparedRequest]:
    """Return a request ``count`` times: first with its own seed, then with seeds drawn from it."""
    request, draws = prepared.request, random.Random(prepared.request.seed)
    seeds = [request.seed, *(draws.getrandbits(62) for _ in range(count - 1))]
    return [prepared._replace(request=request._replace(seed=seed)) for seed in seeds]


async def wait_for_answers(
    service: Service, prepared: PreparedRequest, count: int, disconnect: Awaitable[None]
) -> list[FinishedAnswer] | None:
    """Return answers to a request, or None if the client disconnects first.

    Raises:
        RequestError: the request fails.
    """
    disconnected, each = asyncio.ensure_future(disconnect), repeat_request(prepared, count)
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


def chat_completion(model_name: str, answers: Sequence[FinishedAnswer]) -> Json:
    """Return a ``chat.completion``; numbers that OpenAI's lacks are under ``diffa``."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": answer.logprobs,
            "finish_reason": answer.finish_reason,
        }
        for index, answer in enumerate(answers)
    ]
    return {
        **_completion_fields(model_name, "chat.completion"),
        "choices": choices,
        "usage": _sum_usage(answers),
        "diffa": max((answer.diffa for answer in answers), key=lambda numbers: numbers["seconds"]),
    }


def _sum_usage(answers: Sequence[FinishedAnswer]) -> dict[str, int]:
    """Return the tokens of all answers to one prompt, which counts once."""
    usage = dict(answers[0].usage)
    usage["completion_tokens"] = sum(answer.usage["completion_tokens"] for answer in answers)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return usage


def _completion_fields(model_name: str, kind: str) -> Json:
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model_name}


class StreamFormat(Protocol):
    """Turns the progress of answers into the events of an endpoint; each answer has an index."""

    def start(self, index: int) -> list[Json]:
        """Return the events before any text."""
        ...

    def text(self, index: int, piece: str) -> list[Json]:
        """Return the events of new text."""
        ...

    def draft(self, index: int, draft: Json) -> list[Json]:
        """Return the events of a step's canvas."""
        ...

    def end(self, index: int, answer: FinishedAnswer) -> list[Json]:
        """Return the last events of an answer."""
        ...

    def close(self, answers: Sequence[FinishedAnswer]) -> list[Json]:
        """Return the events after all answers."""
        ...


class ChatStream:
    """Events of ``/v1/chat/completions``: chunks with deltas; drafts under ``diffa``."""

    def __init__(self, model_name: str, *, include_usage: bool) -> None:
        self._fields = _completion_fields(model_name, "chat.completion.chunk")
        self._include_usage = include_usage

    def _chunk(
        self,
        index: int,
        delta: Json,
        finish_reason: str | None = None,
        logprobs: Json | None = None,
        **more: Any,
    ) -> Json:
        choice = {
            "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason,
        }  # fmt: skip
        return {**self._fields, "choices": [choice], **more}

    def start(self, index: int) -> list[Json]:
        """Return a chunk with the role."""
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def text(self, index: int, piece: str) -> list[Json]:
        """Return a chunk with new text."""
        return [self._chunk(index, {"content": piece})]

    def draft(self, index: int, draft: Json) -> list[Json]:
        """Return a chunk without text, which other clients ignore."""
        return [self._chunk(index, {}, diffa={"draft": draft})]

    def end(self, index: int, answer: FinishedAnswer) -> list[Json]:
        """Return the chunk with the reason."""
        return [self._chunk(index, {}, answer.finish_reason, answer.logprobs, diffa=answer.diffa)]

    def close(self, answers: Sequence[FinishedAnswer]) -> list[Json]:
        """Return a chunk with the usage if the request asks for it."""
        usage = {**self._fields, "choices": [], "usage": _sum_usage(answers)}
        return [usage] if self._include_usage else []


class TranscriptStream:
    """Events of ``/v1/audio/transcriptions``: text deltas, then the whole text."""

    def start(self, index: int) -> list[Json]:
        """Return nothing."""
        return []

    def text(self, index: int, piece: str) -> list[Json]:
        """Return a delta."""
        return [{"type": "transcript.text.delta", "delta": piece}]

    def draft(self, index: int, draft: Json) -> list[Json]:
        """Return nothing."""
        return []

    def end(self, index: int, answer: FinishedAnswer) -> list[Json]:
        """Return the whole text."""
        return [{"type": "transcript.text.done", "text": answer.text}]

    def close(self, answers: Sequence[FinishedAnswer]) -> list[Json]:
        """Return nothing."""
        return []


async def stream_answers(
    service: Service, streams: Sequence[EventStream], style: StreamFormat, *, drafts: bool
) -> AsyncIterator[str]:
    """Yield the server-sent events of started requests, ending in ``[DONE]``.

    The requests are cancelled when the iterator is closed early, as it is at a disconnect.
    """
    answers: list[FinishedAnswer] = []
    progress = [
        _answer_events(service, stream, style, index, answers, drafts=drafts)
        for index, stream in enumerate(streams)
    ]
    try:
        async for body in _merge(progress):
            yield sse(body)
        for body in style.close(answers):
            yield sse(body)
    except RequestError as error:  # the status is sent already: the error becomes an event
        yield sse(error.body())
    except Exception as error:
        yield sse(error_body(500, f"{type(error).__name__} while answering"))
        raise
    finally:
        for stream in streams:
            stream.close()
    yield "data: [DONE]\n\n"


async def _merge(iterators: Sequence[AsyncIterator[Json]]) -> AsyncIterator[Json]:
    """Yield the values of several iterators as they come, those of each in order."""
    waiting = {asyncio.ensure_future(anext(one)): one for one in iterators}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                iterator = waiting.pop(task)
                with suppress(StopAsyncIteration):
                    yield task.result()
                    waiting[asyncio.ensure_future(anext(iterator))] = iterator
    finally:
        for task in waiting:
            task.cancel()


async def _answer_events(
    service: Service,
    stream: EventStream,
    style: StreamFormat,
    index: int,
    answers: list[FinishedAnswer],
    *,
    drafts: bool,
) -> AsyncIterator[Json]:
    """Yield the events of one answer, and add it to ``answers``."""
    for body in style.start(index):
        yield body
    text, has_text = TextStream(service.chat, stream.prepared.stops), False
    vocab = service.model.backbone.vocab
    event: Event | None = None
    while not isinstance(event, FinishedEvent):
        event = await stream.next()
        piece = ""
        if isinstance(event, StepEvent):
            if drafts:
                for body in style.draft(index, format_draft(event, service.chat, vocab)):
                    yield body
            elif stream.has_event():
                continue  # a slow client skips steps: a later one has the same text and more
            piece = text.push(event)
        elif isinstance(event, FinishedEvent):
            piece = text.finish(event.tokens)
        if piece and not has_text:
            has_text = True
            service.metrics.time_to_first_text.observe(stream.seconds)
        for body in style.text(index, piece) if piece else ():
            yield body
    answers.append(FinishedAnswer(service, stream.prepared, event, stream.seconds))
    for body in style.end(index, answers[-1]):
        yield body


def sse(value: Json) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
