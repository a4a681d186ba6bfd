"""Rows of a batch on their way into a canvas: validated, padded, embedded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffa.canvas.canvas import Canvas, insert_audio
from diffa.canvas.kv_cache import AttentionContext
from diffa.errors import AudioError, SpecError, show
from diffa.types import Backbone, Embeds, Vocab, block_attention

if TYPE_CHECKING:
    from diffa.types import BackboneModule

RowTensors = Tensor | Sequence[Tensor | None] | None

_MAX_TOKENS = 2**20  # of an answer, far beyond every context


class CanvasInputs(NamedTuple):
    """What a canvas is made of, each list with an entry per row.

    Attributes:
        prompts: Token ids (L,).
        audio: Waveforms (S,), or None.
        audio_at: Index in the prompt before which the audio goes.
        seeds: Seeds of the sampler's draws.
        answer: Tokens the answers begin with, (B, A).
    """

    prompts: list[Tensor]
    audio: list[Tensor | None]
    audio_at: list[int]
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
    """Validate the arguments of ``Model.generate``, and give every row its own.

    Raises:
        SpecError: The arguments are out of range, or do not fit together.
    """
    if max_tokens < 1:
        raise SpecError(f"max_tokens must be at least 1, got {show(max_tokens)}")
    if max_tokens > _MAX_TOKENS:
        raise SpecError(f"max_tokens must be at most {_MAX_TOKENS:,}, got {show(max_tokens)}")
    rows = [prompt] if isinstance(prompt, Tensor) else list(prompt)
    prompts = [validate_tokens(tokens, vocab) for tokens in rows]
    places = per_row_ints("audio_at", audio_at, len(prompts))
    for tokens, at in zip(prompts, places, strict=True):
        if not 0 <= at <= len(tokens):
            raise SpecError(f"audio_at is {at}, but the prompt has {len(tokens)} tokens")
    drafts = per_row_tensors(draft, len(prompts), "drafts")
    return CanvasInputs(
        prompts,
        per_row_tensors(audio, len(prompts), "recordings"),
        places,
        per_row_ints("seeds", seeds, len(prompts)),
        initial_answer(drafts, max_tokens, vocab),
    )


def make_canvas(
    backbone: BackboneModule, inputs: CanvasInputs, audio_embeds: Sequence[Tensor | None]
) -> Canvas:
    """Return the canvas of a batch on the backbone's device.

    Args:
        backbone: Embeds the tokens.
        inputs: What the canvas is made of.
        audio_embeds: Embeddings (N, W) of each row's audio, or None.
    """
    # The encoder may be elsewhere: everything moves to the backbone once, here.
    device = next(backbone.parameters()).device
    prompts = [tokens.to(device) for tokens in inputs.prompts]
    embeds, text = insert_audio(prompts, audio_embeds, inputs.audio_at, backbone.embed)
    answer, seeds = inputs.answer.to(device), torch.tensor(inputs.seeds, device=device)
    return Canvas(
        embeds, text, answer, embed=backbone.embed, vocab=backbone.vocab, seeds=seeds,
        attention=block_attention(backbone),
    )  # fmt: skip


def per_row_tensors(values: RowTensors, count: int, name: str) -> list[Tensor | None]:
    """Return one tensor or None per row from a tensor, a list of them, or None.

    Raises:
        SpecError: The list has another length.
    """
    if values is None:
        return [None] * count
    if hasattr(values, "__array__"):  # a waveform of numpy's is one row too
        values = torch.as_tensor(values)
    # One tensor is one row: a batch is a list, since rows differ in length.
    rows: list[Tensor | None] = [values] if isinstance(values, Tensor) else list(values)
    if len(rows) != count:
        raise SpecError(f"{count} prompts but {len(rows)} {name}")
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
    """Return token ids (L,) as int64; raises SpecError where they are none of the vocabulary."""
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        shape = tuple(tokens.shape)
        raise SpecError(f"a prompt is token ids (L,), got {tokens.dtype} of shape {shape}")
    if len(tokens) and bool(((tokens < 0) | (tokens >= vocab.size)).any()):
        raise SpecError(f"a prompt has token ids outside the vocabulary of {vocab.size}")
    return tokens.long()


def initial_answer(drafts: Sequence[Tensor | None], length: int, vocab: Vocab) -> Tensor:
    """Return what the answers begin with, (B, A): the rows' drafts, then masks.

    Raises:
        SpecError: A draft is too long, or the backbone writes every token itself.
    """
    # A causal backbone appends, so its undecided slots hold padding instead of masks.
    answer = torch.full((len(drafts), length), vocab.pad if vocab.mask is None else vocab.mask)
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
    prompt: int, audio: int, answer: int, seconds: float, max_length: int | None
) -> None:
    """Refuse a row of more slots than the backbone can read.

    Raises:
        AudioError: The row has audio, which can be cut; otherwise a SpecError.
    """
    # Every embedding takes a position of the context, audio like text.
    total = prompt + audio + answer
    if max_length is None or total <= max_length:
        return
    kind = AudioError if audio else SpecError
    raise kind(
        f"{prompt} prompt tokens, {audio} audio embeddings ({seconds:.1f} s) and {answer} answer "
        f"tokens are {total}, but the backbone reads {max_length}: cut the recording into shorter "
        "pieces or lower max_tokens"
    )


def unpad_embeds(embeds: Embeds) -> list[Tensor]:
    """Return each row's own embeddings (N, W), without padding."""
    pairs = zip(embeds.values, embeds.lengths.tolist(), strict=True)
    return [values[:length] for values, length in pairs]


def concat_embeds(parts: Sequence[Embeds]) -> Embeds:
    """Concatenate embeddings row by row: part after part, without the padding between."""
    if len(parts) == 1:
        return parts[0]
    lengths = torch.stack([part.lengths for part in parts]).sum(dim=0)
    # Padding between parts would shift the positions of what follows.
    rows = [torch.cat(row) for row in zip(*(unpad_embeds(part) for part in parts), strict=True)]
    return Embeds(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)


def forward_embeds(backbone: Backbone, embeds: Embeds) -> Tensor:
    """Return the hidden states (B, S, W) of whole rows, each from position 0."""
    positions = torch.arange(embeds.values.shape[1], device=embeds.values.device)
    valid = positions < embeds.lengths[:, None]
    # Without padding no mask is built, and the kernel may take its fastest path.
    context = AttentionContext(valid=None if bool(valid.all()) else valid)
    return backbone(embeds.values, positions.expand(valid.shape), context)


def forward_rows(
    backbone: Backbone,
    tokens: Tensor,
    lengths: Tensor,
    audio_embeds: Sequence[Tensor | None] | None = None,
    audio_at: Tensor | None = None,
) -> Tensor:
    """Run a backbone over whole rows and return the hidden state of every token, (B, L, W).

    Args:
        backbone: Embeds the tokens and reads the rows, each from position 0.
        tokens: Prompts with their answers, (B, L).
        lengths: True tokens per row, (B,); nothing attends to what is behind them.
        audio_embeds: Embeddings (N, W) of each row's audio, or None; their states are left out.
        audio_at: Index before which each row's audio goes, (B,). Default: 0.
    """
    at = torch.zeros_like(lengths) if audio_at is None else audio_at
    audio = [None] * len(tokens) if audio_embeds is None else list(audio_embeds)
    rows = [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]
    embeds, _ = insert_audio(rows, audio, at.tolist(), backbone.embed)
    return gather_slots(forward_embeds(backbone, embeds), text_slots(tokens, audio, at))


def text_slots(tokens: Tensor, audio_embeds: Sequence[Tensor | None], audio_at: Tensor) -> Tensor:
    """Return the slot of every token of rows (B, L) whose audio goes before an index (B,).

    Token i of a row with n audio embeddings is at slot i before them, and at i + n behind them.
    """
    counts = [0 if embeds is None else len(embeds) for embeds in audio_embeds]
    index = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    # prompt a b | c d with audio of n before c: slots 0 1 | 2 + n, 3 + n
    behind = index >= audio_at[:, None]
    return index + torch.tensor(counts, device=tokens.device)[:, None] * behind


def gather_slots(hidden: Tensor, slots: Tensor) -> Tensor:
    """Return the states (B, L, W) of slots (B, L) among (B, S, W); padding gets any."""
    # Slots of padding may lie behind the longest row; nobody reads their states.
    slots = slots.clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, slots[:, :, None].expand(-1, -1, hidden.shape[2]))
