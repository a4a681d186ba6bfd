"""From logits to predictions: a token, its probability and a rank for every masked slot."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffa.samplers.rng import sample_categorical, slot_uniform

Ranking = Literal["confidence", "margin", "entropy", "random", "left_to_right"]


class Predictions(NamedTuple):
    """What one forward pass predicts for R masked slots of B rows.

    Attributes:
        tokens: (B, R) predicted token.
        confidence: (B, R) its probability.
        score: (B, R) rank of the slot: the highest score is accepted first.
        logits: (B, R, V) float32 or better, the mask token at minus infinity.
        log_total: (B, R) log-sum-exp of ``logits``.
    """

    tokens: Tensor
    confidence: Tensor
    score: Tensor
    logits: Tensor
    log_total: Tensor


def apply_cfg(logits: Tensor, cfg_scale: float) -> Tensor:
    """Return u + (cfg_scale + 1)(c - u) of logits (2B, R, V): conditional rows c, then u."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)


def exclude_mask(logits: Tensor, mask_id: int | None) -> Tensor:
    """Widen logits to float32 and exclude the mask token, which would stay undecided."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_id is not None:
        logits[..., mask_id] = -torch.inf
    return logits


def predict(
    logits: Tensor,
    *,
    seeds: Tensor,
    step: Tensor,
    places: Tensor,
    ranking: Ranking = "confidence",
    temperature: float = 0.0,
    confidence_temperature: float = 1.0,
) -> Predictions:
    """Choose a token for every slot and rank the slots.

    Args:
        logits: From ``exclude_mask``, (B, R, V).
        seeds: Seed of each row, (B,).
        step: Steps that each row has taken, (B,).
        places: Index of each slot within the answer, (B, R). Counting from the answer's start
            makes draws independent of the prompt's length.
        ranking: What ``score`` is.
        temperature: 0 takes the most likely token.
        confidence_temperature: Temperature of the probabilities.
    """
    if confidence_temperature != 1.0:
        logits, temperature = (
            logits / confidence_temperature,
            temperature / confidence_temperature,
        )
    best, tokens = logits.max(dim=-1)
    log_total = logits.logsumexp(dim=-1)
    if temperature:
        draws = slot_uniform(seeds, step, places, stream=1)
        tokens = sample_categorical(logits, temperature, draws)
        best = logits.gather(-1, tokens[..., None])[..., 0]
    confidence = (best - log_total).exp()
    score = confidence
    if ranking == "random":
        score = slot_uniform(seeds, step, places, stream=2)
    elif ranking == "left_to_right":
        score = -places.to(confidence.dtype)
    elif ranking == "margin":  # p(first) - p(second), arXiv 2502.06768
        top = (logits.topk(2, dim=-1).values - log_total[..., None]).exp()
        score = top[..., 0] - top[..., 1]
    elif ranking == "entropy":
        score = -entropy_of(logits, log_total)
    return Predictions(tokens, confidence, score, logits, log_total)


def entropy_of(logits: Tensor, log_total: Tensor) -> Tensor:
    """Return the entropy (B, R) in nats of logits (B, R, V) with log-sum-exp (B, R)."""
    log_probs = logits - log_total[..., None]
    # 0 log 0 = 0: the clamp keeps minus infinity from making it NaN.
    return -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(dim=-1)


def token_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the probability (B, R) of given tokens (B, R) under logits (B, R, V)."""
    own = logits.gather(-1, tokens[..., None])[..., 0]
    return (own - logits.logsumexp(dim=-1)).exp()
