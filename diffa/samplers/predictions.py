"""Reading logits: tokens, probabilities and scores from one pass in float32."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffa.samplers.rng import categorical, uniform

Order = Literal["confidence", "margin", "entropy", "random"]


class Predictions(NamedTuple):
    """What one forward says of the asked slots.

    Attributes:
        tokens: the chosen ones, (B, R).
        confidence: their probability, (B, R).
        score: what ranks the slots; higher comes first, (B, R).
        logits: in float32 or better, the mask excluded, (B, R, V).
        total: their log-sum-exp, (B, R).
    """

    tokens: Tensor
    confidence: Tensor
    score: Tensor
    logits: Tensor
    total: Tensor


def guided(logits: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance: u + (strength + 1)(c - u) from logits (2B, R, V) of c, then u."""
    given, without = logits.chunk(2)
    return without + (strength + 1) * (given - without)


def clean(logits: Tensor, mask: int | None) -> Tensor:
    """Widen logits to float32 and exclude the mask: accepted, it would stay undecided."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        logits[..., mask] = -torch.inf
    return logits


def read(
    logits: Tensor,
    *,
    seeds: Tensor,
    step: Tensor,
    places: Tensor,
    ranking: Order = "confidence",
    temperature: float = 0.0,
) -> Predictions:
    """Choose a token for every slot of clean logits (B, R, V), and rank the slots.

    ``places`` (B, R) count from the answer's start, so that draws do not depend on the prompt;
    ``seeds`` and ``step`` are (B,).
    """
    best, tokens = logits.max(dim=-1)
    total = logits.logsumexp(dim=-1)
    if temperature:
        tokens = categorical(logits, temperature, uniform(seeds, step, places, stream=1))
        best = logits.gather(-1, tokens[..., None])[..., 0]
    confidence = (best - total).exp()
    score = confidence
    if ranking == "random":
        score = uniform(seeds, step, places, stream=2)
    elif ranking == "margin":
        top = (logits.topk(2, dim=-1).values - total[..., None]).exp()
        score = top[..., 0] - top[..., 1]
    elif ranking == "entropy":
        score = -entropy(logits, total)
    return Predictions(tokens, confidence, score, logits, total)


def entropy(logits: Tensor, total: Tensor) -> Tensor:
    """Entropy (B, R) in nats of logits (B, R, V) with log-sum-exp (B, R)."""
    logs = logits - total[..., None]
    return -(logs.exp() * logs.clamp(min=-1e4)).sum(dim=-1)
