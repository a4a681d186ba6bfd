"""The alignment loss: labels for the states of a middle layer of a language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffa.backbones.transformer import rotary_embedding, rotate
from diffa.data.collate import Batch
from diffa.nano.auxiliary import token_ids
from diffa.nano.corpus.labels import label_tokens, transcript_words
from diffa.nano.corpus.vocabulary import BLANK
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.packing import LayerState, Packing

_LOGIT_SCALE = 0.3  # of a normalised state's product with an embedding
_BLANK_WEIGHT = 0.2  # words that repeat nothing outnumber those that do
_ATTENTION_WEIGHT = 2.0


class AlignmentLoss(nn.Module):
    """Supervise what a middle layer represents, and where its last head attends.

    The states that enter ``layer`` learn to resemble the embeddings of the words that
    ``diffa.nano.corpus.labels`` names, such as the number that transcripts and adapters add to a
    word. Higher layers then find a word by equal embeddings. The last head of ``layer`` learns
    to attend from an answer's letter to the choice that it stands for, which a small model does
    not learn from answers alone.

    Args:
        backbone: A backbone with a ``Transformer``.
        layer: Index of the layer, from 1.
        weight: Weight of the loss.

    Raises:
        TrainingError: The backbone has no such layer.
    """

    def __init__(self, backbone: Any, *, layer: int, weight: float) -> None:
        super().__init__()
        transformer = getattr(backbone, "transformer", None)
        blocks: Any = getattr(transformer, "blocks", ())
        if not 0 < layer < len(blocks):
            raise TrainingError(
                f"alignment: layer {layer} of a backbone whose Transformer has {len(blocks)} layers"
            )
        # in a tuple: the backbone is no submodule of its loss
        self._frozen: tuple[Any, Any, Any] = (transformer, blocks[layer], backbone.embed)
        self.layer, self.weight, self.tokenizer = layer, weight, backbone.tokenizer
        # the state that predicts a token stands one place before it under causal decoding
        self.shift = int(backbone.decoding == "causal")
        self._words: dict[int, str] = {}
        self._ids: dict[str, int] = {}

    def forward(self, batch: Batch, packing: Packing) -> Tensor:
        """Return the weighted loss of all labels of a batch.

        Args:
            batch: Rows with transcripts.
            packing: How the backbone has just read them, with this loss's ``layer``.

        Raises:
            TrainingError: The rows have no transcripts.
        """
        state = packing.layer_state
        if state is None or batch.audio_text is None:
            raise TrainingError("alignment needs rows with transcripts in place of audio")
        flat = state.states.flatten(0, 1)
        total = flat.new_zeros(())
        for slots, words, weights, sources in self._labels(batch, packing):
            normal = F.rms_norm(flat[slots.to(flat.device)], flat.shape[1:])
            classes, index = torch.unique(words.to(flat.device), return_inverse=True)
            logits = _LOGIT_SCALE * normal @ self._frozen[2](classes).T
            losses = F.cross_entropy(logits, index, reduction="none")
            weights = weights.to(flat.device)
            total = total + (losses * weights).sum() / weights.sum()
            has_source = sources >= 0
            if bool(has_source.any()):
                attention = self._attention_loss(state, slots[has_source], sources[has_source])
                total = total + _ATTENTION_WEIGHT * attention
        return self.weight * total

    def _attention_loss(self, state: LayerState, slots: Tensor, sources: Tensor) -> Tensor:
        """Cross-entropy of the last head's attention from slots (K,) to their sources (K,)."""
        transformer, block, _ = self._frozen
        states, positions, context = state
        size = states.shape[1]
        rotation = rotary_embedding(positions, transformer.config).to(states.device)
        normal = block.attn_norm(states)
        queries, keys = (
            rotate(proj(normal).unflatten(-1, block.split)[:, :, -1:], rotation)[:, :, 0]
            for proj in (block.q_proj, block.k_proj)
        )
        rows, at = (slots // size).to(states.device), (slots % size).to(states.device)
        scores = torch.einsum("kd,ksd->ks", queries[rows, at], keys[rows])
        assert context.valid is not None  # ``Packing`` says which slots are valid
        mask = context.valid[rows]
        if context.branch is not None:
            branch = context.branch[rows]
            mask = mask & ((branch == 0) | (branch == branch.gather(1, at[:, None])))
        if self.shift:  # causal: slots are in the order of their positions
            mask = mask & (torch.arange(size, device=mask.device) <= at[:, None])
        scores = (scores / queries.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        loss: Tensor = F.cross_entropy(scores, (sources % size).to(states.device))
        return loss

    def _labels(
        self, batch: Batch, packing: Packing
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield for each field its labels' slots, tokens, weights and sources, (K,) each.

        Slots count through the whole batch; a source is -1 where there is none. Only labels of
        one field compete.
        """
        assert batch.audio_text is not None and batch.audio_text_lengths is not None
        assert packing.slots is not None
        transcripts = [
            transcript_words(self._decode(row[:count]), start)
            for row, count, start in zip(
                batch.audio_text,
                batch.audio_text_lengths.tolist(),
                batch.speech_start.tolist(),
                strict=True,
            )
        ]
        fields: dict[str, list[tuple[int, int, float, int]]] = {}
        owners, sizes = batch.audio_index.tolist(), batch.row_lengths.tolist()
        slots = packing.slots.tolist()
        for row, (owner, size) in enumerate(zip(owners, sizes, strict=True)):
            for label in label_tokens(self._decode(batch.tokens[row, :size]), transcripts[owner]):
                place = label.place - (0 if label.field == "letter" else self.shift)
                weight = _BLANK_WEIGHT if label.word == BLANK else 1.0
                source = -1 if label.source is None else slots[row][label.source]
                target = (slots[row][place], self._id(label.word), weight, source)
                fields.setdefault(label.field, []).append(target)
        for labels in fields.values():
            at, tokens, weights, sources = map(torch.tensor, zip(*labels, strict=True))
            yield at, tokens, weights, sources

    def _decode(self, tokens: Tensor) -> list[str]:
        return [self._word(token) for token in tokens.tolist()]

    def _word(self, token: int) -> str:
        if token not in self._words:
            self._words[token] = str(self.tokenizer.decode([token])).strip()
        return self._words[token]

    def _id(self, word: str) -> int:
        if word not in self._ids:
            self._ids[word] = token_ids([word], self.tokenizer)[0]
        return self._ids[word]
