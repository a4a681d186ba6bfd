"""Chat prompts: the tokenizer's chat template, where the audio goes, tokens to text and back."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.runtime.text import is_unicode
from diffa.spec.validation import PROMPT_DEFAULTS

AUDIO_MARK = "<audio>"
_ANSWER = "DIFFA_ANSWER_PLACEHOLDER"
# Noncharacters, which Unicode reserves for use inside a program, mark places in rendered text.
_GUARD, _TYPED, _AUDIO = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = re.compile(f"[{_GUARD}{_TYPED}{_AUDIO}]")
_SYSTEM = "DIFFA_SYSTEM_PLACEHOLDER"


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        tokens: Token ids (L,).
        audio_at: Index before which the audio goes. None: no audio.
    """

    tokens: Tensor
    audio_at: int | None


class Example(NamedTuple):
    """A question with its answer.

    Attributes:
        tokens: Token ids (L,).
        answer: Which tokens are targets, (L,) bool.
        audio_at: Index before which the audio goes. None: no audio.
    """

    tokens: Tensor
    answer: Tensor
    audio_at: int | None


class _Turn(NamedTuple):
    """What a template writes around the assistant's answer, the same for every question."""

    header: str
    header_ids: list[int]
    end: str


class Chat:
    """Writes prompts in the chat template of a tokenizer.

    A finished conversation is rendered with a placeholder for the answer: the prompt is what the
    template writes before it. So prompts and training examples agree, also for templates that
    ignore ``add_generation_prompt``, trim messages, or add an empty block of thoughts::

        prompt: ... question <|eot_id|> | header: <|start_header_id|>assistant ... | answer | end

    Special tokens that a user types are text: parts of a turn that hold one are marked before the
    template is applied, and tokenized apart. ``<audio>`` counts only where ``user`` has it.

    Without a template, a conversation is the system prompt, a blank line, the user's text, a line
    break, the answer and EOS.

    Args:
        tokenizer: A tokenizer of transformers.
        system: System prompt; none where empty. A template without a system prompt gets it before
            the user's text, with a blank line between.
        user: User turn around ``{question}``. ``<audio>`` says where the audio goes and stays in
            the text, as in DIFFA.

    Raises:
        SpecError: ``user`` has no ``{question}``.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str = str(PROMPT_DEFAULTS["system"]),
        user: str = str(PROMPT_DEFAULTS["user"]),
    ) -> None:
        if "{question}" not in user:
            raise SpecError(f"prompt.user: has no {{question}} to fill in: {user!r}")
        self.tokenizer, self.system, self.user = tokenizer, system, user

    def encode(
        self, question: str, *, system: str | None = None, audio: bool = True, trim: bool = True
    ) -> Prompt:
        """Return the prompt for a question, the assistant's header included.

        Args:
            question: The question.
            system: Override the system prompt.
            audio: Whether the prompt is about a recording.
            trim: Let the template strip the user's text, as LLaDA's does. DIFFA's own prompt
                builder keeps the text as it is (False).

        Raises:
            SpecError: The template refuses the conversation, a text is no valid Unicode, or there
                is no place for the audio.
        """
        messages = self._messages(question, system)
        if not trim:
            # A character that no template strips protects both ends of the text.
            messages[-1]["content"] = f"{_GUARD}{messages[-1]['content']}{_GUARD}"
        text = self._split_at_answer(messages)[0].replace(_GUARD, "")
        tokens = self._ids(text)
        return Prompt(torch.tensor(tokens), self._audio_at(text, tokens) if audio else None)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, such as a choice; special tokens in it are text."""
        return self._ids(self._typed(text))

    def encode_example(
        self,
        question: str,
        answer: str,
        *,
        system: str | None = None,
        audio: bool = True,
        train_header: bool = True,
    ) -> Example:
        """Return a training example: the prompt of ``encode``, the answer and the end of its turn.

        Args:
            question: The question.
            answer: The answer.
            system: Override the system prompt.
            audio: Whether the question is about a recording.
            train_header: Whether the assistant's header is a target too, as in DIFFA.

        Raises:
            SpecError: As ``encode``, or the template rewrites the answer.
        """
        messages = self._messages(question, system)
        prompt, rest = self._split_at_answer(messages)
        answer = self._typed(answer)
        text = prompt + self._written_answer(messages, answer, prompt, rest) + self._turn.end
        prompt_ids, tokens = self._ids(prompt), self._ids(text)
        if tokens[: len(prompt_ids)] != prompt_ids:
            # The answer's first characters merge with the header's last: keep the prompt's tokens.
            tokens = prompt_ids + self._ids(text[len(prompt) :])
        start = len(prompt_ids)
        if train_header:
            before_header = self._ids(prompt[: len(prompt) - len(self._turn.header)])
            start = _num_equal(before_header, prompt_ids)
        mask = torch.arange(len(tokens)) >= start
        return Example(torch.tensor(tokens), mask, self._audio_at(text, tokens) if audio else None)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of an answer (L,) up to its first end of turn or of text.

        A leading header of the assistant, as in an example's targets, is left out.
        """
        ids, header = tokens.tolist(), self._turn.header_ids
        if header and ids[: len(header)] == header:
            ids = ids[len(header) :]
        ends = [ids.index(end) for end in self._end_ids if end in ids]
        text = str(
            self.tokenizer.decode(ids[: min(ends, default=len(ids))], skip_special_tokens=True)
        )
        end = self._turn.end
        # An end of one token was found among the ids: in the text it is what somebody wrote.
        return (text.partition(end)[0] if end and len(self._ids(end)) > 1 else text).strip()

    @cached_property
    def _turn(self) -> _Turn:
        """Find the assistant's header and the end of its turn."""
        messages = self._messages("question", None)
        prompt, rest = self._split_at_answer(messages)
        special = self._special_tokens
        # The turn ends with the first special token. What follows, such as a line break or the
        # header that LLaDA's template always adds, belongs to no answer.
        places = [(rest.index(token), token) for token in special if token in rest]
        if places:
            # At one place the longest token wins, as in tokenizers.
            at, token = min(places, key=lambda place: (place[0], -len(place[1])))
            end = rest[: at + len(token)]
        else:
            end = rest.rstrip() or str(self.tokenizer.eos_token or "")
        open_turn = self._render(messages, add_generation_prompt=False)
        if prompt.startswith(open_turn) and prompt != open_turn:
            header = prompt[len(open_turn) :]
        else:  # the template ignores the flag, or has no header
            header = prompt.rpartition(end)[2].lstrip("\n") if end and end in prompt else ""
        prompt_ids = self._ids(prompt)
        before = _num_equal(self._ids(prompt[: len(prompt) - len(header)]), prompt_ids)
        return _Turn(header, prompt_ids[before:], end)

    @cached_property
    def _end_ids(self) -> set[int]:
        """Ids that close an answer: the tokenizer's EOS, and the end of a turn of one token."""
        end = self._ids(self._turn.end)
        return {self.tokenizer.eos_token_id, *(end if len(end) == 1 else [])} - {None}

    @cached_property
    def _special_tokens(self) -> set[str]:
        return {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return _any_of(self._special_tokens)

    @cached_property
    def _special_ids(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}

    @cached_property
    def _has_system_turn(self) -> bool:
        """Whether the template writes system prompts: some refuse them, some leave them out."""
        system = {"role": "system", "content": _SYSTEM}
        try:
            return _SYSTEM in self._render([system, {"role": "user", "content": "question"}])
        except SpecError:
            return False

    def _messages(self, question: str, system: str | None) -> list[dict[str, str]]:
        """Return the turns before the answer."""
        system = self._typed(self.system if system is None else system)
        user = self.user.replace(AUDIO_MARK, _AUDIO + AUDIO_MARK, 1)
        text = user.replace("{question}", self._typed(question))
        if system and self._has_system_turn:
            return [{"role": "system", "content": system}, {"role": "user", "content": text}]
        return [{"role": "user", "content": f"{system}\n\n{text}" if system else text}]

    def _split_at_answer(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """Return what the template writes before and after an answer."""
        text = self._render([*messages, {"role": "assistant", "content": _ANSWER}])
        before, separator, after = text.rpartition(_ANSWER)
        if not separator:
            raise SpecError("the tokenizer's chat template leaves out the assistant's answer")
        # A space at the end of a header is a part of the answer's first token.
        return before.rstrip(" "), after

    def _written_answer(
        self, messages: list[dict[str, str]], answer: str, before: str, after: str
    ) -> str:
        """Return an answer as the template writes it, which may be trimmed."""
        text = self._render([*messages, {"role": "assistant", "content": answer}])
        if not (text.startswith(before) and text.endswith(after)):
            raise SpecError(
                "the chat template rewrites the question or the answer once it is answered"
            )
        return text[len(before) : len(text) - len(after)]

    def _render(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            # system, blank line, user text, line break, answer, EOS
            ends = {
                "system": "\n\n",
                "user": "\n",
                "assistant": str(self.tokenizer.eos_token or ""),
            }
            return "".join(turn["content"] + ends[turn["role"]] for turn in messages)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # templates raise errors of their own, and Jinja's
            roles = ", ".join(turn["role"] for turn in messages)
            raise SpecError(f"the chat template refuses the turns {roles}: {error}") from error

    def _typed(self, text: str) -> str:
        """Mark a text in which the tokenizer would find special tokens.

        The marks lie inside blanks at the ends, which templates may strip.

        Raises:
            SpecError: The text holds half a character (a lone surrogate).
        """
        if not is_unicode(text):
            raise SpecError(
                f"the text {text[:60]!r} is no valid Unicode: it holds a lone surrogate"
            )
        text = _MARKS.sub("\ufffd", text)
        if not self._special_pattern.search(text):
            return text
        core = text.strip()
        start = text.index(core)
        return f"{text[:start]}{_TYPED}{core}{_TYPED}{text[start + len(core) :]}"

    def _ids(self, text: str) -> list[int]:
        """Return the ids of rendered text; what was typed is tokenized without special tokens."""
        ids: list[int] = []
        for number, part in enumerate(text.replace(_AUDIO, "").split(_TYPED)):
            if not part:
                continue
            if number % 2 == 0:
                ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
            else:
                ids += self._typed_ids(part)
        return ids

    def _typed_ids(self, text: str) -> list[int]:
        """Return the ids of typed text, none of which is a special or an added token's."""

        def encode(piece: str) -> list[int]:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            return list(self.tokenizer(piece, **options)["input_ids"])

        ids = encode(text)
        if self._special_ids.isdisjoint(ids):
            return ids
        # Added tokens that are not special, and those in the model's own vocabulary, are left:
        # break each after its first character.
        broken = self._special_pattern.sub(lambda match: match[0][0] + _TYPED + match[0][1:], text)
        return [number for piece in broken.split(_TYPED) for number in encode(piece)]

    def _audio_at(self, text: str, tokens: list[int]) -> int:
        """Return the number of tokens that the text before the mark settles by itself.

        The last token before ``<audio>`` can merge with it (a space does), so the audio goes after
        the longest beginning that both tokenisations share: DIFFA's "count minus one".
        """
        if _AUDIO not in text:
            raise SpecError(f"prompt.user: has no {AUDIO_MARK} to say where the audio goes")
        return _num_equal(self._ids(text[: text.index(_AUDIO)]), tokens)


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that finds the longest of some tokens; none are found among none."""
    words = sorted((re.escape(token) for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(words) or "(?!)")


def _num_equal(first: list[int], second: list[int]) -> int:
    """Return how many tokens two lists share at their beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
