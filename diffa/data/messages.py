"""Rows to and from ``messages`` + ``audios``: what ms-swift, LLaMA-Factory and others read."""

from __future__ import annotations

from typing import Any

from diffa.chat import AUDIO_MARK
from diffa.data.samples import DataError, ManifestRow

_IN_MESSAGES = (
    "input",
    "target",
    "audio_filepath",
    "chosen",
    "rejected",
)  # stand elsewhere in messages


_AUDIO_FIELDS = ("audio_filepath", "audio", "sound", "audio_path", "wav")
_SOUND_MARK = "<sound>"  # Audio Flamingo's
_KNOWN = ("audio_filepath", "input", "target")


def to_manifest_row(row: ManifestRow) -> ManifestRow:
    """Return a row of any known form as a row of the published one.

    Known forms: the published one; ``messages`` or ``conversations`` (LLaVA, Audio Flamingo);
    ``query`` and ``response`` (ms-swift). Audio may be a path, or a mapping of ``datasets`` with
    ``path``, ``bytes``, or ``array`` and ``sampling_rate``; embedded audio stays under ``audio``.

    Raises:
        DataError: Another form, or a row without audio, question and answer.
    """
    row = _with_audio_path(row)
    if "messages" not in row and "conversations" in row:
        row = {"messages" if name == "conversations" else name: v for name, v in row.items()}
    elif "messages" not in row and {"query", "response"} <= row.keys():
        turns = [
            {"role": "user", "content": row["query"]},
            {"role": "assistant", "content": row["response"]},
        ]
        row = {k: v for k, v in row.items() if k not in ("query", "response")}
        row["messages"] = turns
    if "messages" in row:
        row = from_messages(row)
    if not any(name in row for name in _KNOWN):
        names = ", ".join(sorted(map(str, row))[:8]) or "none"
        raise DataError(f"is of a form that is not known (its fields: {names})")
    if not any(row.get(name) for name in (*_KNOWN, "audio", "transcription")):
        raise DataError("is blank: it has no audio, no question and no answer")
    return row


def _with_audio_path(row: ManifestRow) -> ManifestRow:
    """Move a row's audio to ``audio_filepath``, or to ``audio`` if it is embedded."""
    for name in _AUDIO_FIELDS:
        value = row.get(name)
        if not value or (name != "audio_filepath" and not isinstance(value, str | dict)):
            continue
        rest = {k: v for k, v in row.items() if k != name}
        if isinstance(value, dict):
            if value.get("array") is not None or value.get("bytes"):
                return {**rest, "audio": value}
            value = _path(value)
        return {**rest, "audio_filepath": value}
    return row


def to_messages(row: ManifestRow, *, system: str = "") -> ManifestRow:
    """Return a row as a conversation: ``<audio>`` before the question, one path in ``audios``.

    A preference row gets ``rejected_response`` (ms-swift's name). Every other field is kept under
    its own name: trainers ignore it, and ``from_messages`` gives the row back.
    """
    turns = [{"role": "system", "content": system}] if system else []
    audios = [row["audio_filepath"]] if row.get("audio_filepath") else []
    turns += [
        {"role": "user", "content": AUDIO_MARK * len(audios) + row.get("input", "")},
        {"role": "assistant", "content": row.get("target", "")},
    ]
    conversation: ManifestRow = {"messages": turns, "audios": audios}
    if "rejected" in row:
        conversation["rejected_response"] = row["rejected"]
    return conversation | {name: value for name, value in row.items() if name not in _IN_MESSAGES}


def from_messages(row: ManifestRow) -> ManifestRow:
    """Return a conversation of one question and one answer as a row of the published form.

    Raises:
        DataError: more turns or more recordings than the published form can hold, or no answer.
    """
    turns = _turns(row["messages"])
    roles = [role for role, _ in turns if role != "system"]
    if roles != ["user", "assistant"]:
        speakers = ", ".join(roles) or "nobody"
        raise DataError(f"is a conversation of {speakers}; a question and its answer are expected")
    (_, question), (_, answer) = [turn for turn in turns if turn[0] != "system"]
    audios = row.get("audios") or []
    if not audios and (row.get("audio_filepath") or row.get("audio")):
        audios = [row.get("audio_filepath") or row["audio"]]
        question = question.replace(_SOUND_MARK, AUDIO_MARK)
        if AUDIO_MARK not in question:
            question = AUDIO_MARK + question
    if len(audios) > 1 or question.count(AUDIO_MARK) > 1:
        raise DataError(f"has {len(audios)} recordings; a row holds one")
    if len(audios) != question.count(AUDIO_MARK):
        raise DataError(
            f"has {len(audios)} recordings but {question.count(AUDIO_MARK)} {AUDIO_MARK} marks"
        )
    fields: ManifestRow = {"input": question.replace(AUDIO_MARK, "").strip(), "target": answer}
    if audios and not row.get("audio"):
        fields["audio_filepath"] = _path(audios[0])
    if "rejected_response" in row:
        fields |= {"chosen": answer, "rejected": row["rejected_response"]}
    replaced = ("messages", "audios", "rejected_response")
    return {k: v for k, v in row.items() if k not in replaced} | fields


def _turns(messages: Any) -> list[tuple[str, str]]:
    """Read turns as role and content; ``from``/``value`` are other names of the same."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise DataError("has messages that are not a list of turns")
    names = {"human": "user", "gpt": "assistant"}
    turns = [(t.get("role", t.get("from")), t.get("content", t.get("value"))) for t in messages]
    if not all(isinstance(part, str) for turn in turns for part in turn):
        raise DataError("has a turn without role or without text")
    return [(names.get(role, role), text) for role, text in turns]


def _path(audio: Any) -> str:
    path = audio.get("path") if isinstance(audio, dict) else audio
    if not isinstance(path, str) or not path:
        raise DataError("names no file in audios")
    return path
