"""A judge of answers: asked with VoiceBench's prompts, every judgement kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diffa.evaluation.items import EvaluationError, Fields, Row, text_of
from diffa.llm.cache import Replies
from diffa.llm.client import Endpoint, NoReply

SAMPLING = {"temperature": 0.5, "top_p": 0.95, "max_tokens": 1024}
SAMPLES = 3
SYSTEM = "You are a helpful assistant who tries to help answer the user's question."
OPEN = """
I need your help to evaluate the performance of several models in the speech interaction scenario. \
The models will receive a speech input from the user, which they need to understand and respond to \
with a speech output.
Your task is to rate the model's responses based on the provided user input transcription \
[Instruction] and the model's output transcription [Response].

Please evaluate the response on a scale of 1 to 5:
1 point: The response is largely irrelevant, incorrect, or fails to address the user's query. It \
may be off-topic or provide incorrect information.
2 points: The response is somewhat relevant but lacks accuracy or completeness. It may only \
partially answer the user's question or include extraneous information.
3 points: The response is relevant and mostly accurate, but it may lack conciseness or include \
unnecessary details that don't contribute to the main point.
4 points: The response is relevant, accurate, and concise, providing a clear answer to the user's \
question without unnecessary elaboration.
5 points: The response is exceptionally relevant, accurate, and to the point. It directly \
addresses the user's query in a highly effective and efficient manner, providing exactly the \
information needed.

Below are the transcription of user's instruction and models' response:
### [Instruction]: {prompt}
### [Response]: {response}

After evaluating, please output the score only without anything else.
You don't need to provide any explanations.
"""
# The space behind the first question mark is the official prompt's.
REFERENCED = (
    "### Question\n{prompt}\n\n### Reference answer\n{reference}\n\n### Candidate answer\n"
    "{response}\n\nIs the candidate answer correct based on the question and reference answer? \n"
    'Please only output a single "Yes" or "No". Do not output anything else.'
)


class Judge:
    """A chat model that reads answers, every judgement of which is kept.

    Args:
        endpoint: where it is.
        cache: folder of judgements; asked again only what is not in it.
    """

    def __init__(self, endpoint: Endpoint, cache: str | os.PathLike[str]) -> None:
        self.endpoint, self._kept = endpoint, Replies(cache)

    def judge(self, messages: Sequence[Mapping[str, str]], samples: int = SAMPLES) -> list[str]:
        """Return ``samples`` replies; raises EvaluationError where the service gives none."""
        url, model = self.endpoint.url, self.endpoint.model
        turns = [dict(turn) for turn in messages]
        asked = [url, model, SAMPLING, turns, samples]
        replies: list[str] = (self._kept.find(asked) or {}).get("replies", [])
        if len(replies) < samples:
            replies = self._replies(turns, samples)
            self._keep(asked, {"model": model, "messages": turns, "replies": replies})
        return replies

    def _replies(self, messages: Sequence[Mapping[str, str]], samples: int) -> list[str]:
        replies: list[str] = []
        try:
            while len(replies) < samples:  # some services know no n and give one reply at a time
                settings = {**SAMPLING, "n": samples - len(replies)}
                replies += [choice.text for choice in self.endpoint.ask(messages, settings)]
        except NoReply as error:
            raise EvaluationError(f"the judge does not answer: {error}") from error
        return replies[:samples]

    def _keep(self, asked: Any, kept: Mapping[str, Any]) -> None:
        try:
            self._kept.keep(asked, kept)
        except OSError as error:
            folder = self._kept.folder
            raise EvaluationError(f"a judgement cannot be kept in {folder}: {error}") from error


def messages_of(fields: Fields) -> list[dict[str, str]]:
    """VoiceBench's question to its judge: with the reference where a row has one."""
    form = REFERENCED if fields.get("reference") is not None else OPEN
    text = form
    for name in ("prompt", "reference", "response"):  # in turn, as the official script does
        text = text.replace(f"{{{name}}}", text_of(fields.get(name)))
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def judge_rows(
    rows: Sequence[Row],
    judge: Judge,
    *,
    workers: int = 4,
    on_row: Callable[[int, int], None] | None = None,
) -> tuple[list[Row], list[tuple[int, str]]]:
    """Add the judge's replies (``score``) to rows; also return the rows it would not judge, whose
    ``score`` is empty.

    Raises:
        EvaluationError: the judge answers none of the rows.
    """

    def one(row: Row) -> Row | str:
        try:
            score = judge.judge(messages_of(row.fields))
            return row._replace(fields={**row.fields, "score": score})
        except EvaluationError as error:
            return str(error)

    judged: list[Row] = []
    failed: list[tuple[int, str]] = []
    with ThreadPoolExecutor(workers) as pool:
        for row, found in zip(rows, pool.map(one, rows), strict=True):
            if isinstance(found, str):
                failed.append((row.number, found))
                found = row._replace(fields={**row.fields, "score": []})
            judged.append(found)
            if on_row is not None:
                on_row(len(judged), len(rows))
    if failed and len(failed) == len(rows):
        raise EvaluationError(failed[0][1])
    return judged, failed
