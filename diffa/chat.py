"""Chat prompts: the checkpoint's own template, where the audio goes, tokens to text and back."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.errors import SpecError

AUDIO_MARK = "<audio>"
SYSTEM = "You are a helpful voice assistant."
USER = f"This is the audio: {AUDIO_MARK}. {{question}}"


class Prompt(NamedTuple):
    """Token ids (L,) and the index before which the audio goes (None without audio)."""

    tokens: Tensor
    audio_at: int | None


class Example(NamedTuple):
    """A question with its answer: ids (L,), which belong to the answer (L,) bool, audio's index."""

    tokens: Tensor
    answer: Tensor
    audio_at: int | None


class Chat:
    """Writes prompts in the chat template of a backbone's tokenizer.

    Args:
        tokenizer: with a chat template, as transformers reads it from the checkpoint.
        system: the system turn; none where empty.
        user: the user turn around ``{question}``; ``<audio>`` says where the audio goes and
            stays in the text (DIFFA keeps it).

    Raises:
        SpecError: the tokenizer has no chat template, or ``user`` has no ``{question}``.
    """

    def __init__(self, tokenizer: Any, *, system: str = SYSTEM, user: str = USER) -> None:
        if "{question}" not in user:
            raise SpecError(f"prompt.user: has no {{question}} to fill in: {user!r}")
        if not getattr(tokenizer, "chat_template", None):
            raise SpecError("the backbone's tokenizer has no chat template; use model.generate")
        self.tokenizer, self.system, self.user = tokenizer, system, user

    def encode(self, question: str, *, system: str | None = None, audio: bool = True) -> Prompt:
        """Return the prompt for a question, ending in the assistant's open header."""
        turns = self._turns(question, system)
        text = self._render(turns, open_=True)
        tokens = self._ids(text)
        return Prompt(torch.tensor(tokens), self._audio_at(text, tokens) if audio else None)

    def encode_example(
        self, question: str, answer: str, *, system: str | None = None, audio: bool = True
    ) -> Example:
        """Return a training row; the answer begins with the assistant's header, as in DIFFA."""
        turns = self._turns(question, system)
        asked = self._ids(self._render(turns, open_=False))
        text = self._render([*turns, {"role": "assistant", "content": answer}], open_=False)
        tokens = self._ids(text)
        if tokens[: len(asked)] != asked:
            raise SpecError("the chat template rewrites the question once it is answered")
        mask = torch.arange(len(tokens)) >= len(asked)
        return Example(torch.tensor(tokens), mask, self._audio_at(text, tokens) if audio else None)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of an answer (L,) up to its first end of turn or of text."""
        ids = tokens.tolist()
        ends = [ids.index(end) for end in self._ends if end in ids]
        kept = ids[: min(ends)] if ends else ids
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    @cached_property
    def _ends(self) -> set[int]:
        """Ids that close an answer: the tokenizer's EOS, and what ends a turn of the template."""
        turn = [{"role": "assistant", "content": "x"}]
        closed = self._ids(self._render(turn, open_=False))[-1]
        special = closed in self.tokenizer.all_special_ids
        return {self.tokenizer.eos_token_id, *([closed] if special else [])} - {None}

    def _turns(self, question: str, system: str | None) -> list[dict[str, str]]:
        words = self.system if system is None else system
        user = {"role": "user", "content": self.user.replace("{question}", question)}
        return [{"role": "system", "content": words}, user] if words else [user]

    def _render(self, turns: list[dict[str, str]], *, open_: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=open_
        )
        return str(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _audio_at(self, text: str, tokens: list[int]) -> int:
        """Index of the first token that the text before the mark does not settle by itself.

        The last token before ``<audio>`` can merge with it (a space does), so the audio goes after
        the longest beginning that both tokenisations share: DIFFA's "count minus one".
        """
        if AUDIO_MARK not in text:
            raise SpecError(f"prompt.user: has no {AUDIO_MARK} to say where the audio goes")
        ahead = self._ids(text[: text.index(AUDIO_MARK)])
        same = (a == b for a, b in zip(ahead, tokens, strict=False))
        for index, equal in enumerate(same):
            if not equal:
                return index
        return len(ahead)
