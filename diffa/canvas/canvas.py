"""The canvas: prompts and answers of a batch of rows, as the backbone reads them.

One row, with P slots for the prompt and A for the answer::

    slot      0 ...             P-1   P ...        P+A-1   P+A ...
    content   text audio text  pad    answer, masks        scratch slots (drafts)
    position  0 1 2 ...        any    n n+1 ...            set by fill_scratch

A slot is a column: it has content (an embedding), a RoPE position, a branch and a flag that says
whether it may be attended to. The order of slots carries no meaning, positions do: the answer's
positions continue at the true length n of the row's prompt, so padding between prompt and answer
is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffa.canvas.kv_cache import AttentionContext
from diffa.types import BlockAttention, Embeds, Steady, Vocab

NO_TOKEN = -1  # in ``tokens``: the slot's content is an embedding without a token (audio, padding)
HiddenInputs = Literal["text", "audio", "both"]  # text becomes masks, audio is not attended to


class Canvas:
    """Prompts and answers of a batch of rows as the backbone reads them.

    Args:
        prompt: Embeddings of the prompts, audio included, (B, P, W) with lengths (B,).
        text: Token ids of the prompts, (B, P), ``NO_TOKEN`` where there is audio or padding.
        answer: Tokens the answers begin with, (B, A): masks, or a draft.
        embed: Maps token ids to embeddings of the backbone.
        vocab: The backbone's vocabulary.
        seeds: One seed per row; every random draw for a row derives from it.
        attention: How a block-causal backbone attends. None: all slots attend to all.

    Attributes:
        count: Rows of the batch, B.
        start: Slot of the first answer token, P.
        length: Answer tokens per row, A. With block-causal attention the answers reach to the end
            of their last block.
        surplus: How many of them exceed what was asked for.
        prompt_lengths: True slots of each prompt, (B,).
        stored_blocks: (B,) blocks of each prompt whose keys and values are in the KV cache before
            the first pass (``PrefixCache``). None: no blocks.
        steady: What passes have in common until the sampler sets it again. None: nothing is known.
        tokens: (B, S) token ids, ``NO_TOKEN`` where a slot has none.
        content: (B, S, W) embeddings.
        positions: (B, S) RoPE positions.
        valid: (B, S) bool, the slots that may be attended to. Change it by ``hide`` and ``show``.
        ragged: False while every slot is valid: attention then needs no mask.
        branches: (B, S) branch of each slot (see ``AttentionContext``). None: one branch.
        twins: Whether each row has an unconditional twin; S-shaped tensors then have 2 B rows.
        confidence: (B, A) probability of each answer token when it was written.
    """

    def __init__(
        self,
        prompt: Embeds,
        text: Tensor,
        answer: Tensor,
        *,
        embed: Callable[[Tensor], Tensor],
        vocab: Vocab,
        seeds: Tensor,
        attention: BlockAttention | None = None,
    ) -> None:
        self.vocab = vocab
        self.attention, self.prompt_lengths, self.surplus = attention, prompt.lengths, 0
        self.stored_blocks: Tensor | None = None
        self.steady: Steady | None = None
        if attention is not None:
            width = attention.length
            offset = attention.offset(prompt.lengths, width)
            self.surplus = int((-(offset + answer.shape[1]) % width).max())
            mask = answer.new_full((len(answer), self.surplus), vocab.pad)
            answer = torch.cat([answer, mask if vocab.mask is None else mask.fill_(vocab.mask)], 1)
        self.seeds = seeds
        self.count, self.start = text.shape
        self.length = answer.shape[1]
        self.twins = False
        self.branches: Tensor | None = None
        self._embed = embed
        device = text.device
        prompt_slots = torch.arange(self.start, device=device)
        answer_slots = torch.arange(self.length, device=device)
        self.positions = torch.cat(
            [prompt_slots.expand(self.count, -1), prompt.lengths[:, None] + answer_slots], dim=1
        )
        # Prompts are padded at the end: answers of a batch begin at one slot, at other positions:
        #
        #     slots      0 1 2 3 4 | 5 6 7
        #     row 0      p p p . . | a a a     positions 0 1 2 . . | 3 4 5
        #     row 1      p p p p p | a a a     positions 0 1 2 3 4 | 5 6 7
        filled = prompt_slots < prompt.lengths[:, None]
        self.ragged = not bool(filled.all())
        self.valid = torch.cat([filled, torch.ones_like(answer, dtype=torch.bool)], dim=1)
        # What ``show`` may show again: padding never holds anything.
        self._filled = self.valid
        self.tokens = torch.cat([text, answer], dim=1)
        self.content = torch.cat([prompt.values, embed(answer).to(prompt.values.dtype)], dim=1)
        self.confidence = torch.zeros(self.count, self.length, device=device)

    @property
    def size(self) -> int:
        """Slots of the canvas, scratch included."""
        return self.tokens.shape[1]

    @property
    def answer(self) -> Tensor:
        """The answers as they stand, (B, A)."""
        return self.tokens[: self.count, self.start : self.start + self.length]

    @property
    def audio(self) -> Tensor:
        """Which slots are audio embeddings, (rows, S) bool."""
        return (self.tokens == NO_TOKEN) & self.valid

    def undecided(self) -> Tensor:
        """Return which answer tokens are still masks, (B, A) bool."""
        # A causal backbone has no mask; no token is -2, so everything is decided.
        return torch.eq(self.answer, -2 if self.vocab.mask is None else self.vocab.mask)

    @property
    def requested(self) -> int:
        """Answer tokens per row that were asked for."""
        return self.length - self.surplus

    @property
    def block_origin(self) -> Tensor | None:
        """Position (rows,) from which blocks count; None: position 0."""
        if self.attention is None or not self.attention.from_prompt:
            return None
        return self._for_all_rows(self.prompt_lengths)

    def block_numbers(self, width: int, *, ahead: int = 0) -> Tensor:
        """Return the number (rows, S) of the block of every slot, -1 before the first block.

        Args:
            width: Positions per block.
            ahead: Look so many positions ahead of each slot; -1 gives the slot before it.
        """
        context = AttentionContext(block_origin=self.block_origin)
        return context.blocks((self.positions + ahead).clamp(min=0), width)

    def previous_slots(self, slots: Tensor) -> Tensor:
        """Return the slot (B, K) at the position before each answer slot; -1 stays."""
        last = (self._for_all_rows(self.prompt_lengths)[:, None] - 1).clamp(min=0)
        return torch.where(slots == self.start, last, slots - (slots >= 0).long())

    def hide(self, slots: Tensor) -> None:
        """Hide slots (B, S) bool from attention, in the twins too; they keep what they hold."""
        self.valid = self.valid & ~self._for_all_rows(slots)
        self.ragged = True

    def show(self, slots: Tensor) -> None:
        """Show slots (B, S) bool again, in the twins too; padding stays hidden."""
        self.valid = self.valid | (self._for_all_rows(slots) & self._filled)

    def mean_log_probs(self) -> list[float]:
        """Return the mean log-probability of each row's answer, up to its first EOS."""
        answer, confidence = (x[:, : self.requested] for x in (self.answer, self.confidence))
        # The first EOS counts: ending is a decision too. What follows is padding.
        ends = (answer == self.vocab.eos).cumsum(1)
        counted = (ends == 0) | ((ends == 1) & (answer == self.vocab.eos))
        logs = confidence.clamp(min=1e-30).log() * counted
        means: list[float] = (logs.sum(1) / counted.sum(1).clamp(min=1)).tolist()
        return means

    def write(self, slots: Tensor, tokens: Tensor, confidence: Tensor | None = None) -> None:
        """Write ``tokens`` (B, K) into ``slots`` (B, K) where the slot is not -1, twins included.

        Args:
            slots: Slots of the canvas, -1 for padding.
            tokens: Their new tokens.
            confidence: Probability of each token, (B, K), kept for those of the answer.
        """
        if not slots.numel():
            return
        # ``scatter_`` needs a slot for padding too: it repeats the row's first write. A row without
        # any writes back what it holds.
        padding, first = slots < 0, first_index(slots)
        source = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
        source = torch.where(padding, first, source)
        at = slots.gather(1, source)
        active = ~padding.all(dim=1, keepdim=True)
        # Inactive rows need some index to gather from; slot 0 exists.
        at = torch.where(active, at, 0)
        self._put(at, active, tokens.gather(1, source))
        if confidence is not None:
            # Scratch slots hold drafts, which have no confidence to keep.
            inside = (at >= self.start) & (at < self.start + self.length) & active
            at = (at - self.start).clamp(0, self.length - 1)
            new = confidence.gather(1, source).to(self.confidence.dtype)
            new = torch.where(inside, new, self.confidence.gather(1, at))
            self.confidence.scatter_(1, at, new)

    def _put(self, at: Tensor, active: Tensor, tokens: Tensor) -> None:
        """Write tokens (B, K) and their embeddings at slots ``at`` of the ``active`` rows."""
        at, active, tokens = map(self._for_all_rows, (at, active, tokens))
        self.tokens.scatter_(1, at, torch.where(active, tokens, self.tokens.gather(1, at)))
        # (B, K) -> (B, K, W): one embedding per written slot.
        wide = at[:, :, None].expand(-1, -1, self.content.shape[2])
        new = self._embed(torch.where(active, tokens, 0)).to(self.content.dtype)
        new = torch.where(active[:, :, None], new, self.content.gather(1, wide))
        self.content.scatter_(1, wide, new)

    def fill(self, where: Tensor, token: int) -> None:
        """Write a token into the answer where ``where`` (B, A) is true; a mask has confidence 0."""
        answer = slice(self.start, self.start + self.length)
        self.confidence.masked_fill_(where, 0.0 if token == self.vocab.mask else 1.0)
        where = self._for_all_rows(where)
        embedded = self._embed(self.tokens.new_full((1,), token))
        self.tokens[:, answer].masked_fill_(where, token)
        content = self.content[:, answer]
        content.copy_(torch.where(where[:, :, None], embedded.to(content.dtype), content))

    def add_unconditional(self, hide: HiddenInputs) -> None:
        """Add the unconditional twin of every row, for classifier-free guidance.

        From then on ``denoise`` returns logits of twice as many rows: the rows, then their twins.

        Args:
            hide: ``text`` masks the prompt's tokens and keeps the audio (LLaDA's guidance, used
                by DIFFA), ``audio`` hides the audio and keeps the text, ``both`` does both.
        """
        if self.twins:
            raise ValueError("this canvas has its unconditional branch already")
        audio = self.audio
        content, valid, filled = self.content.clone(), self.valid.clone(), self._filled
        if hide in ("text", "both"):
            columns = torch.arange(self.size, device=valid.device) < self.start
            # LLaDA's unconditional prompt is all masks, of the same length.
            mask = torch.tensor([self.vocab.mask], device=valid.device)
            content[(self.tokens != NO_TOKEN) & columns] = self._embed(mask).to(content.dtype)
        if hide in ("audio", "both"):
            # Hidden, not removed: positions behind the audio stay those of the row.
            valid, filled = valid & ~audio, filled & ~audio
            self.ragged = self.ragged or bool(audio.any())
        self.content = torch.cat([self.content, content])
        self.valid = torch.cat([self.valid, valid])
        self._filled = torch.cat([self._filled, filled])
        self.twins = True
        # Twins share what decoding writes; only content and validity of the prompt differ.
        self.tokens = self._for_all_rows(self.tokens)
        self.positions = self._for_all_rows(self.positions)
        self.branches = None if self.branches is None else self._for_all_rows(self.branches)

    def add_scratch(self, count: int, *, branch: int) -> Tensor:
        """Add ``count`` slots for drafts in a branch of their own and return their indices.

        They are hidden until ``fill_scratch``; slots of branch 0 never attend to them.
        """
        rows, first = len(self.tokens), self.size
        pad = self.tokens.new_full((rows, count), self.vocab.pad)
        hidden = torch.zeros_like(pad, dtype=torch.bool)
        if self.branches is None:
            # Branch 0 is the text itself; a draft sees branch 0 and its own.
            self.branches = torch.zeros_like(self.tokens)
        self.branches = torch.cat([self.branches, torch.full_like(pad, branch)], dim=1)
        self.tokens = torch.cat([self.tokens, pad], dim=1)
        self.positions = torch.cat([self.positions, torch.zeros_like(pad)], dim=1)
        self.valid = torch.cat([self.valid, hidden], dim=1)
        self._filled = torch.cat([self._filled, hidden], dim=1)
        content = self.content.new_zeros(rows, count, self.content.shape[2])
        self.content = torch.cat([self.content, content], dim=1)
        self.ragged = True
        return torch.arange(first, first + count, device=pad.device)

    def fill_scratch(self, slots: Tensor, valid: Tensor, tokens: Tensor, positions: Tensor) -> None:
        """Fill scratch ``slots`` (K,) of every row, (B, K) each; those not ``valid`` are hidden."""
        self.write(slots.expand(self.count, -1), tokens)
        self.positions[:, slots] = self._for_all_rows(positions)
        self.valid[:, slots] = self._for_all_rows(valid)

    def _for_all_rows(self, values: Tensor) -> Tensor:
        """Repeat values of the B rows for their twins."""
        return values.repeat(2, *[1] * (values.dim() - 1)) if self.twins else values


def insert_audio(
    prompts: Sequence[Tensor],
    audio: Sequence[Tensor | None],
    audio_at: Sequence[int],
    embed: Callable[[Tensor], Tensor],
) -> tuple[Embeds, Tensor]:
    """Insert each row's audio embeddings (N, W) into its prompt (L,) before an index.

    Returns:
        Embeddings of the rows (B, P, W), and their token ids (B, P), ``NO_TOKEN`` where there is
        audio or padding.
    """
    values, ids = [], []
    for tokens, embeds, at in zip(prompts, audio, audio_at, strict=True):
        words = embed(tokens)
        if embeds is not None:
            words = torch.cat([words[:at], embeds.to(words.dtype), words[at:]])
            # Audio slots have no token: NO_TOKEN keeps them apart from every id.
            gap = tokens.new_full((len(embeds),), NO_TOKEN)
            tokens = torch.cat([tokens[:at], gap, tokens[at:]])
        values.append(words)
        ids.append(tokens)
    lengths = torch.tensor([len(row) for row in ids], device=ids[0].device)
    padded = torch.nn.utils.rnn.pad_sequence
    return Embeds(padded(values, True), lengths), padded(ids, True, padding_value=NO_TOKEN)


def repeat_first(slots: Tensor) -> Tensor:
    """Replace -1 in slots (B, K) by the row's first slot: the same entry is computed twice."""
    return torch.where(slots < 0, slots.gather(1, first_index(slots)), slots)


def first_index(slots: Tensor) -> Tensor:
    """Return the index (B, 1) of each row's first slot that is not -1."""
    return (slots >= 0).int().argmax(dim=1, keepdim=True)
