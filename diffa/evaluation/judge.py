"""A judge model that rates responses with VoiceBench's prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from diffa.evaluation.items import EvaluationError, Fields, Item, as_text
from diffa.llm.cache import ReplyCache
from diffa.llm.client import ChatClient, ChatError

SAMPLING = {"temperature": 0.5, "top_p": 0.95, "max_tokens": 1024}
NUM_SAMPLES = 3
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
# The space after the question mark is the official prompt's.
REFERENCED = (
    "### Question\n{prompt}\n\n### Reference answer\n{reference}\n\n### Candidate answer\n"
    "{response}\n\nIs the candidate answer correct based on the question and reference answer? \n"
    'Please only output a single "Yes" or "No". Do not output anything else.'
)


class Judge:
    """A chat model that rates responses; its replies are cached.

    Args:
        endpoint: The service that runs the model.
        cache: Folder of replies. Only what is not in it is requested.
    """

    def __init__(self, endpoint: ChatClient, cache: str | os.PathLike[str]) -> None:
        self.endpoint, self._cache = endpoint, ReplyCache(cache)

    def judge(
        self, messages: Sequence[Mapping[str, str]], num_samples: int = NUM_SAMPLES
    ) -> list[str]:
        """Return ``num_samples`` replies; raises EvaluationError if the service gives none."""
        turns = [dict(turn) for turn in messages]
        key = [self.endpoint.url, self.endpoint.model, SAMPLING, turns, num_samples]
        replies: list[str] = (self._cache.get(key) or {}).get("replies", [])
        if len(replies) < num_samples:
            replies = self._request(turns, num_samples)
            entry = {"model": self.endpoint.model, "messages": turns, "replies": replies}
            try:
                self._cache.put(key, entry)
            except OSError as error:
                raise EvaluationError(
                    f"a judgement cannot be written to {self._cache.folder}: {error}"
                ) from error
        return replies

    def _request(self, messages: Sequence[Mapping[str, str]], num_samples: int) -> list[str]:
        replies: list[str] = []
        try:
            # Services that ignore n give one reply at a time.
            while len(replies) < num_samples:
                options = {**SAMPLING, "n": num_samples - len(replies)}
                replies += [choice.text for choice in self.endpoint.complete(messages, options)]
        except ChatError as error:
            raise EvaluationError(f"the judge does not answer: {error}") from error
        return replies[:num_samples]


def judge_messages(fields: Fields) -> list[dict[str, str]]:
    """Return VoiceBench's messages to its judge; with the reference if an item has one."""
    text = REFERENCED if fields.get("reference") is not None else OPEN
    # One after the other, as in the official script: a prompt may contain "{response}".
    for name in ("prompt", "reference", "response"):
        text = text.replace(f"{{{name}}}", as_text(fields.get(name)))
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def judge_items(
    items: Sequence[Item],
    judge: Judge,
    *,
    workers: int = 4,
    on_item: Callable[[int, int], None] | None = None,
) -> tuple[list[Item], list[tuple[int, str]]]:
    """Add the judge's replies to the column ``score``, several items at a time.

    Returns:
        The items, and number and reason of those that the judge did not answer; their ``score``
        is empty.

    Raises:
        EvaluationError: The judge answers none of the items.
    """

    def replies(item: Item) -> list[str] | EvaluationError:
        try:
            return judge.judge(judge_messages(item.fields))
        except EvaluationError as error:
            return error

    judged: list[Item] = []
    failed: list[tuple[int, str]] = []
    with ThreadPoolExecutor(workers) as pool:
        for item, score in zip(items, pool.map(replies, items), strict=True):
            if isinstance(score, EvaluationError):
                failed.append((item.number, str(score)))
                score = []
            judged.append(item._replace(fields={**item.fields, "score": score}))
            if on_item is not None:
                on_item(len(judged), len(items))
    if failed and len(failed) == len(items):
        raise EvaluationError(failed[0][1])
    return judged, failed
