"""Text of an answer while it is decoded: what is final, and drafts of the whole canvas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffa.runtime.render import token_text

if TYPE_CHECKING:
    from torch import Tensor

    from diffa.chat import Chat
    from diffa.serving.requests import FinishedEvent, StepEvent
    from diffa.types import Vocab


class TextStream:
    """Turn the steps of an answer into pieces of text that together are the whole answer."""

    def __init__(self, chat: Chat, stops: Sequence[str] = ()) -> None:
        self._chat, self._stops, self._sent, self._num_final = chat, stops, "", 0

    def push(self, step: StepEvent) -> str:
        """Return the text that became final: everything before the first undecided token."""
        num_final = int(step.final.long().cumprod(dim=0).sum())
        if num_final <= self._num_final:
            return ""
        self._num_final = num_final
        text = self._chat.decode(step.tokens[:num_final])
        # Half a UTF-8 character, or a blank that decoding strips at the end, waits for the next.
        text = text.removesuffix("\ufffd").rstrip()
        # The end may be the beginning of a stop, also of one that begins before a stop found now.
        starts = [stop[:size] for stop in self._stops for size in range(1, len(stop))]
        overlap = max((len(start) for start in starts if text.endswith(start)), default=0)
        safe = min(len(cut_at_stop(text, self._stops)), len(text) - overlap)
        return self._next_piece(text[:safe])

    def finish(self, tokens: Tensor) -> str:
        """Return the rest of the finished answer (A,)."""
        return self._next_piece(cut_at_stop(self._chat.decode(tokens), self._stops))

    def _next_piece(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stops, which is left out."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def format_logprobs(
    event: FinishedEvent, chat: Chat, vocab: Vocab, count: int = 0
) -> dict[str, Any] | None:
    """Return OpenAI's ``logprobs``: of each token when it was written, up to the end.

    ``count`` likeliest tokens of each place are added.
    """
    if event.confidence is None:
        return None
    ids, entries = event.tokens.tolist(), []
    for index in range(ids.index(vocab.eos) if vocab.eos in ids else len(ids)):
        text = token_text(ids[index], ids, index, chat.tokenizer)
        value = math.log(max(float(event.confidence[index]), 1e-30))
        likeliest = _format_likeliest(event, index, count, ids, chat)
        entries.append({**_format_token(text, value), "top_logprobs": likeliest})
    return {"content": entries, "refusal": None}


def _format_likeliest(
    event: FinishedEvent, index: int, count: int, ids: list[int], chat: Chat
) -> list[dict[str, Any]]:
    """Return the ``count`` likeliest tokens of a slot; what no pass gave a number is left out."""
    if event.likeliest is None:
        return []
    tokens, values = (part[index, :count].tolist() for part in event.likeliest)
    return [
        _format_token(
            token_text(token, [*ids[:index], token, *ids[index + 1 :]], index, chat.tokenizer),
            value,
        )
        for token, value in zip(tokens, values, strict=True)
        if math.isfinite(value)
    ]


def _format_token(text: str, log_prob: float) -> dict[str, Any]:
    data = list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": round(log_prob, 6), "bytes": data}


def format_draft(step: StepEvent, chat: Chat, vocab: Vocab) -> dict[str, Any]:
    """Return the canvas after a step as JSON: every token's text (a mask is None), whether it is
    final, and its confidence."""
    ids = step.tokens.tolist()
    texts = [
        None if token == vocab.mask
        else "" if token in (vocab.eos, vocab.pad)
        else token_text(token, ids, index, chat.tokenizer)
        for index, token in enumerate(ids)
    ]  # fmt: skip
    return {
        "step": step.num_forwards,
        "tokens": texts,
        "ids": ids,
        "final": step.final.tolist(),
        "confidence": [round(float(value), 4) for value in step.confidence],
    }


def count_tokens(tokens: Tensor, vocab: Vocab) -> int:
    """Return the number of tokens up to the end-of-sequence token, which counts."""
    ids = tokens.tolist()
    return ids.index(vocab.eos) + 1 if vocab.eos in ids else len(ids)
