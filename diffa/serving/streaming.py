"""An answer as text while it forms: what is final is told once, drafts on request."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffa.chat import Chat
from diffa.serving.requests import Moment


class Teller:
    """Turns the moments of one answer into pieces of text whose sum is the answer's text."""

    def __init__(self, chat: Chat) -> None:
        self._chat, self._told, self._known = chat, "", 0

    def more(self, moment: Moment) -> str:
        """Text that became final with this moment: all before the first undecided token."""
        sure = int(moment.final.long().cumprod(dim=0).sum())
        if sure <= self._known:
            return ""
        self._known = sure
        # Half a character, or a blank that may turn out to be the last, waits for its neighbour.
        return self._piece(self._chat.decode(moment.tokens[:sure]).removesuffix("\ufffd").rstrip())

    def rest(self, tokens: Tensor) -> str:
        """What is still to be told of the finished answer (A,)."""
        return self._piece(self._chat.decode(tokens))

    def _piece(self, text: str) -> str:
        if not text.startswith(self._told):
            return ""
        piece, self._told = text[len(self._told) :], text
        return piece


def draft(moment: Moment, chat: Chat, vocab: Any) -> dict[str, Any]:
    """The whole canvas after a step: every token's text, whether it is final, its confidence.

    A mask is None; tokens are spelled as they stand in their row.
    """
    from diffa.runtime.render import token_text

    tokens = moment.tokens.tolist()
    special = (vocab.eos, vocab.pad)
    words = [
        None if token == vocab.mask
        else "" if token in special
        else token_text(token, tokens, place, chat.tokenizer)
        for place, token in enumerate(tokens)
    ]  # fmt: skip
    return {
        "forward": moment.num_forwards,
        "tokens": words,
        "ids": tokens,
        "final": moment.final.tolist(),
        "confidence": [round(float(value), 4) for value in moment.confidence],
    }


def count(tokens: Tensor, vocab: Any) -> int:
    """Tokens of an answer up to its end, the end included where there is one."""
    ids = tokens.tolist()
    return ids.index(vocab.eos) + 1 if vocab.eos in ids else len(ids)
