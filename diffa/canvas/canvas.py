"""The canvas: prompts and answers of a batch of rows, as the backbone reads them.

A slot is a column of the canvas: first the prompt's (text, audio, text; short rows padded), then
the answer's, then scratch ones. It has content (an embedding), a position for RoPE, a branch and
a flag that says whether it is there at all. Order among slots carries no meaning: positions do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffa.types import Embeds, Vocab

NO_TOKEN = (
    -1
)  # in ``tokens``: the slot's content is an embedding that has no token (audio, padding)
HiddenInputs = Literal["text", "audio", "both"]


class Canvas:
    """Prompts and answers of a batch of rows as the backbone reads them.

    Args:
        prompt: embeddings of the prompts, audio included, (B, P, W) with lengths (B,).
        text: token ids of the prompts, (B, P), ``NO_TOKEN`` where there is audio or padding.
        answer: tokens the answers begin with, (B, A): masks, or a draft.
        embed: token ids -> embeddings of the backbone.
        vocab: the backbone's vocabulary.
        seeds: one seed per row; every random draw for a row derives from it.
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
    ) -> None:
        self.vocab = vocab
        self.seeds = seeds
        self.count, self.start = text.shape
        self.length = answer.shape[1]
        self.twins = False
        self.branch_of: Tensor | None = None
        self._embed = embed
        device = text.device
        ahead = torch.arange(self.start, device=device)
        behind = torch.arange(self.length, device=device)
        self.positions = torch.cat(
            [ahead.expand(self.count, -1), prompt.lengths[:, None] + behind], dim=1
        )
        there = ahead < prompt.lengths[:, None]
        self.ragged = not bool(there.all())
        self.valid = torch.cat([there, torch.ones_like(answer, dtype=torch.bool)], dim=1)
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
        return torch.eq(self.answer, -2 if self.vocab.mask is None else self.vocab.mask)

    def write(self, slots: Tensor, tokens: Tensor, confidence: Tensor | None = None) -> None:
        """Put ``tokens`` (B, K) into ``slots`` (B, K) where the slot is not -1, twins included."""
        if not slots.numel():
            return
        at = first_for_padding(slots)
        use = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
        use = torch.where(slots < 0, first_real(slots), use)
        some = (slots >= 0).any(dim=1, keepdim=True)  # other rows write back what they hold
        at = torch.where(some, at, 0)
        self._put(at, some, tokens.gather(1, use))
        if confidence is not None:
            inside = (at >= self.start) & (at < self.start + self.length) & some
            at = (at - self.start).clamp(0, self.length - 1)
            new = confidence.gather(1, use).to(self.confidence.dtype)
            new = torch.where(inside, new, self.confidence.gather(1, at))
            self.confidence.scatter_(1, at, new)

    def _put(self, at: Tensor, some: Tensor, tokens: Tensor) -> None:
        """Write tokens (B, K) and their embeddings at slots ``at`` of the rows in ``some``."""
        if self.twins:
            at, some, tokens = at.repeat(2, 1), some.repeat(2, 1), tokens.repeat(2, 1)
        self.tokens.scatter_(1, at, torch.where(some, tokens, self.tokens.gather(1, at)))
        wide = at[:, :, None].expand(-1, -1, self.content.shape[2])
        new = self._embed(torch.where(some, tokens, 0)).to(self.content.dtype)
        new = torch.where(some[:, :, None], new, self.content.gather(1, wide))
        self.content.scatter_(1, wide, new)

    def fill(self, where: Tensor, token: int) -> None:
        """Put one token into the answer slots ``where`` (B, A) is true: a mask, or a sure one."""
        answer = slice(self.start, self.start + self.length)
        self.confidence.masked_fill_(where, 0.0 if token == self.vocab.mask else 1.0)
        where = where.repeat(2, 1) if self.twins else where
        embedded = self._embed(torch.tensor([token], device=where.device))
        self.tokens[:, answer].masked_fill_(where, token)
        content = self.content[:, answer]
        content.copy_(torch.where(where[:, :, None], embedded.to(content.dtype), content))

    def branch(self, hide: HiddenInputs) -> None:
        """Add guidance's unconditional twin of every row, with its own prompt and memory.

        ``text`` masks the prompt's tokens and keeps the audio (DIFFA's and LLaDA's guidance),
        ``audio`` hides the audio and keeps the text, ``both`` does both. From then on ``denoise``
        answers for twice as many rows: the given ones, then their twins.
        """
        if self.twins:
            raise ValueError("this canvas has its unconditional branch already")
        spoken = self.audio
        content, valid = self.content.clone(), self.valid.clone()
        if hide in ("text", "both"):
            columns = torch.arange(self.size, device=valid.device) < self.start
            mask = torch.tensor([self.vocab.mask], device=valid.device)
            content[(self.tokens != NO_TOKEN) & columns] = self._embed(mask).to(content.dtype)
        if hide in ("audio", "both"):
            valid &= ~spoken
            self.ragged = self.ragged or bool(spoken.any())
        self.content, self.valid = (
            torch.cat([self.content, content]),
            torch.cat([self.valid, valid]),
        )
        self.tokens, self.positions = self.tokens.repeat(2, 1), self.positions.repeat(2, 1)
        if self.branch_of is not None:
            self.branch_of = self.branch_of.repeat(2, 1)
        self.twins = True

    def scratch(self, count: int, *, branch: int) -> Tensor:
        """Add ``count`` slots for drafts in a branch of their own and return their indices.

        They are absent until ``place`` fills them; slots of branch 0 never see them.
        """
        rows, first = len(self.tokens), self.size
        extra = self.tokens.new_full((rows, count), self.vocab.pad)
        if self.branch_of is None:
            self.branch_of = torch.zeros_like(self.tokens)
        self.branch_of = torch.cat([self.branch_of, torch.full_like(extra, branch)], dim=1)
        self.tokens = torch.cat([self.tokens, extra], dim=1)
        self.positions = torch.cat([self.positions, torch.zeros_like(extra)], dim=1)
        self.valid = torch.cat([self.valid, torch.zeros_like(extra, dtype=torch.bool)], dim=1)
        room = self.content.new_zeros(rows, count, self.content.shape[2])
        self.content = torch.cat([self.content, room], dim=1)
        self.ragged = True
        return torch.arange(first, first + count, device=extra.device)

    def place(self, slots: Tensor, there: Tensor, tokens: Tensor, positions: Tensor) -> None:
        """Fill scratch ``slots`` (K,) of every row, (B, K) each; those not ``there`` are absent."""
        self.write(slots.expand(self.count, -1), tokens)
        copies = 2 if self.twins else 1
        self.positions[:, slots] = positions.repeat(copies, 1)
        self.valid[:, slots] = there.repeat(copies, 1)


def interleave(
    prompts: Sequence[Tensor],
    audio: Sequence[Tensor | None],
    audio_at: Sequence[int],
    embed: Callable[[Tensor], Tensor],
) -> tuple[Embeds, Tensor]:
    """Put each row's audio embeddings (N, W) into its prompt (L,) before an index.

    Returns:
        Embeddings of the rows (B, P, W), and their token ids (B, P), ``NO_TOKEN`` where there is
        audio or padding.
    """
    values, ids = [], []
    for tokens, heard, at in zip(prompts, audio, audio_at, strict=True):
        words = embed(tokens)
        if heard is not None:
            words = torch.cat([words[:at], heard.to(words.dtype), words[at:]])
            gap = tokens.new_full((len(heard),), NO_TOKEN)
            tokens = torch.cat([tokens[:at], gap, tokens[at:]])
        values.append(words)
        ids.append(tokens)
    lengths = torch.tensor([len(row) for row in ids], device=ids[0].device)
    padded = torch.nn.utils.rnn.pad_sequence
    return Embeds(padded(values, True), lengths), padded(ids, True, padding_value=NO_TOKEN)


def first_for_padding(slots: Tensor) -> Tensor:
    """Replace -1 in slots (B, K) by the row's first real one, to be treated twice alike."""
    return torch.where(slots < 0, slots.gather(1, first_real(slots)), slots)


def first_real(slots: Tensor) -> Tensor:
    """Where each row's first slot that is not -1 stands in ``slots`` (B, K), (B, 1)."""
    return (slots >= 0).int().argmax(dim=1, keepdim=True)
