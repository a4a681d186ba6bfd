"""Labels of single tokens, which supervise what the backbone has to work out before it answers.

A word of a transcript is labelled with its place among the spoken words, a choice with its letter,
and the letter of an answer with the word that it stands for (``diffa.nano.alignment``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diffa.data.corpora.fsdd import DIGIT_WORDS
from diffa.nano.corpus.phrases import ORDINALS
from diffa.nano.corpus.questions import LETTERS
from diffa.nano.corpus.vocabulary import BLANK


class TokenLabel(NamedTuple):
    """The label of one token.

    Attributes:
        place: Index of the token.
        field: ``number``, ``letter`` or ``word``.
        word: The label, a word of the field.
        source: Index of the token that it should attend to; None if any.
    """

    place: int
    field: str
    word: str
    source: int | None = None


def transcript_words(words: Sequence[str], start: int) -> list[str]:
    """Return the spoken words of an audio text from token ``start`` on, every word once."""
    return [
        words[i]
        for i in range(start, len(words))
        if words[i] != BLANK and (i == start or words[i - 1] != words[i])
    ]


def label_tokens(words: Sequence[str], transcript: Sequence[str]) -> list[TokenLabel]:
    """Label the tokens of a prompt and its answer about a recording with this transcript.

    Fields: ``number`` names an answer's word by its place in the recording, from "first", and is
    BLANK for a word that repeats none; ``letter`` stands beside the words of choices; ``word`` is
    the chosen one's, on the letter of the answer, with its place among the choices.
    """
    ends = [i for i, word in enumerate(words) if word == "<|end_header_id|>"]
    begin = ends[-1] + 2 if ends else 0
    question, answer = words[:begin], words[begin:]
    if len(answer) > 2 and answer[0] in LETTERS and answer[1] == ".":
        choices = list(_label_choices(question))
        right = [choice.place for choice in choices if choice.word == answer[0]]
        meant = [TokenLabel(begin, "word", answer[2], right[0])] if right else []
        return [*choices, *meant, *_label_place(words, begin)]
    return [*_label_place(words, begin)] or [*_label_transcript(answer, begin, transcript)]


def _label_place(words: Sequence[str], begin: int) -> Iterator[TokenLabel]:
    """Label the one digit of an answer to a question for the digit at a place."""
    ordinals = [name for name in ORDINALS if name in words[:begin]]
    digits = [i for i in range(begin, len(words)) if words[i] in DIGIT_WORDS]
    if len(ordinals) == 1 and len(digits) == 1:
        yield TokenLabel(digits[0], "number", ordinals[0])


def _label_transcript(
    answer: Sequence[str], begin: int, transcript: Sequence[str]
) -> Iterator[TokenLabel]:
    """Label a transcript, or a caption, which tells what is said from "says" to "over"."""
    digits = [word for word in answer if word in DIGIT_WORDS]
    caption = any(word in ("say", "says") for word in answer)
    only_digits = all(word in DIGIT_WORDS or word.startswith("<|") for word in answer)
    if not caption and not (only_digits and digits == list(transcript)):
        return
    copying, place = not caption, 0
    for i, word in enumerate(answer, start=begin):
        copying = (copying or word in ("say", "says")) and word != "over"
        copied = copying and word in DIGIT_WORDS
        yield TokenLabel(i, "number", ORDINALS[min(place, len(ORDINALS) - 1)] if copied else BLANK)
        place += copied


def _label_choices(question: Sequence[str]) -> Iterator[TokenLabel]:
    """Label the words of "A. four B. nine" with their letters."""
    letter = None
    for i, word in enumerate(question):
        if word in LETTERS and question[i + 1 : i + 2] == ["."]:
            letter = word
        elif word.startswith("<|"):
            letter = None
        elif letter and word != ".":
            yield TokenLabel(i, "letter", letter)
