"""The FastAPI application: OpenAI's routes, health and metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from diffa.serving import openapi, responses
from diffa.serving.errors import RequestError, bad_request, error_body
from diffa.serving.middleware import RequestLimits
from diffa.serving.pools import Deadline
from diffa.serving.responses import ChatStream, StreamFormat, TranscriptStream
from diffa.serving.service import EventStream, PreparedRequest, Service
from diffa.serving.validation import (
    Query,
    parse_json_object,
    validate_chat_request,
    validate_transcription_request,
)

_CLIENT_CLOSED_REQUEST = 499
_log = logging.getLogger("diffa.serving")


def create_app(service: Service) -> FastAPI:
    """Return the application that serves a model; shutting it down closes the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="diffa", lifespan=lifespan, docs_url=None, redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    app.add_middleware(RequestLimits, service=service)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_exception)
    if service.allowed_origins:  # the outermost layer: refusals carry its headers too
        app.add_middleware(
            CORSMiddleware, allow_origins=service.allowed_origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["Retry-After"],
        )  # fmt: skip
    routes = Routes(service)
    app.post("/v1/chat/completions")(routes.chat)
    app.post("/v1/audio/transcriptions")(routes.transcribe)
    app.get("/v1/models")(routes.list_models)
    app.get("/v1/models/{name:path}")(routes.get_model)
    app.get("/health")(routes.health)
    app.get("/metrics")(routes.metrics)
    openapi.describe(app)
    return app


class Routes:
    """Handlers of the routes.

    Args:
        service: answers the requests.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        """Answer a question about a recording."""
        service = self._service
        service.check_available()
        body = await request.body()

        def parse() -> Query:
            fields = parse_json_object(body, service.limits)
            return validate_chat_request(fields, service.limits, service.allowed_hosts)

        deadline = self._deadline(request)
        query = await service.parsers.run(parse, deadline)
        prepared = await service.prepare(query, deadline)
        name = query.model or service.name
        if query.stream:
            style = ChatStream(name, include_usage=query.include_usage)
            each = responses.repeat_request(prepared, query.num_answers)
            return await self._stream(request, each, style, drafts=query.drafts)
        count, gone = query.num_answers, _disconnect(request)
        answers = await responses.wait_for_answers(service, prepared, count, gone)
        if answers is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return JSONResponse(responses.chat_completion(name, answers))

    async def transcribe(self, request: Request) -> Response:
        """Transcribe a recording."""
        service = self._service
        service.check_available()
        media_type = request.headers.get("content-type", "")
        if not media_type.lower().startswith("multipart/form-data"):
            raise bad_request("the body must be multipart/form-data")
        async with request.form(max_files=1, max_fields=32, max_part_size=2**20) as form:
            fields = {key: value for key, value in form.multi_items() if isinstance(value, str)}
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise bad_request("file: a recording is needed", "file")
            recording = await file.read()
        query, style = validate_transcription_request(fields, recording, service.limits)
        prepared = await service.prepare(query, self._deadline(request))
        if query.stream:
            return await self._stream(request, [prepared], TranscriptStream(), drafts=False)
        answers = await responses.wait_for_answers(service, prepared, 1, _disconnect(request))
        if answers is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        answer = answers[0]
        if style == "text":
            return PlainTextResponse(answer.text + "\n")
        more: dict[str, Any] = {}
        if style == "verbose_json":
            duration = round(prepared.audio_seconds, 3)
            more = {"task": "transcribe", "language": "", "duration": duration}
            more |= {"segments": [], "diffa": answer.diffa}
        return JSONResponse({**more, "text": answer.text})

    def _deadline(self, request: Request) -> Deadline:
        return Deadline(self._service.limits.deadline, request.scope["diffa.arrived"])

    async def _stream(
        self,
        request: Request,
        each: Sequence[PreparedRequest],
        style: StreamFormat,
        *,
        drafts: bool,
    ) -> Response:
        """Return the events of a request's answers, once the first has started: until then the
        request may get a status."""
        service = self._service
        streams = [EventStream(service, prepared) for prepared in each]
        with ExitStack() as submitted:
            for stream in streams:
                submitted.enter_context(stream)
            if await responses.next_event(streams[0], _disconnect(request)) is None:
                return Response(status_code=_CLIENT_CLOSED_REQUEST)
            events = responses.stream_answers(service, streams, style, drafts=drafts)
            timeout = each[0].deadline.seconds_left + service.limits.body_timeout
            return EventStreamResponse(events, submitted.pop_all(), timeout)

    async def list_models(self) -> Response:
        """List the model, and its sampler presets as models of their own."""
        models = [self._describe_model(name) for name in self._service.model_names]
        return JSONResponse({"object": "list", "data": models})

    async def get_model(self, name: str) -> Response:
        """Describe one model."""
        self._service.preset_of(name)
        return JSONResponse(self._describe_model(name))

    def _describe_model(self, name: str) -> dict[str, Any]:
        created = self._service.created
        return {"id": name, "object": "model", "created": created, "owned_by": "diffa"}

    async def health(self) -> Response:
        """Return 200 and how busy the engine is, or 503 while shutting down."""
        service = self._service
        healthy = service.engine.alive and not service.draining
        state = "ok" if healthy else "failed" if service.engine.failed else "closing"
        status = {"status": state, **service.engine.load()._asdict()}
        return JSONResponse(status, status_code=200 if healthy else 503)

    async def metrics(self) -> Response:
        """Return the metrics for Prometheus."""
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self._service.metrics.render(), media_type=media_type)


class EventStreamResponse(StreamingResponse):  # type: ignore[misc]  # optional: mypy skips it
    """Server-sent events of a request's answers, which end with the response.

    That is also so if the client disconnects before the first event, when the iterator never
    starts, or does not read, when it would wait for ever.
    """

    def __init__(self, events: AsyncIterator[str], streams: ExitStack, timeout: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._streams, self._timeout = streams, timeout

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            async with asyncio.timeout(self._timeout):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _log.warning("a client did not read its answer")
        finally:
            self._streams.close()


async def _disconnect(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_request_error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _on_http_exception(request: Request, error: Any) -> Response:
    body = error_body(error.status_code, str(error.detail))
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _on_disconnect(request: Request, error: Any) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _on_exception(request: Request, error: Exception) -> Response:
    _log.error("%s %s", request.method, request.url.path, exc_info=error)
    return JSONResponse(error_body(500, f"{type(error).__name__} while answering"), 500)
