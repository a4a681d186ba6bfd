"""What ``/openapi.json`` says: types of bodies, answers, streams and errors."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field

from diffa.serving.errors import ErrorResponse
from diffa.serving.validation import ChatRequest, TranscriptionRequest

_TEMPLATE = "#/components/schemas/{model}"
_STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 431, 500, 503, 504)


class LikelyToken(BaseModel):
    """A token, the logarithm of its probability, and its bytes in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LikelyToken):
    """A token of an answer when it was written."""

    top_logprobs: list[LikelyToken] = Field(description="The likeliest tokens at its place.")


class Logprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class Usage(BaseModel):
    """Numbers of tokens; audio embeddings count as tokens of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class DecodingNumbers(BaseModel):
    """What OpenAI's protocol does not have: how an answer was decoded."""

    num_forwards: int
    tokens_per_forward: float
    seconds: float
    audio_seconds: float


class AnswerMessage(BaseModel):
    """The text of an answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Answers to a question."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    diffa: DecodingNumbers


class Delta(BaseModel):
    """New text of an answer; the first one has the role, too."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """Progress of one of the answers."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Draft(BaseModel):
    """The canvas after a forward pass; a mask's token is null."""

    step: int
    tokens: list[str | None]
    ids: list[int]
    final: list[bool]
    confidence: list[float]


class DraftChunk(BaseModel):
    """A draft within a chunk."""

    draft: Draft


class ChatCompletionChunk(BaseModel):
    """An event of a stream, which ends in the event ``[DONE]``."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    diffa: DecodingNumbers | DraftChunk | None = None


class Transcription(BaseModel):
    """A recording as text; all but the text is for ``verbose_json``."""

    text: str
    task: Literal["transcribe"] | None = None
    language: str | None = None
    duration: float | None = None
    segments: list[dict[str, Any]] | None = None
    diffa: DecodingNumbers | None = None


class TranscriptEvent(BaseModel):
    """An event of a streamed transcription: new text, or the whole text at the end."""

    type: Literal["transcript.text.delta", "transcript.text.done"]
    delta: str | None = None
    text: str | None = None


class ModelDescription(BaseModel):
    """The model, or one of its sampler presets."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The model and its sampler presets."""

    object: Literal["list"]
    data: list[ModelDescription]


class Health(BaseModel):
    """Whether the server answers, and how busy it is."""

    status: Literal["ok", "closing", "failed"]
    num_waiting: int
    num_running: int
    num_forwards: int
    num_rows: int


_BODIES: dict[str, tuple[str, type[BaseModel]]] = {
    "/v1/chat/completions": ("application/json", ChatRequest),
    "/v1/audio/transcriptions": ("multipart/form-data", TranscriptionRequest),
}
_ANSWERS: dict[str, dict[str, type[BaseModel] | None]] = {
    "/v1/chat/completions": {
        "application/json": ChatCompletion,
        "text/event-stream": ChatCompletionChunk,
    },
    "/v1/audio/transcriptions": {
        "application/json": Transcription,
        "text/plain": None,
        "text/event-stream": TranscriptEvent,
    },
    "/v1/models": {"application/json": ModelList},
    "/v1/models/{name}": {"application/json": ModelDescription},
    "/health": {"application/json": Health},
    "/metrics": {"text/plain": None},
}


def describe(app: FastAPI) -> None:
    """Add the types to the document of an application with all its routes.

    FastAPI would parse declared bodies itself, in the event loop and without a bound on nesting:
    the routes parse them, and the description is written here.
    """
    document = app.openapi()  # FastAPI keeps it
    schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, of the 422 left out below
        schemas.pop(name, None)
    error = _content("application/json", ErrorResponse, schemas)
    for path, answers in _ANSWERS.items():
        for operation in document["paths"][path].values():
            operation["responses"].pop("422", None)
            content: dict[str, Any] = {}
            for media_type, model in answers.items():
                content |= _content(media_type, model, schemas)
            operation["responses"]["200"]["content"] = content
            if path == "/health":
                closing = {"description": "The server closes, or has failed.", "content": content}
                operation["responses"]["503"] = closing
            if not path.startswith("/v1/"):
                continue
            refused = {"description": "The request is refused, or fails.", "content": error}
            operation["responses"] |= {str(status): refused for status in _STATUSES}
            if path in _BODIES:
                body = _content(*_BODIES[path], schemas)
                operation["requestBody"] = {"required": True, "content": body}
    form = schemas[TranscriptionRequest.__name__]
    form["properties"]["file"] = {"type": "string", "format": "binary"}
    form["required"] = ["file"]


def _content(
    media_type: str, model: type[BaseModel] | None, schemas: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of a media type, and add the schemas that it refers to."""
    if model is None:
        return {media_type: {"schema": {"type": "string"}}}
    schema = model.model_json_schema(ref_template=_TEMPLATE)
    schemas |= schema.pop("$defs", {})
    schemas[model.__name__] = schema
    return {media_type: {"schema": {"$ref": _TEMPLATE.format(model=model.__name__)}}}
