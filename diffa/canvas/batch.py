"""Rows of a batch on their way into a canvas: checked, counted, split and joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffa.canvas.canvas import Canvas, interleave
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import AudioError, SpecError
from diffa.types import Embeds, Vocab

RowTensors = Tensor | Sequence[Tensor | None] | None


class CanvasInputs(NamedTuple):
    """What a batch is asked, each list with an entry per row.

    Attributes:
        prompts: token ids (L,).
        waves: waveforms (S,), or None.
        places: index in the prompt before which the audio goes.
        seeds: of the sampler's draws.
        answer: what the answers begin with, (B, A).
    """

    prompts: list[Tensor]
    waves: list[Tensor | None]
    places: list[int]
    seeds: list[int]
    answer: Tensor


def validate_inputs(
    vocab: Vocab,
    prompt: Tensor | Sequence[Tensor],
    audio: RowTensors,
    audio_at: int | Sequence[int] | None,
    max_tokens: int,
    seeds: int | Sequence[int] | None,
    draft: RowTensors,
) -> CanvasInputs:
    """Check the arguments of ``Model.generate``, and give every row its own.

    Raises:
        SpecError: they are out of range, or do not fit together.
    """
    if max_tokens < 1:
        raise SpecError(f"max_tokens must be at least 1, got {max_tokens}")
    given = [prompt] if isinstance(prompt, Tensor) else list(prompt)
    prompts = [validate_tokens(tokens, vocab) for tokens in given]
    waves = per_row_tensors(audio, len(prompts), "recordings")
    places = per_row_ints("audio_at", audio_at, len(prompts))
    for tokens, at in zip(prompts, places, strict=True):
        if not 0 <= at <= len(tokens):
            raise SpecError(f"audio_at is {at}, but the prompt has {len(tokens)} tokens")
    drawn = per_row_ints("seeds", seeds, len(prompts))
    answer = initial_answer(per_row_tensors(draft, len(prompts), "drafts"), max_tokens, vocab)
    return CanvasInputs(prompts, waves, places, drawn, answer)


def make_canvas(backbone: Any, asked: CanvasInputs, heard: Sequence[Tensor | None]) -> Canvas:
    """Make the canvas of a batch, where the backbone is, with embeddings (N, W) of its audio."""
    device = next(backbone.parameters()).device
    prompts = [tokens.to(device) for tokens in asked.prompts]
    embeds, text = interleave(prompts, heard, asked.places, backbone.embed)
    answer, seeds = asked.answer.to(device), torch.tensor(asked.seeds, device=device)
    return Canvas(embeds, text, answer, embed=backbone.embed, vocab=backbone.vocab, seeds=seeds)


def per_row_tensors(given: RowTensors, count: int, what: str) -> list[Tensor | None]:
    """Return one tensor or None per row from a tensor, a list of them, or None.

    Raises:
        SpecError: the list has another length.
    """
    if given is None:
        return [None] * count
    if hasattr(given, "__array__"):  # a waveform of numpy's is one row too
        given = torch.as_tensor(given)
    rows: list[Tensor | None] = [given] if isinstance(given, Tensor) else list(given)
    if len(rows) != count:
        raise SpecError(f"{count} prompts but {len(rows)} {what}")
    return rows


def per_row_ints(name: str, value: int | Sequence[int] | None, rows: int) -> list[int]:
    """Return one value per row from one value, a list of them, or None for zeros."""
    if value is None or isinstance(value, int):
        return [value or 0] * rows
    values = [int(v) for v in value]
    if len(values) != rows:
        raise SpecError(f"{name} has {len(values)} values for {rows} prompts")
    return values


def validate_tokens(tokens: Tensor, vocab: Vocab) -> Tensor:
    """Return token ids (L,) as int64, or say what is wrong with them."""
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        shape = tuple(tokens.shape)
        raise SpecError(f"a prompt is token ids (L,), got {tokens.dtype} of shape {shape}")
    if len(tokens) and bool(((tokens < 0) | (tokens >= vocab.size)).any()):
        raise SpecError(f"a prompt has token ids outside the vocabulary of {vocab.size}")
    return tokens.long()


def initial_answer(drafts: Sequence[Tensor | None], length: int, vocab: Vocab) -> Tensor:
    """What the answers begin with, (B, A): the rows' drafts, then masks.

    Raises:
        SpecError: a draft is too long, or the backbone writes every token itself.
    """
    mask = vocab.pad if vocab.mask is None else vocab.mask
    answer = torch.full((len(drafts), length), mask)
    for row, tokens in enumerate(drafts):
        if tokens is None:
            continue
        if vocab.mask is None:
            raise SpecError("a draft needs a masked backbone: a causal one writes every token")
        if len(tokens) > length:
            raise SpecError(f"a draft of {len(tokens)} tokens is longer than {length}")
        answer[row, : len(tokens)] = validate_tokens(tokens, vocab)
    return answer


def check_context_length(
    prompt: int, audio: int, answer: int, seconds: float, most: int | None
) -> None:
    """Refuse a row that is longer than the backbone's context of ``most`` slots.

    Raises:
        AudioError: the row has audio, which can be cut; otherwise a SpecError.
    """
    total = prompt + audio + answer
    if most is None or total <= most:
        return
    kind = AudioError if audio else SpecError
    raise kind(
        f"{prompt} prompt tokens, {audio} audio embeddings ({seconds:.1f} s) and {answer} answer "
        f"tokens are {total}, but the backbone reads {most}: cut the recording into shorter "
        "pieces or lower max_tokens"
    )


def unpad_embeds(embeds: Embeds) -> list[Tensor]:
    """Each row's own embeddings (N, W), without padding."""
    pairs = zip(embeds.values, embeds.lengths.tolist(), strict=True)
    return [values[:length] for values, length in pairs]


def concat_embeds(parts: Sequence[Embeds]) -> Embeds:
    """Concatenate embeddings row by row: part after part, without the padding between."""
    if len(parts) == 1:
        return parts[0]
    lengths = torch.stack([part.lengths for part in parts]).sum(dim=0)
    rows = [torch.cat(row) for row in zip(*(unpad_embeds(part) for part in parts), strict=True)]
    return Embeds(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)


def forward_rows(
    backbone: Any,
    tokens: Tensor,
    lengths: Tensor,
    heard: Sequence[Tensor | None] | None = None,
    audio_at: Tensor | None = None,
) -> Tensor:
    """Let a backbone read whole rows and return the hidden state of every token, (B, L, W).

    Args:
        backbone: embeds the tokens and reads the rows, each from position 0.
        tokens: prompts with their answers, (B, L).
        lengths: true tokens per row, (B,); what is behind them is seen by nothing.
        heard: embeddings (N, W) of each row's audio, or None; their states are left out.
        audio_at: index before which each row's audio goes, (B,); 0 where None.
    """
    at = torch.zeros_like(lengths) if audio_at is None else audio_at
    sounds = [None] * len(tokens) if heard is None else list(heard)
    rows = [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]
    embeds, text = interleave(rows, sounds, at.tolist(), backbone.embed)
    positions = torch.arange(text.shape[1], device=text.device)
    valid = positions < embeds.lengths[:, None]
    context = AttentionContext(valid=None if bool(valid.all()) else valid)
    hidden: Tensor = backbone(embeds.values, positions.expand(text.shape), context)
    return gather_slots(hidden, text_slots(tokens, sounds, at))


def text_slots(tokens: Tensor, heard: Sequence[Tensor | None], at: Tensor) -> Tensor:
    """Return the slot of every token of rows (B, L) whose audio goes before index ``at`` (B,).

    Token i of a row with n audio embeddings stands at i before them, and at i + n behind them.
    """
    counts = [0 if sound is None else len(sound) for sound in heard]
    index = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    behind = index >= at[:, None]
    return index + torch.tensor(counts, device=tokens.device)[:, None] * behind


def gather_slots(hidden: Tensor, slots: Tensor) -> Tensor:
    """Return states (B, S, W) at slots (B, L), (B, L, W); padding gets any."""
    slots = slots.clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, slots[:, :, None].expand(-1, -1, hidden.shape[2]))
