"""Helps for small models, each an option: text in the place of audio, CTC, numbers, a match."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffa.objectives.ctc import head_ctc_loss
from diffa.trainers.checkpoints import TrainingError
from diffa.types import Embeds, Features

_OPEN = 10.0  # a gate's score where nothing of the blank embedding is left


class Script(nn.Module):
    """Reads text where audio would stand, blurred as an adapter's output is blurred.

    Args:
        embed: token ids to embeddings.
        blank: the token that is mixed in.
        blur: share of the rows with blank mixed in, up to half of each slot.
        noise: up to this many times the embeddings' root mean square of noise.
        numbers: tokens whose embeddings are added to the first spoken word, the second, and so
            on, as ``adapters.numbering`` does.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        *,
        blank: int | None = None,
        blur: float = 0.0,
        noise: float = 0.0,
        numbers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple: a bound method of the backbone is no part of this
        self.blank, self.blur, self.noise = blank, blur, noise
        self.numbers = tuple(numbers)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return one embedding per token."""
        return lengths

    def forward(self, features: Features) -> Embeds:
        """Embed the ids that stand in for states (B, N, 2), each beside its number or 0."""
        ids, places = features.states[0].unbind(2)
        values = self._embed[0](ids)
        if self.numbers:
            table = self._embed[0](torch.tensor(self.numbers, device=ids.device))
            number = places.clamp(max=len(self.numbers))
            values = values + torch.cat([torch.zeros_like(table[:1]), table])[number]
        if self.training:
            values = self._blurred(values)
        inside = torch.arange(values.shape[1], device=values.device) < features.lengths[:, None]
        return Embeds(torch.where(inside[..., None], values, 0), features.lengths)

    def _blurred(self, values: Tensor) -> Tensor:
        rows, slots, _ = values.shape
        size = values.detach().square().mean().sqrt()
        if self.blur and self.blank is not None:
            other = self._embed[0](torch.tensor(self.blank, device=values.device))
            mixed = torch.rand(rows, 1, 1, device=values.device) < self.blur
            share = 0.5 * torch.rand(rows, 1, 1, device=values.device)
            share = share * torch.rand(rows, slots, 1, device=values.device) * mixed
            values = values * (1 - share) + other * share
        if self.noise:
            loud = self.noise * size * torch.rand(rows, 1, 1, device=values.device)
            values = values + loud * torch.randn_like(values)
        return values


def numbered(script: Tensor, spoken_from: Tensor, blank: int | None) -> Tensor:
    """Tell every token of scripts (G, N) which spoken word it belongs to, from 1; else 0.

    A word may go on over several tokens; ``blank`` and what comes before ``spoken_from`` (G,)
    has no number.
    """
    says = torch.arange(script.shape[1], device=script.device) >= spoken_from[:, None]
    if blank is not None:
        says = says & (script != blank)
    begins = says.clone()
    begins[:, 1:] &= ~says[:, :-1] | (script[:, 1:] != script[:, :-1])
    return begins.cumsum(1) * says


class Saying:
    """CTC between what adapters emit and words, read by the backbone's own embeddings.

    diffusion-gemma-asr aligns its projector so before the diffusion loss can; only the batch's
    words and a blank compete.

    Args:
        embed: token ids to embeddings.
        weights: of each adapter's CTC, by key.
        blank: id of the token that stands for nothing.
        sharpness: of the cosine similarities.
        pull: weight of the squared distance of every slot to the word that it says, in units of
            the embeddings' mean square; CTC alone is content with a direction.
        head: reads the embeddings instead, as if they were hidden states (``objectives.ctc``);
            ``sharpness`` and ``pull`` then count for nothing, and no gate is taught.

    Where an adapter numbers its embeddings, what they say is read without the numbers, and where
    they say anything teaches the numbering's gate.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        weights: Mapping[str, float],
        *,
        blank: int,
        sharpness: float = 10.0,
        pull: float = 0.0,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.embed, self.weights, self.blank = embed, weights, blank
        self.sharpness, self.pull, self.head = sharpness, pull, head
        self._gates: dict[str, Callable[[Tensor], Tensor]] = {}

    @contextmanager
    def listening(self, model: Any) -> Iterator[dict[str, Embeds]]:
        """Collect what adapters emit while the model runs."""
        said: dict[str, Embeds] = {}

        bare: dict[str, Tensor] = {}

        def note(key: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, out: Embeds) -> None:
                said[key] = out._replace(values=bare.get(key, out.values))

            return hook

        def undress(key: str) -> Callable[..., None]:
            def hook(_: nn.Module, given: tuple[Tensor, Tensor]) -> None:
                bare[key] = given[0]

            return hook

        chosen = [(key, part) for key, part in model.adapters.items() if key in self.weights]
        handles = [part.register_forward_hook(note(key)) for key, part in chosen]
        self._gates = {}
        for key, part in chosen:
            numbering = getattr(part, "numbering", None)
            if numbering is not None:
                self._gates[key] = numbering.gate
                handles.append(numbering.register_forward_pre_hook(undress(key)))
        try:
            yield said
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, said: Mapping[str, Embeds], spoken: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the weighted CTC per word of every adapter, added up."""
        parts = []
        for key, embeds in said.items():
            words = [row.get(key, row.get("*")) for row in spoken]
            known = [i for i, row in enumerate(words) if row is not None]
            if known:
                chosen = Embeds(embeds.values[known], embeds.lengths[known])
                texts = [row for row in words if row is not None]
                parts.append(self.weights[key] * self._ctc(chosen, texts, self._gates.get(key)))
        zero = next(iter(said.values())).values.new_zeros(())
        return torch.stack(parts).sum() if parts else zero

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
        logits = self.sharpness * cosines
        counts = torch.tensor([len(row) for row in words], device=device)
        total = F.ctc_loss(
            logits.log_softmax(2).transpose(0, 1),
            index + 1,
            embeds.lengths,
            counts,
            reduction="sum",
            zero_infinity=True,
        )
        aligned = total / counts.sum().clamp(min=1)
        nearest = _peaks(cosines.detach())
        inside = torch.arange(embeds.values.shape[1], device=device) < embeds.lengths[:, None]
        if self.pull:
            aligned = aligned + self.pull * _distance(embeds.values, table, nearest, inside)
        if gate is not None:
            aligned = aligned + _opened(gate(embeds.values.detach())[..., 0], cosines, inside)
        return aligned


def _opened(scores: Tensor, cosines: Tensor, inside: Tensor) -> Tensor:
    """How wrong a gate's scores (B, N) are about which slots say a word, as a loss.

    Slots that say one weigh as much, taken together, as the many that do not.
    """
    says = cosines.detach().argmax(2) > 0
    losses = F.binary_cross_entropy_with_logits(scores, says.float(), reduction="none")
    groups = [losses[inside & says], losses[inside & ~says]]
    return torch.stack([group.mean() for group in groups if len(group)]).mean()


def _distance(values: Tensor, table: Tensor, nearest: Tensor, inside: Tensor) -> Tensor:
    """How far slots are from the row of ``table`` that they are nearest to.

    The table's first row stands for nothing; the slots that say it weigh as much as the others.
    """
    far = (values.float() - table[nearest]).square().mean(2) / table.square().mean()
    groups = [far[inside & (nearest > 0)], far[inside & (nearest == 0)]]
    return torch.stack([group.mean() for group in groups if len(group)]).mean()


def _peaks(cosines: Tensor) -> Tensor:
    """Which row each slot says, (B, N); a word said in several slots in a row keeps the surest.

    CTC reads it once either way, but a language model would have to.
    """
    sure, nearest = cosines.max(2)
    fresh = torch.ones_like(nearest, dtype=torch.bool)
    fresh[:, 1:] = nearest[:, 1:] != nearest[:, :-1]
    run = fresh.long().cumsum(1) - 1
    best = torch.full_like(sure, -2.0).scatter_reduce(1, run, sure, "amax")
    return torch.where(sure == best.gather(1, run), nearest, 0)


@torch.no_grad()
def match(adapter: nn.Module, features: Features, table: Tensor) -> float:
    """Scale an adapter's last layer so that its output is as large as the embeddings (V, W).

    Returns the factor; raises TrainingError where scaling the last layer does not do it.
    """

    def size() -> Tensor:
        out: Embeds = adapter(features)
        inside = torch.arange(out.values.shape[1], device=out.values.device) < out.lengths[:, None]
        return out.values[inside].float().square().mean().sqrt()

    training = adapter.training
    adapter.eval()
    wanted = table.float().square().mean().sqrt()
    factor = float(wanted / size().clamp(min=1e-12))
    last = [m for m in adapter.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    for value in last[-1].parameters(recurse=False) if last else ():
        value.mul_(factor)
    found = size()
    adapter.train(training)
    if not 0.9 < float(found / wanted) < 1.1:
        raise TrainingError(
            f"match: the size of {type(adapter).__name__} does not follow its last layer"
        )
    return factor


@torch.no_grad()
def number(adapter: nn.Module, table: Tensor, blank: Tensor) -> None:
    """Let an adapter's numbers begin as the embeddings (K, W) of words such as "first".

    Its gate begins by opening wherever an embedding is not the ``blank`` one (W,).
    """
    numbering = getattr(adapter, "numbering", None)
    if numbering is None:
        return
    if len(numbering.table) != len(table):
        raise TrainingError(
            f"numbers: {len(table)} words for an adapter that counts to {len(numbering.table)}"
        )
    numbering.table.copy_(table)
    numbering.gate.weight.copy_(-2 * _OPEN * blank / blank.square().sum())
    numbering.gate.bias.fill_(_OPEN)
