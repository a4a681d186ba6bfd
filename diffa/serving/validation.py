"""Bodies of requests: strict JSON, pydantic models, and one question about one recording."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffa.serving.audio import SentRecording, decode_base64
from diffa.serving.download import RemoteRecording, check_url
from diffa.serving.errors import bad_request, too_large
from diffa.serving.limits import Limits
from diffa.spec.validation import TRANSCRIBE

_UNSUPPORTED = ("tools", "functions", "logit_bias", "audio", "prediction")

M = TypeVar("M", bound=BaseModel)
Temperature = Annotated[float | None, Field(ge=0, le=2)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
NumTokens = Annotated[int | None, Field(ge=1)]


class StrictModel(BaseModel):
    """A JSON object whose values are not converted: "8" is no number."""

    model_config = ConfigDict(strict=True)


class TextPart(StrictModel):
    """Text of a message."""

    type: Literal["text"]
    text: str


class AudioData(StrictModel):
    """A recording's bytes, in base64 or as a data URI."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus", "webm", "m4a", "mp4"] | None = None


class InputAudioPart(StrictModel):
    """A recording within the request."""

    type: Literal["input_audio"]
    input_audio: AudioData


class AudioURL(StrictModel):
    """A data URI, or an http(s) URL at a host that the operator allows."""

    url: str


class AudioURLPart(StrictModel):
    """A recording by its URL."""

    type: Literal["audio_url"]
    audio_url: AudioURL


Part = Annotated[TextPart | InputAudioPart | AudioURLPart, Field(discriminator="type")]


class Message(StrictModel):
    """One turn of the conversation."""

    role: str
    content: str | Annotated[list[Part], Field(min_length=1)]


class StreamOptions(StrictModel):
    """OpenAI's options of a stream."""

    include_usage: bool | None = None


class ResponseFormat(StrictModel):
    """OpenAI's response format, of which text is supported."""

    type: Literal["text"]


class DiffaOptions(StrictModel):
    """Options that OpenAI's protocol does not have."""

    model_config = ConfigDict(strict=True, extra="forbid")

    sampler: str | dict[str, Any] | None = Field(
        default=None, description="A sampler preset by name, or options of the sampler."
    )
    drafts: bool | None = Field(
        default=None, description="Stream the whole canvas after every step."
    )
    deadline: float | None = Field(
        default=None, ge=0.001, description="Seconds until the answer must be finished."
    )


class ChatRequest(StrictModel):
    """The body of ``POST /v1/chat/completions``; unknown fields are ignored, as OpenAI does."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: NumTokens = None
    max_completion_tokens: NumTokens = None
    temperature: Temperature = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=8, description="Answers, of seeds of their own.")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    logprobs: bool | None = Field(
        default=None, description="Log-probability of each token when it was written."
    )
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Likeliest tokens at each place, with `logprobs`."
    )
    response_format: ResponseFormat | None = None
    diffa: DiffaOptions = DiffaOptions()


class TranscriptionRequest(BaseModel):
    """The form of ``POST /v1/audio/transcriptions``, without its ``file``."""

    model: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "verbose_json"] = "json"
    stream: bool = False
    temperature: Temperature = None


class Query(NamedTuple):
    """A validated request: the question, the recording's bytes, and how to answer.

    Attributes:
        question: text of the user's message.
        recording: an audio file, where to download them, or None.
        system: text of the system messages, or None for the spec's.
        max_tokens: None for the spec's.
        temperature: None for the sampler's.
        seed: of the sampler's draws.
        stream: whether the answer is streamed.
        include_usage: whether a stream ends with the numbers of tokens.
        drafts: whether a stream carries the canvas of every step.
        sampler: a sampler preset's name, or options. None: those of ``model``.
        deadline: seconds, or None for the server's.
        model: the name in the request, ``NAME`` or ``NAME:PRESET``; None for the server's.
        stops: texts before which the answer ends.
        num_answers: answers, each with a seed of its own.
        logprobs: whether the answer carries its tokens' log-probabilities.
        top_logprobs: likeliest tokens at each place to add to them.
    """

    question: str
    recording: SentRecording | RemoteRecording | None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    stream: bool = False
    include_usage: bool = False
    drafts: bool = False
    sampler: str | dict[str, Any] | None = None
    deadline: float | None = None
    model: str | None = None
    stops: tuple[str, ...] = ()
    num_answers: int = 1
    logprobs: bool = False
    top_logprobs: int = 0


def parse_json_object(body: bytes, limits: Limits) -> dict[str, Any]:
    """Return a JSON object; NaN, too deep nesting and too many digits are a RequestError (400).

    Parsing holds Python's global lock. A large string takes little time, but many values would
    stop all other threads: recordings have no commas, and texts are bounded.
    """
    if body.count(b",") > 4 * limits.max_text_chars:
        raise too_large("the body holds too many values")

    def refuse_constant(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, got {type(value).__name__}")
    return value


def validate_chat_request(
    fields: Mapping[str, Any], limits: Limits, allowed_hosts: Sequence[str]
) -> Query:
    """Validate the body of ``/v1/chat/completions`` and decode its base64.

    Raises:
        RequestError: a field is wrong (400), or beyond the server's limits (400, 413).
    """
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise bad_request(f"{name} is not supported", name, "unsupported")
    body = _validate(ChatRequest, fields)
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is not None and max_tokens > limits.max_tokens:
        raise bad_request(f"max_tokens is at most {limits.max_tokens}", "max_tokens", "too_large")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs", "top_logprobs")
    deadline = body.diffa.deadline
    if deadline is not None and deadline > limits.deadline:
        raise bad_request(f"the deadline is at most {limits.deadline:g} s", "diffa.deadline")
    system, question, recording = _read_messages(body.messages, limits, allowed_hosts)
    return Query(
        question,
        recording,
        system,
        max_tokens=max_tokens,
        temperature=body.temperature,
        seed=body.seed or 0,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        drafts=bool(body.diffa.drafts),
        sampler=body.diffa.sampler,
        deadline=deadline,
        model=body.model,
        stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        num_answers=body.n or 1,
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
    )


def validate_transcription_request(
    fields: Mapping[str, str], recording: bytes, limits: Limits
) -> tuple[Query, str]:
    """Validate the form of ``/v1/audio/transcriptions``; return it with its response format.

    ``prompt`` is context in OpenAI's protocol (names, the segment before), never the instruction.
    The models here have not learned to read context: it is checked, and changes nothing.
    """
    form = _validate(TranscriptionRequest, fields)
    if form.prompt:
        _check_text(form.prompt, "prompt", limits)
    query = Query(
        TRANSCRIBE,
        SentRecording(recording, "file"),
        temperature=form.temperature,
        stream=form.stream,
        model=form.model,
    )
    return query, form.response_format


def _validate(model: type[M], fields: Mapping[str, Any]) -> M:
    """Return the fields as a model; the error names the innermost field that is wrong."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        # A union reports an error for every member: the deepest is of the member that was meant.
        faults = [(_field_path(fault["loc"], fields), fault["msg"]) for fault in error.errors()]
        path, message = max(faults, key=lambda fault: len(fault[0]))
        param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:]
        raise bad_request(f"{param}: {message}"[:300], param) from error


def _field_path(location: Sequence[int | str], fields: Any) -> list[int | str]:
    """Return pydantic's location without the names of union members, which no client knows."""
    path: list[int | str] = []
    for depth, key in enumerate(location, start=1):
        inside = isinstance(fields, dict) and key in fields
        if inside or (isinstance(fields, list) and isinstance(key, int)):
            path.append(key)
            fields = fields[key]
        elif depth == len(location) and isinstance(fields, dict):
            path.append(key)  # a missing field
    return path


def _read_messages(
    messages: Sequence[Message], limits: Limits, allowed_hosts: Sequence[str]
) -> tuple[str | None, str, SentRecording | RemoteRecording | None]:
    """Return system prompt, question and recording: system messages, then one of the user."""
    system: list[str] = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        text, recording = _read_content(message.content, f"{param}.content", limits, allowed_hosts)
        if message.role in ("system", "developer"):
            if recording is not None:
                raise bad_request(f"{param}: a {message.role} message holds text alone", param)
            system.append(text)
        elif message.role != "user":
            roles = f"system, developer or user, got {message.role!r}"[:200]
            raise bad_request(f"{param}.role must be {roles}", param)
        elif index + 1 < len(messages):
            raise bad_request(
                f"{param}: one question is answered at a time: the user's message must be the "
                "last, and the only one",
                "messages",
            )
        else:
            prompt = _check_text("\n".join(system), "messages", limits) if system else None
            return prompt, _check_text(text, param, limits), recording
    raise bad_request("messages has no user message", "messages")


def _read_content(
    content: str | Sequence[TextPart | InputAudioPart | AudioURLPart],
    param: str,
    limits: Limits,
    allowed_hosts: Sequence[str],
) -> tuple[str, SentRecording | RemoteRecording | None]:
    """Return the text and the recording of a message."""
    if isinstance(content, str):
        return content, None
    texts: list[str] = []
    recording: SentRecording | RemoteRecording | None = None
    for index, part in enumerate(content):
        place = f"{param}[{index}]"
        if isinstance(part, TextPart):
            texts.append(part.text)
            continue
        if recording is not None:
            raise bad_request(f"{place}: a question is about one recording; join them", place)
        if isinstance(part, InputAudioPart):
            recording = decode_base64(part.input_audio.data, f"{place}.input_audio.data", limits)
            continue
        url, place = part.audio_url.url, f"{place}.audio_url.url"
        if url[:5].lower() == "data:":
            recording = decode_base64(url, place, limits)
        else:
            recording = check_url(url, allowed_hosts, place)
    return "\n".join(texts), recording


def _check_text(text: str, param: str, limits: Limits) -> str:
    """Return text that can be tokenised: valid Unicode, within the limit on length."""
    if len(text) > limits.max_text_chars:
        raise too_large(f"{param} has more than {limits.max_text_chars} characters", param)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad_request(f"{param} is not valid Unicode: {error.reason}", param) from error
    return text
