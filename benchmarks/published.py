"""The published decoding loop, transcribed plainly: the baseline that speed is measured against.

One row, everything recomputed at every step, logits for every slot, a float64 softmax over all of
them, a loop over rows to choose, no early stop (LLaDA's and DIFFA's loop at temperature 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Question(NamedTuple):
    """A prompt (L,) with audio embeddings (N, W) that go before its token ``at``."""

    prompt: Tensor
    audio: Tensor
    at: int


def quotas(masks: int, steps: int) -> list[int]:
    """Tokens to accept at each of a block's steps: an even split, the remainder first."""
    return [masks // steps + (step < masks % steps) for step in range(steps)]


@torch.no_grad()
def step(model: Any, question: Question, answer: Tensor, end: int, count: int) -> Tensor:
    """One step: the whole canvas through the model, then ``count`` tokens of slots before ``end``.

    answer (1, A) holds the mask id where undecided; returns the next one.
    """
    embed, mask = model.backbone.embed, model.backbone.vocab.mask
    prompt = embed(question.prompt)
    embeds = torch.cat(
        [prompt[: question.at], question.audio, prompt[question.at :], embed(answer[0])]
    )
    logits = model.logits(embeds[None])
    tokens = logits.argmax(dim=-1)
    shares = torch.softmax(logits.to(torch.float64), dim=-1)
    confidence = shares.gather(-1, tokens[..., None])[..., 0]
    tokens, confidence = tokens[:, -answer.shape[1] :], confidence[:, -answer.shape[1] :]
    masked = answer == mask
    masked[:, end:] = False
    confidence = torch.where(masked, confidence, -torch.inf)
    written = answer.clone()
    for row in range(len(answer)):
        best = confidence[row].topk(count).indices
        written[row, best] = tokens[row, best]
    return written


def schedule(length: int, steps: int, block: int) -> list[tuple[int, int]]:
    """The end of the active block and the tokens to accept, for every step of the loop."""
    blocks = length // block
    plan = quotas(block, steps // blocks)
    return [(b * block + block, count) for b in range(blocks) for count in plan]


def decode(
    model: Any, question: Question, *, length: int, steps: int, block: int
) -> Iterator[Tensor]:
    """Answer a question, yielding the answer (1, A) after every step."""
    answer = torch.full((1, length), model.backbone.vocab.mask)
    for end, count in schedule(length, steps, block):
        answer = step(model, question, answer, end, count)
        yield answer
