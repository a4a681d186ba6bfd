"""How likely a model finds given answers: a Monte-Carlo bound, exact for answers of one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.canvas.canvas import interleave
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import SpecError

_LOGITS = 1 << 24  # logits held at once: 64 MiB in float32


class ChoiceScores(NamedTuple):
    """Log-likelihoods of choices given a question.

    Attributes:
        values: in nats, (C,); a lower bound for answers of several tokens.
        best: index of the largest.
        lengths: tokens of each choice, (C,), to divide by where short ones should not win.
        forwards: calls of the backbone.
    """

    values: Tensor
    best: int
    lengths: Tensor
    num_forwards: int


class TokenQuery(NamedTuple):
    """One token to score: its row, where it stands in the answer, and its weight in a choice."""

    row: int
    place: int
    token: int
    choice: int
    weight: float


def score_choices(
    backbone: Any,
    prompt: Tensor,
    heard: Tensor | None,
    audio_at: int,
    choices: Sequence[Tensor],
    *,
    samples: int,
    seed: int,
    batch: int,
) -> ChoiceScores:
    """Score choices of token ids (A,) after a prompt (L,) with audio embeddings (N, W) or None.

    A masked backbone gives the bound of LLaDA (arXiv 2502.09992, equation 6): l of A tokens are
    masked, l uniform, and A / l times their log-probability is averaged over ``samples``, the same
    draws for every choice. A causal one gives the likelihood itself.

    Raises:
        SpecError: no choices, an empty one, or numbers out of their range.
    """
    if not choices or any(len(choice) == 0 for choice in choices):
        raise SpecError("there must be choices to score, of at least one token each")
    for name, value in {"samples": samples, "batch": batch}.items():
        if value < 1:
            raise SpecError(f"{name} must be at least 1, got {value}")
    masked = backbone.decoding == "masked"
    if masked:
        rows, queries = masked_queries(choices, backbone.vocab.mask, samples=samples, seed=seed)
    else:
        rows, queries = causal_queries(choices)
    values = torch.zeros(len(choices), dtype=torch.float64)
    num_forwards = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        mine = [q for q in queries if start <= q.row < start + len(part)]
        hidden = _hidden(backbone, prompt, heard, audio_at, part)
        ahead = len(prompt) + (0 if heard is None else len(heard)) - (0 if masked else 1)
        logs = _logs(backbone.head, hidden, [q._replace(row=q.row - start) for q in mine], ahead)
        weights = torch.tensor([q.weight for q in mine], dtype=torch.float64)
        owners = torch.tensor([q.choice for q in mine])
        values.index_add_(0, owners, logs.double().cpu() * weights)
        num_forwards += 1
    lengths = torch.tensor([len(choice) for choice in choices])
    return ChoiceScores(values, int(values.argmax()), lengths, num_forwards)


def masked_queries(
    choices: Sequence[Tensor], mask: int, *, samples: int, seed: int
) -> tuple[list[Tensor], list[TokenQuery]]:
    """Mask every choice ``samples`` times; rows that come out alike are kept once.

    The counts are stratified over the samples, and both they and the order of masking are the
    same draws for all choices.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(len(choice) for choice in choices)
    draws = torch.rand(samples, longest, generator=generator)
    levels = (torch.arange(samples) + torch.rand(samples, generator=generator)) / samples
    rows: dict[tuple[int, ...], int] = {}
    queries = []
    for index, choice in enumerate(choices):
        size = len(choice)
        many = 1 if size == 1 else samples
        for sample in range(many):
            count = min(size, int(levels[sample] * size) + 1)
            hidden = draws[sample, :size].argsort()[:count].tolist()
            tokens = choice.tolist()
            for place in hidden:
                tokens[place] = mask
            row = rows.setdefault(tuple(tokens), len(rows))
            weight = size / count / many
            queries += [
                TokenQuery(row, place, int(choice[place]), index, weight) for place in hidden
            ]
    return [torch.tensor(row) for row in rows], queries


def causal_queries(choices: Sequence[Tensor]) -> tuple[list[Tensor], list[TokenQuery]]:
    """Every choice as it is, each token to be read off the slot before it."""
    queries = [
        TokenQuery(index, place, int(token), index, 1.0)
        for index, choice in enumerate(choices)
        for place, token in enumerate(choice)
    ]
    return list(choices), queries


def _hidden(
    backbone: Any, prompt: Tensor, heard: Tensor | None, at: int, rows: Sequence[Tensor]
) -> Tensor:
    """Hidden states (B, S, W) of a prompt followed by each of the rows."""
    whole = [torch.cat([prompt, row.to(prompt.device)]) for row in rows]
    embeds, text = interleave(whole, [heard] * len(rows), [at] * len(rows), backbone.embed)
    positions = torch.arange(text.shape[1], device=text.device)
    valid = positions < embeds.lengths[:, None]
    context = AttentionContext(valid=None if bool(valid.all()) else valid)
    hidden: Tensor = backbone(embeds.values, positions.expand(text.shape), context)
    return hidden


def _logs(
    head: Callable[[Tensor], Tensor], hidden: Tensor, queries: Sequence[TokenQuery], ahead: int
) -> Tensor:
    """Log-probability (Q,) in float32 of every query's token."""
    rows = torch.tensor([q.row for q in queries], device=hidden.device)
    slots = torch.tensor([q.place + ahead for q in queries], device=hidden.device)
    tokens = torch.tensor([q.token for q in queries], device=hidden.device)
    found = []
    for part in _parts(len(queries), head(hidden[:1, :1]).shape[-1]):
        logits = head(hidden[rows[part], slots[part]]).float()
        known = logits.gather(1, tokens[part, None])[:, 0]
        found.append(known - logits.logsumexp(dim=1))
    return torch.cat(found)


def _parts(count: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, _LOGITS // vocabulary)
    return (slice(start, start + step) for start in range(0, count, step))
