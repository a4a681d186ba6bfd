"""Answers in OpenAI's words: a completion at once, or pieces of it as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from diffa.serving.errors import RequestError, error_body
from diffa.serving.requests import Done, Event, Moment
from diffa.serving.service import Prepared, Service, Session
from diffa.serving.streaming import Teller, count, draft


class Answered:
    """A finished answer: its text, and the numbers that go with it."""

    def __init__(self, service: Service, prepared: Prepared, done: Done, seconds: float) -> None:
        vocab = service.model.backbone.vocab
        self.text = service.chat.decode(done.tokens)
        self.tokens = count(done.tokens, vocab)
        self.ended = bool((done.tokens == vocab.eos).any())
        self.usage = {
            "prompt_tokens": len(prepared.job.prompt) + done.heard,
            "completion_tokens": self.tokens,
            "total_tokens": len(prepared.job.prompt) + done.heard + self.tokens,
        }
        self.extra = {
            "num_forwards": done.num_forwards,
            "tokens_per_forward": round(self.tokens / max(1, done.num_forwards), 3),
            "seconds": round(seconds, 4),
            "audio_seconds": round(prepared.seconds, 3),
        }
        service.metrics.tokens.inc(self.tokens)

    @property
    def reason(self) -> str:
        """Why the answer ends: it was over, or ``max_tokens`` was."""
        return "stop" if self.ended else "length"


async def whole(service: Service, prepared: Prepared, gone: Awaitable[None]) -> Answered | None:
    """The answer; None where the client has gone before it was ready.

    Raises:
        Refusal: it cannot be given.
    """
    leaving = asyncio.ensure_future(gone)
    try:
        with Session(service, prepared) as session:
            while (event := await coming(session, leaving)) is not None:
                if isinstance(event, Done):
                    return Answered(service, prepared, event, session.seconds)
            return None
    finally:
        leaving.cancel()


async def coming(session: Session, gone: Awaitable[None]) -> Event | None:
    """The next event of a session, or None where its client has gone before it."""
    leaving = asyncio.ensure_future(gone)
    event = asyncio.ensure_future(session.next())
    try:
        await asyncio.wait((event, leaving), return_when=asyncio.FIRST_COMPLETED)
        return event.result() if event.done() else None
    finally:
        event.cancel()
        if leaving is not gone:
            leaving.cancel()


def completion(service: Service, model: str, answered: Answered) -> dict[str, Any]:
    """A ``chat.completion``; what OpenAI's has no place for is under ``diffa``."""
    message = {"role": "assistant", "content": answered.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answered.reason}
    return {
        **head(model, "chat.completion"),
        "choices": [choice],
        "usage": answered.usage,
        "diffa": answered.extra,
    }


def head(model: str, kind: str) -> dict[str, Any]:
    """What completions and their chunks begin with."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


Wording = Callable[[str, Any], list[dict[str, Any]]]
"""Turns what happened (``begin``, ``text``, ``draft``, ``end``) into the events that say so."""


def chunks(model: str, *, usage: bool) -> Wording:
    """The wording of ``/v1/chat/completions``: chunks with deltas, drafts under ``diffa``."""
    base = head(model, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**base, "choices": [choice], **more}

    def say(what: str, value: Any) -> list[dict[str, Any]]:
        if what == "begin":
            return [chunk({"role": "assistant", "content": ""})]
        if what == "text":
            return [chunk({"content": value})]
        if what == "draft":
            return [chunk({}, diffa={"draft": value})]
        last = [chunk({}, value.reason, diffa=value.extra)]
        return [*last, {**base, "choices": [], "usage": value.usage}] if usage else last

    return say


def transcripts(what: str, value: Any) -> list[dict[str, Any]]:
    """The wording of ``/v1/audio/transcriptions``: text deltas, then the whole text."""
    if what == "text":
        return [{"type": "transcript.text.delta", "delta": value}]
    if what == "end":
        return [{"type": "transcript.text.done", "text": value.text}]
    return []


async def pieces(
    service: Service, session: Session, prepared: Prepared, say: Wording, *, drafts: bool
) -> AsyncIterator[str]:
    """Server-sent events of a session that has begun, ending in ``[DONE]``; it is left behind
    when the client goes away."""
    with_draft, teller, told = drafts, Teller(service.chat), False
    vocab = service.model.backbone.vocab
    try:
        for said in say("begin", None):
            yield sse(said)
        while True:
            event = await session.next()
            found: list[tuple[str, Any]] = []
            if isinstance(event, Moment):
                if with_draft:
                    found.append(("draft", draft(event, service.chat, vocab)))
                elif session.waiting():
                    continue  # a later moment tells all that this one would
                found.append(("text", teller.more(event)))
            elif isinstance(event, Done):
                found.append(("text", teller.rest(event.tokens)))
                found.append(("end", Answered(service, prepared, event, session.seconds)))
            for what, value in found:
                if what == "text" and not value:
                    continue
                if what == "text" and not told:
                    told = True
                    service.metrics.first.observe(session.seconds)
                for said in say(what, value):
                    yield sse(said)
            if isinstance(event, Done):
                break
    except RequestError as refused:
        yield sse(refused.body())
    except Exception as error:
        yield sse(error_body(500, f"{type(error).__name__} while answering"))
        raise
    finally:
        session.leave()
    yield "data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
