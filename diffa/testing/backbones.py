"""Conformance of backbones: shapes, masks, direction of attention, and the KV cache."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffa.canvas.kv_cache import AttentionContext, KVCache
from diffa.testing.parts import ModuleSuite, close, ensure, noise
from diffa.types import Backbone

LENGTH = 9


class BackboneSuite(ModuleSuite):
    """Checks of a backbone; let ``options`` build a small one."""

    kind: ClassVar[str] = "backbone"

    def new(self) -> Any:
        """Build the backbone."""
        return self.make()

    def run(self, part: Any) -> Tensor:
        """Return the logits of a fixed sequence."""
        tokens = torch.arange(LENGTH)[None] % part.vocab.size
        return torch.Tensor.flatten(part.head(_read(part, part.embed(tokens))))

    def ready(self) -> tuple[Any, Tensor]:
        """Return the backbone in eval mode, and embeddings (2, LENGTH, W) of its own scale."""
        part = self.new().eval()
        scale = part.embed(torch.arange(part.vocab.size)).std()
        return part, noise(2, LENGTH, part.width, seed=4) * scale

    def test_it_declares_what_a_backbone_declares(self) -> None:
        """Width, vocabulary, decoding and tokenizer are consistent."""
        part = self.new()
        ensure(
            isinstance(part, torch.nn.Module) and isinstance(part, Backbone),
            "not a Backbone that is an nn.Module",
        )
        vocab = part.vocab
        ids = [i for i in (vocab.eos, vocab.pad, vocab.mask) if i is not None]
        ensure(all(0 <= i < vocab.size for i in ids), f"{vocab} has ids outside the vocabulary")
        ensure(part.decoding in ("masked", "causal"), f"decoding is {part.decoding!r}")
        ensure(
            (vocab.mask is None) == (part.decoding == "causal"),
            "a masked backbone has a mask token, a causal one has none",
        )
        ensure(vocab.mask not in (vocab.eos, vocab.pad), "the mask token is also EOS or padding")

    @torch.no_grad()
    def test_embed_and_head_have_the_declared_shapes(self) -> None:
        """``embed`` maps (...) to (..., W), and ``head`` maps (..., W) to (..., V)."""
        part = self.new().eval()
        for shape in ((3,), (2, 5), (2, 0)):
            embeds = part.embed(torch.zeros(shape, dtype=torch.long))
            ensure(tuple(embeds.shape) == (*shape, part.width), f"embed gives {embeds.shape}")
            logits = part.head(embeds)
            ensure(tuple(logits.shape) == (*shape, part.vocab.size), f"head gives {logits.shape}")

    @torch.no_grad()
    def test_padding_and_neighbours_do_not_leak(self) -> None:
        """Invalid slots change nothing, and a row is the same alone and in a batch."""
        part, embeds = self.ready()
        valid = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4]])
        hidden = _read(part, embeds, valid)
        other = torch.where(valid[..., None], embeds, 30 * noise(*embeds.shape, seed=6))
        ensure(
            close(_read(part, other, valid)[valid], hidden[valid]), "padding changes valid slots"
        )
        for row, length in enumerate((LENGTH, 4)):
            alone = _read(part, embeds[row : row + 1, :length])[0]
            ensure(close(hidden[row, :length], alone), f"row {row} differs when it is alone")

    @torch.no_grad()
    def test_positions_count_and_columns_do_not(self) -> None:
        """A gap of padding changes nothing if the positions continue after it."""
        part, embeds = self.ready()
        gap = 30 * noise(2, 3, part.width, seed=6)
        padded = torch.cat([embeds[:, :4], gap, embeds[:, 4:]], dim=1)
        column = torch.arange(LENGTH + 3)
        valid = ((column < 4) | (column >= 7)).expand(2, -1)
        positions = torch.where(column < 7, column, column - 3).expand(2, -1)
        hidden = part(padded, positions, AttentionContext(valid=valid, positions=positions))
        same = close(hidden[valid].view_as(embeds), _read(part, embeds))
        ensure(same, "a gap of padding shifts the slots after it")

    @torch.no_grad()
    def test_attention_has_the_declared_direction(self) -> None:
        """A causal backbone ignores later tokens, a masked one does not; both use earlier ones."""
        part, embeds = self.ready()
        before, other = _read(part, embeds), embeds.clone()
        other[:, 5] = 3 * noise(2, part.width, seed=8) * embeds.std()
        after = _read(part, other)
        later = not close(after[:, :5], before[:, :5], 1e-6)
        ensure(later == (part.decoding == "masked"), f"decoding is {part.decoding}, "
               f"but later tokens matter: {later}")  # fmt: skip
        ensure(not close(after[:, 6:], before[:, 6:], 1e-6), "earlier tokens change nothing")

    @torch.no_grad()
    def test_a_full_kv_cache_equals_a_plain_pass(self) -> None:
        """Recomputing all slots, in any order, or some over cached ones gives equal states."""
        part, embeds = self.ready()
        plain, cached = _read(part, embeds), _Cached(part, embeds)
        ensure(close(cached.first, plain), "a pass that fills the KV cache differs")
        mixed = torch.tensor([[3, 0, 8, 1, 2, 7, 4, 6, 5], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
        ensure(
            close(cached(mixed), _rows(plain, mixed)),
            "the order of the queries changes their states",
        )
        some = torch.tensor([[2, 3, 6], [0, 8, 4]])
        ensure(close(cached(some), _rows(plain, some)), "a partial recompute differs")
        ensure(close(cached(some[:1], rows=torch.tensor([0])), _rows(plain, some)[:1]),
               "a recompute of one row alone differs")  # fmt: skip

    @torch.no_grad()
    def test_the_kv_cache_keeps_slots_only_with_write(self) -> None:
        """Recomputed slots enter the KV cache with ``write=True`` only."""
        part, embeds = self.ready()
        changed, slots = embeds.clone(), torch.tensor([[0, 1], [0, 1]])
        changed[:, :2] = -embeds[:, :2]
        last = torch.full((2, 1), LENGTH - 1)
        for write, content in ((False, embeds), (True, changed)):
            cached = _Cached(part, embeds)
            cached.embeds = changed
            hidden = cached(torch.cat([slots, last], dim=1), write=write)
            after = cached(last)
            if part.decoding == "causal" or write:
                ensure(not close(hidden, _rows(_read(part, embeds), torch.cat([slots, last], 1))),
                       "a pass ignores the slots that it recomputes")  # fmt: skip
            fresh = _Cached(part, embeds)
            fresh.embeds = content
            if write:
                fresh(torch.cat([slots, last], dim=1))
            ensure(close(after, fresh(last)), f"with write={write} the KV cache is wrong")

    @torch.no_grad()
    def test_branches_and_attention_masks_are_respected(self) -> None:
        """Shared slots ignore other branches, and ``attn_mask`` restricts queries."""
        part, embeds = self.ready()
        positions, plain = _positions(embeds), _read(part, embeds[:, :6])
        branch = (torch.arange(LENGTH) >= 6).long().expand(2, -1)
        hidden = part(embeds, positions, AttentionContext(positions=positions, branch=branch))
        ensure(close(hidden[:, :6], plain), "shared slots attend to a branch")
        attn_mask = (torch.arange(LENGTH) < 6).expand(2, LENGTH, -1)
        hidden = part(embeds, positions, AttentionContext(positions=positions, attn_mask=attn_mask))
        ensure(close(hidden[:, :6], plain), "a query attends to what `attn_mask` hides")


class _Cached:
    """A backbone whose KV cache holds a whole pass over ``embeds``; calls recompute slots."""

    def __init__(self, part: Any, embeds: Tensor) -> None:
        self.part, self.embeds, self.kv_cache = part, embeds, KVCache()
        self.kv_cache.reserve(len(embeds), LENGTH)
        self.positions = _positions(embeds)
        context = AttentionContext(positions=self.positions, kv_cache=self.kv_cache, write=True)
        self.first: Tensor = part(embeds, self.positions, context)

    def __call__(self, slots: Tensor, *, rows: Tensor | None = None, write: bool = True) -> Tensor:
        embeds = self.embeds if rows is None else self.embeds[rows]
        positions = _positions(embeds)
        context = AttentionContext(
            positions=positions,
            query_slots=slots,
            kv_cache=self.kv_cache,
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
