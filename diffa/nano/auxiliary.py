"""Auxiliary losses and inputs for small models: text in place of audio, CTC, matched scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffa.adapters.numbering import numbering_of
from diffa.objectives.ctc import head_ctc_loss
from diffa.trainers.checkpoints import TrainingError
from diffa.types import Embeds, Features

_GATE_LOGIT = 10.0  # of an initial gate for an embedding orthogonal to the blank one


def token_ids(words: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the token of each word as a transcript has it.

    Raises:
        TrainingError: A word is not exactly one token.
    """
    if not words:
        return []
    special = tokenizer.get_added_vocab()
    ids = [
        [special[word]]
        if word in special
        else tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        for word in words
    ]
    unknown = getattr(tokenizer, "unk_token_id", None)
    wrong = [
        word
        for word, tokens in zip(words, ids, strict=True)
        if len(tokens) != 1 or tokens[0] == unknown
    ]
    if wrong:
        raise TrainingError(f"learner: {wrong[0]!r} is not one token of the backbone's tokenizer")
    return [int(tokens[0]) for tokens in ids]


class TranscriptEmbedder(nn.Module):
    """Embed a transcript that stands in place of audio, disturbed as an adapter's output is.

    Args:
        embed: Token ids to embeddings.
        blank: Token that is mixed in.
        text_mixup: Share of the rows that are mixed with the blank, up to half of each slot.
        text_noise: Largest noise, as a multiple of the embeddings' root mean square.
        ordinals: Tokens whose embeddings are added to the first spoken word, the second, and so
            on, as ``diffa.adapters.numbering`` does.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        *,
        blank: int | None = None,
        text_mixup: float = 0.0,
        text_noise: float = 0.0,
        ordinals: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple: a bound method of the backbone is no submodule
        self.blank, self.text_mixup, self.text_noise = blank, text_mixup, text_noise
        self.ordinals = tuple(ordinals)

    def forward(self, tokens: Tensor, lengths: Tensor, word_index: Tensor) -> Embeds:
        """Return the embeddings of transcripts.

        Args:
            tokens: Token ids, (B, N).
            lengths: Tokens of each row, (B,).
            word_index: Number of each token's word from 1, 0 for none, (B, N).
        """
        values = self._embed[0](tokens)
        if self.ordinals:
            table = self._embed[0](torch.tensor(self.ordinals, device=tokens.device))
            number = word_index.clamp(max=len(self.ordinals))
            values = values + torch.cat([torch.zeros_like(table[:1]), table])[number]
        if self.training:
            values = self._disturb(values)
        inside = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
        return Embeds(torch.where(inside[..., None], values, 0), lengths)

    def _disturb(self, values: Tensor) -> Tensor:
        rows, slots, _ = values.shape
        rms = values.detach().square().mean().sqrt()
        if self.text_mixup and self.blank is not None:
            blank = self._embed[0](torch.tensor(self.blank, device=values.device))
            mixed = torch.rand(rows, 1, 1, device=values.device) < self.text_mixup
            share = 0.5 * torch.rand(rows, 1, 1, device=values.device)
            share = share * torch.rand(rows, slots, 1, device=values.device) * mixed
            values = values * (1 - share) + blank * share
        if self.text_noise:
            scale = self.text_noise * rms * torch.rand(rows, 1, 1, device=values.device)
            values = values + scale * torch.randn_like(values)
        return values


def word_numbers(tokens: Tensor, speech_start: Tensor, blank: int | None) -> Tensor:
    """Return the number of each token's spoken word, (G, N): from 1, or 0 for no word.

    A word may span several equal tokens.

    Args:
        tokens: Transcripts, (G, N).
        speech_start: Index of the first spoken token of each, (G,).
        blank: Token that belongs to no word.
    """
    is_word = torch.arange(tokens.shape[1], device=tokens.device) >= speech_start[:, None]
    if blank is not None:
        is_word = is_word & (tokens != blank)
    begins = is_word.clone()
    begins[:, 1:] &= ~is_word[:, :-1] | (tokens[:, 1:] != tokens[:, :-1])
    return begins.cumsum(1) * is_word


class CTCLoss:
    """CTC between adapters' embeddings and words, read by the backbone's own embeddings.

    diffusion-gemma-asr aligns its projector in this way before the diffusion loss can. Only the
    batch's words and a blank compete. Where an adapter numbers its embeddings, CTC reads them
    without the numbers, and the slots that are words train the numbering's gate.

    Args:
        embed: Token ids to embeddings.
        weights: Weight of each adapter's CTC, by key.
        blank: Token of CTC's blank.
        logit_scale: Factor of the cosine similarities.
        embedding_match: Weight of the squared distance of every slot to the word that it is
            nearest to, relative to the embeddings' mean square: CTC alone sets only directions.
        head: Reads the embeddings instead, as if they were hidden states (``objectives.ctc``);
            then ``logit_scale``, ``embedding_match`` and gates are not used.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        weights: Mapping[str, float],
        *,
        blank: int,
        logit_scale: float = 10.0,
        embedding_match: float = 0.0,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.embed, self.weights, self.blank = embed, weights, blank
        self.logit_scale, self.embedding_match, self.head = logit_scale, embedding_match, head

    def __call__(
        self,
        embeds: Mapping[str, Embeds],
        words: Sequence[Mapping[str, Tensor]],
        gates: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Return the weighted CTC per word, summed over adapters.

        Args:
            embeds: Output of each adapter, by key.
            words: Tokens of each recording, by adapter key; ``*`` for any other adapter.
            gates: The numberings' gates, by adapter key.
        """
        losses = []
        for key in (key for key in embeds if key in self.weights):
            output = embeds[key]
            values = output.values if output.content is None else output.content
            targets = [row.get(key, row.get("*")) for row in words]
            known = [i for i, row in enumerate(targets) if row is not None]
            if known:
                rows = Embeds(values[known], output.lengths[known])
                tokens = [row for row in targets if row is not None]
                losses.append(self.weights[key] * self._ctc(rows, tokens, (gates or {}).get(key)))
        if not losses:
            return next(iter(embeds.values())).values.new_zeros(())
        return torch.stack(losses).sum()

    def _ctc(
        self, embeds: Embeds, words: Sequence[Tensor], gate: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        if self.head is not None:
            return head_ctc_loss(embeds, self.head, words, blank=self.blank)
        device = embeds.values.device
        flat = torch.cat(list(words)).to(device)
        classes, index = torch.unique(flat, return_inverse=True)
        classes = torch.cat([torch.tensor([self.blank], device=device), classes])
        table = self.embed(classes).float()
        cosines = F.normalize(embeds.values.float(), dim=2) @ F.normalize(table, dim=1).T
        logits = self.logit_scale * cosines
        counts = torch.tensor([len(row) for row in words], device=device)
        total = F.ctc_loss(
            logits.log_softmax(2).transpose(0, 1),
            index + 1,
            embeds.lengths,
            counts,
            reduction="sum",
            zero_infinity=True,
        )
        loss = total / counts.sum().clamp(min=1)
        inside = torch.arange(embeds.values.shape[1], device=device) < embeds.lengths[:, None]
        nearest = _best_slots(cosines.detach())
        if self.embedding_match:
            loss = loss + self.embedding_match * _distance(embeds.values, table, nearest, inside)
        if gate is not None:
            # no gradient to the adapter: the gate follows the words, not the reverse
            loss = loss + _gate_loss(gate(embeds.values.detach())[..., 0], cosines, inside)
        return loss


def _gate_loss(logits: Tensor, cosines: Tensor, inside: Tensor) -> Tensor:
    """Cross-entropy of a gate's logits (B, N) with which slots are words.

    The few slots that are words have the same total weight as the many that are none.
    """
    is_word = cosines.detach().argmax(2) > 0
    losses = F.binary_cross_entropy_with_logits(logits, is_word.float(), reduction="none")
    return _balanced_mean(losses, is_word, inside)


def _distance(values: Tensor, table: Tensor, nearest: Tensor, inside: Tensor) -> Tensor:
    """Mean squared distance of slots to their nearest row of ``table``; row 0 is the blank."""
    distances = (values.float() - table[nearest]).square().mean(2) / table.square().mean()
    return _balanced_mean(distances, nearest > 0, inside)


def _balanced_mean(losses: Tensor, is_word: Tensor, inside: Tensor) -> Tensor:
    """Mean of the mean over words and the mean over blanks; an empty group does not count."""
    groups = [losses[inside & is_word], losses[inside & ~is_word]]
    return torch.stack([group.mean() for group in groups if len(group)]).mean()


def _best_slots(cosines: Tensor) -> Tensor:
    """Return the nearest class of each slot, (B, N); of adjacent equal ones only the surest.

    CTC reads a word once however many slots repeat it, but a language model would not.
    """
    best, nearest = cosines.max(2)
    begins = torch.ones_like(nearest, dtype=torch.bool)
    begins[:, 1:] = nearest[:, 1:] != nearest[:, :-1]
    run = begins.long().cumsum(1) - 1
    peak = torch.full_like(best, -2.0).scatter_reduce(1, run, best, "amax")
    return torch.where(best == peak.gather(1, run), nearest, 0)


@torch.no_grad()
def scale_to_embeddings(adapter: nn.Module, features: Features, table: Tensor) -> float:
    """Scale an adapter's last layer so that its output has the embeddings' root mean square.

    Args:
        adapter: The adapter.
        features: Features of some recordings.
        table: The embeddings, (V, W).

    Returns:
        The factor.

    Raises:
        TrainingError: The output's scale does not follow the last layer.
    """

    def rms() -> Tensor:
        out: Embeds = adapter(features)
        inside = torch.arange(out.values.shape[1], device=out.values.device) < out.lengths[:, None]
        return out.values[inside].float().square().mean().sqrt()

    training = adapter.training
    adapter.eval()
    target = table.float().square().mean().sqrt()
    factor = float(target / rms().clamp(min=1e-12))
    last = [m for m in adapter.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    for value in last[-1].parameters(recurse=False) if last else ():
        value.mul_(factor)
    ratio = float(rms() / target)
    adapter.train(training)
    if not 0.9 < ratio < 1.1:
        name = type(adapter).__name__
        raise TrainingError(f"match_scale: the scale of {name} does not follow its last layer")
    return factor


@torch.no_grad()
def init_numbering(adapter: nn.Module, table: Tensor, blank: Tensor) -> None:
    """Initialise an adapter's numbers to the embeddings (K, W) of words such as "first".

    Its gate opens for every embedding that is not the ``blank`` one (W,).

    Raises:
        TrainingError: The adapter has another number of numbers.
    """
    numbering = numbering_of(adapter)
    if numbering is None:
        return
    if len(numbering.table) != len(table):
        raise TrainingError(
            f"ordinals: {len(table)} words for an adapter with {len(numbering.table)} word_numbers"
        )
    numbering.table.copy_(table)
    numbering.gate.weight.copy_(-2 * _GATE_LOGIT * blank / blank.square().sum())
    numbering.gate.bias.fill_(_GATE_LOGIT)
