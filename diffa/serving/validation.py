"""What a request asks for: JSON read strictly, chat messages, audio parts, numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffa.audio import FORMATS
from diffa.serving.audio import decode_base64
from diffa.serving.download import download_recording
from diffa.serving.errors import bad_request, too_large
from diffa.serving.limits import Limits
from diffa.serving.sampler_options import number

MINE = "diffa"
"""The key of the options that OpenAI's protocol does not have."""
_UNSUPPORTED = ("tools", "functions", "logit_bias", "audio", "prediction", "stop")


class Asked(NamedTuple):
    """A request: question, recording's bytes, and how to answer.

    ``drafts`` asks for the draft of every step while streaming; ``sampler`` is a sampler
    preset's name or options. None: what the model's spec says, or its sampler preset ``base``.
    """

    question: str
    recording: bytes | None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    stream: bool = False
    usage: bool = False
    drafts: bool = False
    sampler: Any = None
    deadline: float | None = None
    base: str | None = None


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object, strictly: no NaN, no endless nesting or digits; raises Refusal."""

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    try:
        found = json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise bad_request(f"the body must be a JSON object, got {type(found).__name__}")
    return found


def read_chat(body: Mapping[str, Any], limits: Limits, hosts: Sequence[str]) -> Asked:
    """Read the body of ``/v1/chat/completions``; raises Refusal."""
    for key in _UNSUPPORTED:
        if body.get(key):
            raise bad_request(f"{key} is not supported", key, "unsupported")
    for key, plain in {"n": 1, "logprobs": False, "top_logprobs": 0}.items():
        if body.get(key) not in (None, plain):
            raise bad_request(f"{key} can only be {plain!r}", key, "unsupported")
    form = body.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise bad_request("response_format can only be text", "response_format", "unsupported")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a list of at least one message", "messages")
    system, question, recording = _messages(messages, limits, hosts)
    most = body.get("max_completion_tokens")
    mine = body.get(MINE)
    options = body.get("stream_options")
    return Asked(
        question,
        recording,
        system,
        max_tokens=_tokens(body.get("max_tokens") if most is None else most, limits),
        temperature=_temperature(body.get("temperature")),
        seed=_seed(body.get("seed")),
        stream=_flag(body, "stream"),
        usage=_flag(_mapping(options, "stream_options"), "include_usage"),
        **_own(_mapping(mine, MINE), limits),
    )


def _own(mine: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Options under ``diffa``."""
    if unknown := [key for key in mine if key not in ("sampler", "drafts", "deadline")]:
        raise bad_request(
            f"{MINE}: no option {unknown[0]!r}; known: sampler, drafts, deadline", MINE
        )
    deadline = mine.get("deadline")
    if deadline is not None:
        deadline = number(deadline, 0.001, limits.deadline, f"{MINE}.deadline")
    return {
        "drafts": _flag(mine, "drafts"), "sampler": mine.get("sampler"), "deadline": deadline,
    }  # fmt: skip


def _messages(
    messages: Sequence[object], limits: Limits, hosts: Sequence[str]
) -> tuple[str | None, str, bytes | None]:
    """System turn, question and recording of one user turn behind any system turns."""
    system: list[str] = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if not isinstance(message, dict):
            raise bad_request(f"{param} must be a mapping", param)
        role = message.get("role")
        text, recording = _content(message.get("content"), f"{param}.content", limits, hosts)
        if role in ("system", "developer"):
            if recording is not None:
                raise bad_request(f"{param}: a {role} turn holds text alone", param)
            system.append(text)
        elif role == "user":
            if index + 1 < len(messages):
                raise bad_request(
                    f"{param}: one question is answered at a time: the user's turn must be the "
                    "last, and there can be no other",
                    "messages",
                )
            words = check_text("\n".join(system), "messages", limits)
            return words if system else None, check_text(text, param, limits), recording
        else:
            raise bad_request(
                f"{param}.role must be system, developer or user, got {role!r}"[:300], param
            )
    raise bad_request("messages has no user turn", "messages")


def _content(
    content: object, param: str, limits: Limits, hosts: Sequence[str]
) -> tuple[str, bytes | None]:
    """Text and recording of a turn."""
    if isinstance(content, str):
        return content, None
    if not isinstance(content, list) or not content:
        raise bad_request(f"{param} must be text or a list of parts", param)
    words: list[str] = []
    recording: bytes | None = None
    for index, part in enumerate(content):
        place = f"{param}[{index}]"
        if not isinstance(part, dict):
            raise bad_request(f"{place} must be a mapping", place)
        if part.get("type") == "text":
            if not isinstance(part.get("text"), str):
                raise bad_request(f"{place}.text must be text", place)
            words.append(part["text"])
            continue
        if recording is not None:
            raise bad_request(f"{place}: a question is about one recording; join them first", place)
        recording = _audio(part, place, limits, hosts)
    return "\n".join(words), recording


def _audio(part: Mapping[str, Any], place: str, limits: Limits, hosts: Sequence[str]) -> bytes:
    """Bytes of an ``input_audio`` or ``audio_url`` part."""
    kind = part.get("type")
    if kind == "input_audio":
        inner = _mapping(part.get("input_audio"), f"{place}.input_audio")
        form = inner.get("format")
        if form is not None and form not in FORMATS:
            raise bad_request(f"{place}: format must be one of {', '.join(FORMATS)}", place)
        return decode_base64(inner.get("data"), f"{place}.input_audio.data", limits)
    if kind == "audio_url":
        inner = _mapping(part.get("audio_url"), f"{place}.audio_url")
        url = inner.get("url")
        if isinstance(url, str) and url[:5].lower() == "data:":
            return decode_base64(url, f"{place}.audio_url.url", limits)
        return download_recording(url, hosts, limits, f"{place}.audio_url.url")
    shown = repr(kind)[:100]
    raise bad_request(f"{place}.type must be text, input_audio or audio_url, got {shown}", place)


def check_text(text: str, param: str, limits: Limits) -> str:
    """Text that can be tokenised: valid Unicode, and not longer than the server takes."""
    if len(text) > limits.characters:
        raise too_large(f"{param} has more than {limits.characters} characters", param)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad_request(f"{param} is not valid Unicode: {error.reason}", param) from error
    return text


def _mapping(value: object, param: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_request(f"{param} must be a mapping, got {type(value).__name__}", param)
    return value


def _flag(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{key} must be true or false", key)
    return bool(value)


def _tokens(value: object, limits: Limits) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise bad_request("max_tokens must be a whole number of at least 1", "max_tokens")
    if value > limits.tokens:
        raise bad_request(f"max_tokens is at most {limits.tokens} here", "max_tokens", "too_large")
    return value


def _temperature(value: object) -> float | None:
    return None if value is None else number(value, 0.0, 2.0, "temperature")


def _seed(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise bad_request("seed must be a whole number of 64 bits", "seed")
    return value
