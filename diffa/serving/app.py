"""The routes of OpenAI's protocol, and those that operators ask."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from diffa.serving import responses as answers
from diffa.serving.errors import RequestError, bad_request, error_body
from diffa.serving.middleware import Gate
from diffa.serving.service import Prepared, Service, Session
from diffa.serving.validation import Asked, check_text, read_chat, read_json

TRANSCRIBE = "Please transcribe the audio to text."
FORMS = ("json", "text", "verbose_json")
_log = logging.getLogger("diffa.serving")


def create_app(service: Service) -> FastAPI:
    """The application that serves a model; closing it closes the service."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="diffa", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    routes = {
        ("POST", "/v1/chat/completions"): _chat,
        ("POST", "/v1/audio/transcriptions"): _transcribe,
        ("GET", "/v1/models"): _models,
        ("GET", "/v1/models/{name:path}"): _model,
        ("GET", "/health"): _health,
        ("GET", "/metrics"): _metrics,
    }
    for (method, path), route in routes.items():
        app.add_route(path, _bound(route, service), methods=[method])
    return app


def _bound(route: Any, service: Service) -> Any:
    async def answer(request: Request) -> Response:
        found: Response = await route(service, request)
        return found

    return answer


async def _chat(service: Service, request: Request) -> Response:
    """Answer a question about a recording."""
    service.check_open()
    body = await request.body()

    def read() -> tuple[Asked, str, Prepared]:
        fields = read_json(body)
        sampler_preset = service.sampler_preset(fields.get("model"))
        asked = read_chat(fields, service.limits, service.hosts)._replace(base=sampler_preset)
        name = fields.get("model") or service.name
        return asked, name, service.prepare(asked, watched=asked.stream)

    asked, name, prepared = await service.hand(read)
    if asked.stream:
        say = answers.chunks(name, usage=asked.usage)
        return await _streamed(service, request, prepared, say, drafts=asked.drafts)
    found = await answers.whole(service, prepared, _left(request))
    if found is None:
        return Response(status_code=499)
    return JSONResponse(answers.completion(service, name, found))


async def _transcribe(service: Service, request: Request) -> Response:
    """Write down what a recording says."""
    service.check_open()
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise bad_request("the body must be multipart/form-data")
    async with request.form(max_files=1, max_fields=32, max_part_size=2**20) as form:
        fields = {key: value for key, value in form.multi_items() if isinstance(value, str)}
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise bad_request("file: a recording is needed", "file")
        recording = await file.read()
    wanted = fields.get("response_format", "json")
    if wanted not in FORMS:
        raise bad_request(f"response_format must be one of {', '.join(FORMS)}", "response_format")
    stream = fields.get("stream", "false").lower() in ("true", "1")
    asked = Asked(
        check_text(fields.get("prompt") or TRANSCRIBE, "prompt", service.limits),
        recording,
        temperature=_number(fields.get("temperature")),
        base=service.sampler_preset(fields.get("model")),
    )
    prepared = await service.hand(partial(service.prepare, asked, watched=stream))
    if stream:
        return await _streamed(service, request, prepared, answers.transcripts, drafts=False)
    found = await answers.whole(service, prepared, _left(request))
    if found is None:
        return Response(status_code=499)
    if wanted == "text":
        return PlainTextResponse(found.text + "\n")
    more: dict[str, Any] = {}
    if wanted == "verbose_json":
        more = {"task": "transcribe", "language": "", "duration": round(prepared.seconds, 3)}
        more |= {"segments": [], "diffa": found.extra}
    return JSONResponse({**more, "text": found.text})


class Events(StreamingResponse):  # type: ignore[misc]  # an optional library: mypy skips it
    """Server-sent events of a session, which ends with them: also when the client goes away before
    the first, or does not read."""

    def __init__(self, events: AsyncIterator[str], session: Session, seconds: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._session, self._seconds = session, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _log.warning("a client did not read its answer")
        finally:
            self._session.leave()


async def _streamed(
    service: Service, request: Request, prepared: Prepared, say: answers.Wording, *, drafts: bool
) -> Response:
    """Events, once the request has left the queue: until then it can be refused by status."""
    session = Session(service, prepared).__enter__()
    try:
        if await answers.coming(session, _left(request)) is None:
            session.leave()
            return Response(status_code=499)
    except BaseException:
        session.leave()
        raise
    events = answers.pieces(service, session, prepared, say, drafts=drafts)
    return Events(events, session, prepared.deadline + service.limits.body_seconds)


async def _models(service: Service, request: Request) -> Response:
    """The model, and its sampler presets as models of their own."""
    names = [
        service.name,
        *(f"{service.name}:{sampler_preset}" for sampler_preset in service.sampler_presets),
    ]
    return JSONResponse({"object": "list", "data": [_card(service, name) for name in names]})


async def _model(service: Service, request: Request) -> Response:
    """One model."""
    service.sampler_preset(request.path_params["name"])
    return JSONResponse(_card(service, request.path_params["name"]))


def _card(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "diffa"}


async def _health(service: Service, request: Request) -> Response:
    """Whether requests are taken: 200, or 503 while shutting down."""
    well = service.engine.alive and not service.draining
    state = {"status": "ok" if well else "closing", **service.engine.load()._asdict()}
    return JSONResponse(state, status_code=200 if well else 503)


async def _metrics(service: Service, request: Request) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise bad_request("temperature must be a number", "temperature") from error


async def _refused(request: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _http(request: Request, error: Any) -> Response:
    body = error_body(error.status_code, str(error.detail))
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    _log.error("%s %s", request.method, request.url.path, exc_info=error)
    return JSONResponse(error_body(500, f"{type(error).__name__} while answering"), 500)
