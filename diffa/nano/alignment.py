"""Hints: what an answer needs on the way, asked of a layer in the middle of a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffa.backbones.transformer import rotate
from diffa.data.collate import Batch
from diffa.nano.corpus.labels import hints, spoken_words
from diffa.nano.corpus.vocabulary import BLANK
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.packing import Packing

_SHARPNESS = 0.3  # of a normalised state's product with an embedding


class Hinting(nn.Module):
    """Pulls a middle layer's states towards the embeddings of what ``data.nano.hints`` names.

    The layers above then find it by looking for equal embeddings, such as the number that scripts
    and adapters add to a word (``adapters.numbering``). The last head of the next layer is taught
    to look from an answer's letter at the choice that it stands for: a small model does not find
    that by itself.

    Args:
        backbone: one with a ``Transformer``.
        layer: how many layers come before.
        weight: of the hints' loss.
    """

    def __init__(self, backbone: Any, *, layer: int, weight: float) -> None:
        super().__init__()
        blocks = getattr(getattr(backbone, "transformer", None), "blocks", ())
        if not 0 < layer < len(blocks):
            raise TrainingError(
                f"aids.hints: after layer {layer} of a backbone with {len(blocks)} of diffa's own"
            )
        self._next = (blocks[layer],)  # in a tuple: the backbone is no part of this
        self._embed = (backbone.embed,)
        self.ahead = int(backbone.decoding == "causal")  # such a state tells of the next token
        self.weight, self.tokenizer = weight, backbone.tokenizer
        self._words: dict[int, str] = {}
        self._ids: dict[str, int] = {}
        self._given: tuple[Tensor, Tensor, Any] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the middle layer's states (G, S, W) while the backbone runs."""

        def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
            self._given = (given[0], given[1], given[2])  # states, RoPE's turns, what is seen

        handle = self._next[0].register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, batch: Batch, packing: Packing) -> Tensor:
        """Return the weighted loss of every label in a batch about scripts."""
        if self._given is None or packing.places is None or batch.audio_text is None:
            raise TrainingError("aids.hints needs rows about scripts")
        flat = self._given[0].flatten(0, 1)
        total = flat.new_zeros(())
        for places, wanted, weights, sources in self._labelled(batch, packing):
            normal = F.rms_norm(flat[places.to(flat.device)], flat.shape[1:])
            competing, index = torch.unique(wanted.to(flat.device), return_inverse=True)
            logits = _SHARPNESS * normal @ self._embed[0](competing).T
            losses = F.cross_entropy(logits, index, reduction="none")
            weights = weights.to(flat.device)
            total = total + (losses * weights).sum() / weights.sum()
            told = sources >= 0
            if bool(told.any()):
                total = total + 2.0 * self._looking(places[told], sources[told])
        self._given = None
        return self.weight * total

    def _looking(self, places: Tensor, sources: Tensor) -> Tensor:
        """How little the last head looks from places (K,) at their sources (K,), as a loss."""
        assert self._given is not None
        states, turn, context = self._given
        block, slots = self._next[0], states.shape[1]
        normal = block.attn_norm(states)
        queries, keys = (
            rotate(proj(normal).unflatten(-1, block.split)[:, :, -1:], turn)[:, :, 0]
            for proj in (block.q_proj, block.k_proj)
        )
        rows, at = (places // slots).to(states.device), (places % slots).to(states.device)
        scores = torch.einsum("kd,ksd->ks", queries[rows, at], keys[rows])
        seen = context.valid[rows]
        if context.branch is not None:
            branch = context.branch[rows]
            seen = seen & ((branch == 0) | (branch == branch.gather(1, at[:, None])))
        if self.ahead:  # slots stand in the order of their positions
            seen = seen & (torch.arange(slots, device=seen.device) <= at[:, None])
        scores = (scores / queries.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        loss: Tensor = F.cross_entropy(scores, (sources % slots).to(states.device))
        return loss

    def _labelled(
        self, batch: Batch, packing: Packing
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For every field: labels' places among all slots, tokens, weights and sources, (K,) each.

        Only the labels of one batch and field compete; a source is -1 where none is told.
        """
        assert batch.audio_text is not None and batch.audio_text_lengths is not None
        assert packing.places is not None
        said = [
            spoken_words(self._said(row[:count]), begin)
            for row, count, begin in zip(
                batch.audio_text,
                batch.audio_text_lengths.tolist(),
                batch.speech_start.tolist(),
                strict=True,
            )
        ]
        fields: dict[str, list[tuple[int, int, float, int]]] = {}
        owners, sizes = batch.audio_index.tolist(), batch.row_lengths.tolist()
        at = packing.places.tolist()
        for row, (owner, size) in enumerate(zip(owners, sizes, strict=True)):
            for hint in hints(self._said(batch.tokens[row, :size]), said[owner]):
                place = hint.place - (0 if hint.field == "letter" else self.ahead)
                # words that repeat nothing outnumber those that do
                weight = 0.2 if hint.word == BLANK else 1.0
                source = -1 if hint.source is None else at[row][hint.source]
                label = (at[row][place], self._id(hint.word), weight, source)
                fields.setdefault(hint.field, []).append(label)
        for labels in fields.values():
            places, tokens, weights, sources = map(torch.tensor, zip(*labels, strict=True))
            yield places, tokens, weights, sources

    def _said(self, tokens: Tensor) -> list[str]:
        return [self._word(token) for token in tokens.tolist()]

    def _word(self, token: int) -> str:
        if token not in self._words:
            self._words[token] = str(self.tokenizer.decode([token])).strip()
        return self._words[token]

    def _id(self, word: str) -> int:
        if word not in self._ids:
            self._ids[word] = chosen([word], self.tokenizer)[0]
        return self._ids[word]


def chosen(words: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the ids of words as a script has them; raises TrainingError for an unknown one."""
    if not words:
        return []
    special = tokenizer.get_added_vocab()
    ids = [
        [special[word]]
        if word in special
        else tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        for word in words
    ]
    wrong = [word for word, found in zip(words, ids, strict=True) if len(found) != 1]
    if wrong:
        raise TrainingError(f"aids: {wrong[0]!r} is not one token of the backbone's")
    return [int(found[0]) for found in ids]
