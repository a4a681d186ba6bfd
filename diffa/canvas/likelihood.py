"""Likelihood of given answers: a Monte-Carlo bound, exact for answers of one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffa.canvas.batch import forward_embeds
from diffa.canvas.canvas import insert_audio
from diffa.canvas.training import forward_blocks
from diffa.errors import DecodingError, SpecError, check_at_least
from diffa.types import Backbone, block_attention

_MAX_LOGITS = 1 << 24  # logits held at once: 64 MiB in float32


class ChoiceScores(NamedTuple):
    """Log-likelihoods of choices given a question.

    Attributes:
        values: (C,) in nats; a lower bound for answers of several tokens.
        best: Index of the largest.
        lengths: (C,) tokens of each choice, to divide by where short ones should not win.
        num_forwards: Forward passes of the backbone.
    """

    values: Tensor
    best: int
    lengths: Tensor
    num_forwards: int


class TokenQuery(NamedTuple):
    """A token whose log-probability counts: its row and position there, its choice and weight."""

    row: int
    position: int
    token: int
    choice: int
    weight: float


def score_choices(
    backbone: Backbone,
    prompt: Tensor,
    audio_embeds: Tensor | None,
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
    draws for every choice; a block-causal one reads each block after the choice's own tokens. A
    causal backbone gives the likelihood itself.

    Raises:
        SpecError: No choices, an empty one, or numbers out of their range.
        DecodingError: The log-probabilities are not finite.
    """
    if not choices or any(len(choice) == 0 for choice in choices):
        raise SpecError("there must be choices to score, of at least one token each")
    check_at_least(1, samples=samples, batch=batch)
    mask, in_blocks = backbone.vocab.mask, block_attention(backbone) is not None
    if backbone.decoding == "masked" and mask is not None:
        rows, queries = masked_queries(
            choices, mask, samples=samples, seed=seed, shared=not in_blocks
        )
        shift = 0
    else:
        rows, queries = causal_queries(choices)
        shift = 1  # a causal model's state at slot i predicts the token at slot i + 1
    first_slot = len(prompt) + (0 if audio_embeds is None else len(audio_embeds)) - shift
    values = torch.zeros(len(choices), dtype=torch.float64)
    starts = range(0, len(rows), batch)
    for start in starts:
        part = rows[start : start + batch]
        own = [q for q in queries if start <= q.row < start + len(part)]
        whole = [torch.cat([prompt, row.to(prompt.device)]) for row in part]
        audio = [audio_embeds] * len(part), [audio_at] * len(part)
        if in_blocks:
            owners = {query.row: choices[query.choice] for query in own}
            clean = [owners[start + i].to(prompt.device) for i in range(len(part))]
            hidden = _forward_in_blocks(backbone, prompt, whole, clean, *audio)
            logs = _log_probs(backbone.head, hidden, own, start, len(prompt))
        else:
            embeds, _ = insert_audio(whole, *audio, backbone.embed)
            hidden = forward_embeds(backbone, embeds)
            logs = _log_probs(backbone.head, hidden, own, start, first_slot)
        weights = torch.tensor([q.weight for q in own], dtype=torch.float64)
        numbers = torch.tensor([q.choice for q in own])
        values.index_add_(0, numbers, logs.double().cpu() * weights)
    lengths = torch.tensor([len(choice) for choice in choices])
    return ChoiceScores(values, int(values.argmax()), lengths, len(starts))


def _forward_in_blocks(
    backbone: Backbone,
    prompt: Tensor,
    rows: Sequence[Tensor],
    choices: Sequence[Tensor],
    audio_embeds: Sequence[Tensor | None],
    audio_at: Sequence[int],
) -> Tensor:
    """Return the states (B, L, W) that predict the tokens of masked rows, each block of a row read
    after the blocks of its choice before."""
    pad = torch.nn.utils.rnn.pad_sequence
    clean = pad([torch.cat([prompt, choice]) for choice in choices], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=prompt.device)
    index = torch.arange(clean.shape[1], device=prompt.device)
    answer = (index >= len(prompt)) & (index < lengths[:, None])
    at = torch.tensor(audio_at, device=prompt.device)
    noisy = pad(list(rows), batch_first=True)
    return forward_blocks(backbone, noisy, lengths, audio_embeds, at, clean=clean, answer=answer)


def masked_queries(
    choices: Sequence[Tensor], mask: int, *, samples: int, seed: int, shared: bool = True
) -> tuple[list[Tensor], list[TokenQuery]]:
    """Mask every choice ``samples`` times; return the distinct rows and their masked tokens.

    Rows that are alike are one row, of several choices too if it may be ``shared``. The numbers of
    masks are stratified over the samples. They and the order of masking are the same draws for all
    choices, so that the noise of two choices cancels.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(len(choice) for choice in choices)
    draws = torch.rand(samples, longest, generator=generator)
    levels = (torch.arange(samples) + torch.rand(samples, generator=generator)) / samples
    rows: dict[tuple[int, tuple[int, ...]], int] = {}
    queries = []
    for number, choice in enumerate(choices):
        size = len(choice)
        repeats = 1 if size == 1 else samples
        for sample in range(repeats):
            count = min(size, int(levels[sample] * size) + 1)
            masked = draws[sample, :size].argsort()[:count].tolist()
            tokens = choice.tolist()
            for index in masked:
                tokens[index] = mask
            row = rows.setdefault((0 if shared else number, tuple(tokens)), len(rows))
            weight = size / count / repeats
            queries += [TokenQuery(row, i, int(choice[i]), number, weight) for i in masked]
    return [torch.tensor(row) for _, row in rows], queries


def causal_queries(choices: Sequence[Tensor]) -> tuple[list[Tensor], list[TokenQuery]]:
    """Return every choice as it is, each of its tokens with weight 1."""
    queries = [
        TokenQuery(number, index, int(token), number, 1.0)
        for number, choice in enumerate(choices)
        for index, token in enumerate(choice)
    ]
    return list(choices), queries


def _log_probs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    queries: Sequence[TokenQuery],
    first_row: int,
    first_slot: int,
) -> Tensor:
    """Return the log-probability (Q,) in float32 of every query's token."""
    rows = torch.tensor([q.row - first_row for q in queries], device=hidden.device)
    slots = torch.tensor([q.position + first_slot for q in queries], device=hidden.device)
    tokens = torch.tensor([q.token for q in queries], device=hidden.device)
    parts = []
    for part in _slices(len(queries), head(hidden[:1, :1]).shape[-1]):
        logits = head(hidden[rows[part], slots[part]]).float()
        known = logits.gather(1, tokens[part, None])[:, 0]
        parts.append(known - logits.logsumexp(dim=1))
    values = torch.cat(parts)
    if not bool(values.isfinite().all()):
        raise DecodingError("a choice's log-probability is not finite: are the weights damaged?")
    return values


def _slices(count: int, vocab_size: int) -> Iterator[slice]:
    step = max(1, _MAX_LOGITS // vocab_size)
    return (slice(start, start + step) for start in range(0, count, step))
