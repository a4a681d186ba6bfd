"""Conformance of backbones: shapes, masks, the direction they read in, and the memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffa.canvas.kv_cache import AttentionContext, KVCache
from diffa.testing.parts import ModuleSuite, close, ensure, noise
from diffa.types import Backbone

LENGTH = 9


class BackboneSuite(ModuleSuite):
    """Checks of a backbone; ``options`` should build a small one."""

    kind: ClassVar[str] = "backbone"

    def new(self) -> Any:
        """The backbone; it has no wires."""
        return self.make()

    def run(self, part: Any) -> Tensor:
        """Logits of a fixed sequence."""
        tokens = torch.arange(LENGTH)[None] % part.vocab.size
        return torch.Tensor.flatten(part.head(_read(part, part.embed(tokens))))

    def ready(self) -> tuple[Any, Tensor]:
        """The backbone in eval, and embeddings (2, LENGTH, W) that look like its own."""
        part = self.new().eval()
        scale = part.embed(torch.arange(part.vocab.size)).std()
        return part, noise(2, LENGTH, part.width, seed=4) * scale

    def test_it_declares_what_a_backbone_declares(self) -> None:
        """A width, a vocabulary whose ids lie within it, a decoding, a tokenizer or None."""
        part = self.new()
        ensure(isinstance(part, torch.nn.Module) and isinstance(part, Backbone), "no backbone")
        vocab = part.vocab
        ids = [i for i in (vocab.eos, vocab.pad, vocab.mask) if i is not None]
        ensure(all(0 <= i < vocab.size for i in ids), f"{vocab} has ids outside of itself")
        ensure(part.decoding in ("masked", "causal"), f"decoding is {part.decoding!r}")
        ensure((vocab.mask is None) == (part.decoding == "causal"), "masked means a mask token")
        ensure(vocab.mask not in (vocab.eos, vocab.pad), "the mask is the end or the padding")

    @torch.no_grad()
    def test_embed_and_head_have_the_declared_shapes(self) -> None:
        """Tokens of any shape to (..., W), hidden states to (..., V)."""
        part = self.new().eval()
        for shape in ((3,), (2, 5), (2, 0)):
            embeds = part.embed(torch.zeros(shape, dtype=torch.long))
            ensure(tuple(embeds.shape) == (*shape, part.width), f"embed gives {embeds.shape}")
            logits = part.head(embeds)
            ensure(tuple(logits.shape) == (*shape, part.vocab.size), f"head gives {logits.shape}")

    @torch.no_grad()
    def test_padding_and_neighbours_do_not_leak(self) -> None:
        """What is not valid has no say, and a row is what it is alone."""
        part, embeds = self.ready()
        valid = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4]])
        found = _read(part, embeds, valid)
        other = torch.where(valid[..., None], embeds, 30 * noise(*embeds.shape, seed=6))
        ensure(close(_read(part, other, valid)[valid], found[valid]), "padding has a say")
        for row, length in enumerate((LENGTH, 4)):
            alone = _read(part, embeds[row : row + 1, :length])[0]
            ensure(close(found[row, :length], alone), f"row {row} is not what it is alone")

    @torch.no_grad()
    def test_positions_count_and_columns_do_not(self) -> None:
        """A gap of padding between prompt and answer changes nothing where positions go on."""
        part, embeds = self.ready()
        gap = 30 * noise(2, 3, part.width, seed=6)
        spread = torch.cat([embeds[:, :4], gap, embeds[:, 4:]], dim=1)
        column = torch.arange(LENGTH + 3)
        valid = ((column < 4) | (column >= 7)).expand(2, -1)
        positions = torch.where(column < 7, column, column - 3).expand(2, -1)
        found = part(spread, positions, AttentionContext(valid=valid, positions=positions))
        same = close(found[valid].view_as(embeds), _read(part, embeds))
        ensure(same, "a gap in the canvas shifts what stands behind it")

    @torch.no_grad()
    def test_decoding_is_true_to_its_word(self) -> None:
        """A causal backbone never sees a later token, a masked one does; both see earlier ones."""
        part, embeds = self.ready()
        before, other = _read(part, embeds), embeds.clone()
        other[:, 5] = 3 * noise(2, part.width, seed=8) * embeds.std()
        after = _read(part, other)
        later = not close(after[:, :5], before[:, :5], 1e-6)
        ensure(later == (part.decoding == "masked"), f"{part.decoding}, but later tokens' say "
               f"is {later}")  # fmt: skip
        ensure(not close(after[:, 6:], before[:, 6:], 1e-6), "earlier tokens have no say")

    @torch.no_grad()
    def test_remembering_everything_equals_a_plain_pass(self) -> None:
        """Recomputing all slots, in order or shuffled, or some over remembered ones: the same."""
        part, embeds = self.ready()
        plain, remembered = _read(part, embeds), _Remembered(part, embeds)
        ensure(close(remembered.first, plain), "a pass that fills the memory differs")
        mixed = torch.tensor([[3, 0, 8, 1, 2, 7, 4, 6, 5], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
        ensure(close(remembered(mixed), _rows(plain, mixed)), "the order of slots has a say")
        some = torch.tensor([[2, 3, 6], [0, 8, 4]])
        ensure(close(remembered(some), _rows(plain, some)), "a partial recompute differs")
        ensure(close(remembered(some[:1], rows=torch.tensor([0])), _rows(plain, some)[:1]),
               "a recompute of one row alone differs")  # fmt: skip

    @torch.no_grad()
    def test_the_memory_keeps_what_it_is_told_to(self) -> None:
        """Changed slots are remembered where ``write`` is on, and forgotten where it is off."""
        part, embeds = self.ready()
        changed, slots = embeds.clone(), torch.tensor([[0, 1], [0, 1]])
        changed[:, :2] = -embeds[:, :2]
        last = torch.full((2, 1), LENGTH - 1)
        for write, content in ((False, embeds), (True, changed)):
            remembered = _Remembered(part, embeds)
            remembered.embeds = changed
            seen = remembered(torch.cat([slots, last], dim=1), write=write)
            after = remembered(last)
            if part.decoding == "causal" or write:
                ensure(not close(seen, _rows(_read(part, embeds), torch.cat([slots, last], 1))),
                       "slots that are recomputed are not seen")  # fmt: skip
            fresh = _Remembered(part, embeds)
            fresh.embeds = content
            if write:
                fresh(torch.cat([slots, last], dim=1))
            ensure(close(after, fresh(last)), f"with write={write} the memory is wrong")

    @torch.no_grad()
    def test_branches_and_views_are_kept_apart(self) -> None:
        """Shared slots never see a branch's; a query sees only what ``sees`` allows."""
        part, embeds = self.ready()
        positions, plain = _positions(embeds), _read(part, embeds[:, :6])
        branch = (torch.arange(LENGTH) >= 6).long().expand(2, -1)
        found = part(embeds, positions, AttentionContext(positions=positions, branch=branch))
        ensure(close(found[:, :6], plain), "shared slots see those of a branch")
        attn_mask = (torch.arange(LENGTH) < 6).expand(2, LENGTH, -1)
        found = part(embeds, positions, AttentionContext(positions=positions, attn_mask=attn_mask))
        ensure(close(found[:, :6], plain), "a query sees what `sees` hides")


class _Remembered:
    """A backbone whose memory holds a whole pass over ``embeds``; calls recompute slots."""

    def __init__(self, part: Any, embeds: Tensor) -> None:
        self.part, self.embeds, self.memory = part, embeds, KVCache()
        self.memory.reserve(len(embeds), LENGTH)
        self.positions = _positions(embeds)
        context = AttentionContext(positions=self.positions, kv_cache=self.memory, write=True)
        self.first: Tensor = part(embeds, self.positions, context)

    def __call__(self, slots: Tensor, *, rows: Tensor | None = None, write: bool = True) -> Tensor:
        embeds = self.embeds if rows is None else self.embeds[rows]
        positions = _positions(embeds)
        context = AttentionContext(
            positions=positions,
            query_slots=slots,
            kv_cache=self.memory,
            cache_rows=rows,
            write=write,
        )
        hidden: Tensor = self.part(_rows(embeds, slots), positions.gather(1, slots), context)
        return hidden


def _read(part: Any, embeds: Tensor, valid: Tensor | None = None) -> Tensor:
    hidden: Tensor = part(embeds, _positions(embeds), AttentionContext(valid=valid))
    return hidden


def _positions(embeds: Tensor) -> Tensor:
    return torch.arange(embeds.shape[1]).expand(embeds.shape[:2])


def _rows(hidden: Tensor, slots: Tensor) -> Tensor:
    return hidden[torch.arange(len(slots))[:, None], slots]
