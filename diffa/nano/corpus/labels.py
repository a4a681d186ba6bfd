"""What an answer needs to have worked out before its words: labels of single tokens.

A word that repeats a spoken one needs to know which; a choice needs its letter beside its word, and
the letter that is written first the word that it stands for. ``trainers.hints`` teaches that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diffa.data.corpora.fsdd import DIGIT_WORDS
from diffa.nano.corpus.phrases import ORDINALS
from diffa.nano.corpus.questions import LETTERS
from diffa.nano.corpus.vocabulary import BLANK


class Hint(NamedTuple):
    """That the token at ``place`` should know a ``word``, among other words of its ``field``.

    ``source`` is the place that it should look at next, if that is told.
    """

    place: int
    field: str
    word: str
    source: int | None = None


def spoken_words(words: Sequence[str], spoken: int) -> list[str]:
    """The speech of a script from token ``spoken`` on, every word once."""
    return [
        words[i]
        for i in range(spoken, len(words))
        if words[i] != BLANK and (i == spoken or words[i - 1] != words[i])
    ]


def hints(words: Sequence[str], said: Sequence[str]) -> list[Hint]:
    """Label the tokens of a prompt with its answer about a recording that says ``said``.

    Fields: ``number`` names an answer's word by its place in the recording, from "first", and is
    BLANK for a word that repeats none; ``letter`` stands beside the words of choices; ``word`` is
    the chosen one's, on the letter of the answer, with its place among the choices.
    """
    ends = [i for i, word in enumerate(words) if word == "<|end_header_id|>"]
    begin = ends[-1] + 2 if ends else 0
    question, answer = words[:begin], words[begin:]
    if len(answer) > 2 and answer[0] in LETTERS and answer[1] == ".":
        choices = list(_choices(question))
        right = [choice.place for choice in choices if choice.word == answer[0]]
        meant = [Hint(begin, "word", answer[2], right[0])] if right else []
        return [*choices, *meant, *_at_place(words, begin)]
    return [*_at_place(words, begin)] or [*_told(answer, begin, said)]


def _at_place(words: Sequence[str], begin: int) -> Iterator[Hint]:
    """Label the one digit of an answer to a question for the digit at a place."""
    asked = [name for name in ORDINALS if name in words[:begin]]
    digits = [i for i in range(begin, len(words)) if words[i] in DIGIT_WORDS]
    if len(asked) == 1 and len(digits) == 1:
        yield Hint(digits[0], "number", asked[0])


def _told(answer: Sequence[str], begin: int, said: Sequence[str]) -> Iterator[Hint]:
    """Label a transcript, or a caption, which tells what is said from "says" to "over"."""
    digits = [word for word in answer if word in DIGIT_WORDS]
    caption = any(word in ("say", "says") for word in answer)
    plain = all(word in DIGIT_WORDS or word.startswith("<|") for word in answer)
    if not caption and not (plain and digits == list(said)):
        return
    telling, place = not caption, 0
    for i, word in enumerate(answer, start=begin):
        telling = (telling or word in ("say", "says")) and word != "over"
        copied = telling and word in DIGIT_WORDS
        yield Hint(i, "number", ORDINALS[min(place, len(ORDINALS) - 1)] if copied else BLANK)
        place += copied


def _choices(question: Sequence[str]) -> Iterator[Hint]:
    """Label the words of "A. four B. nine" with their letters."""
    letter = None
    for i, word in enumerate(question):
        if word in LETTERS and question[i + 1 : i + 2] == ["."]:
            letter = word
        elif word.startswith("<|"):
            letter = None
        elif letter and word != ".":
            yield Hint(i, "letter", letter)
