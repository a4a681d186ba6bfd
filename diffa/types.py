"""The values that cross borders between parts, and what each kind of part must offer.

Shapes: B batch rows, S samples or slots, T frames, N audio embeddings, L tokens, K recomputed
slots, R rows whose logits are asked for, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from diffa.canvas.canvas import Canvas
    from diffa.canvas.kv_cache import Context

Decoding = Literal["masked", "causal"]


class FeatureSpec(NamedTuple):
    """What an encoder emits: width of a frame, transformer layers, frames per second, heads.

    An encoder of ``layers`` layers emits ``layers + 1`` states: entry 0 is the embedding, the
    last one follows the final normalisation.
    """

    width: int
    layers: int
    rate: float
    heads: int


class Features(NamedTuple):
    """An encoder's hidden states.

    Attributes:
        states: every layer's frames, each (B, T, width); frames past ``extents`` are zero.
        lengths: frames that come from true audio, (B,).
        extents: frames that the encoder's own window produced, padding included, (B,).
    """

    states: tuple[Tensor, ...]
    lengths: Tensor
    extents: Tensor


class Embeds(NamedTuple):
    """Embeddings for the backbone: values (B, N, W), zero past each row's lengths (B,)."""

    values: Tensor
    lengths: Tensor


class Vocab(NamedTuple):
    """Size and special ids of a backbone's vocabulary; ``mask`` is None for a causal one."""

    size: int
    eos: int
    pad: int
    mask: int | None


class Noised(NamedTuple):
    """A corrupted answer.

    Attributes:
        tokens: the sequence with masks written in, (B, L).
        masked: which tokens are to be predicted, (B, L) bool.
        weights: the weight of each token's loss, (B, L); zero where not ``masked``.
        answer: which tokens belong to the answer, (B, L) bool.
    """

    tokens: Tensor
    masked: Tensor
    weights: Tensor
    answer: Tensor


class Step(NamedTuple):
    """What a sampler yields after each call of ``denoise``.

    Attributes:
        tokens: the answers as they stand, (B, A) with the mask id where undecided.
        final: which of them will not change any more, (B, A) bool.
        confidence: probability of each token when it was chosen, (B, A); 0 where undecided.
    """

    tokens: Tensor
    final: Tensor
    confidence: Tensor


class Generation(NamedTuple):
    """Answers of a batch: a LongTensor of ``max_tokens`` per row, and calls of the backbone."""

    tokens: list[Tensor]
    forwards: int


class Answer(NamedTuple):
    """Text and tokens of an answer (lists of both for a batch), and calls of the backbone."""

    text: Any
    tokens: Any
    forwards: int


class Loss(NamedTuple):
    """An objective's sum and the weight to divide it by, with what it was measured on."""

    sum: Tensor
    weight: Tensor
    hidden: Tensor
    noised: Noised


class Denoise(Protocol):
    """One pass of the backbone over some slots of the canvas (see ``diffa.canvas.denoiser``)."""

    def __call__(
        self,
        recompute: Tensor | None,
        rows: Tensor,
        *,
        sees: Tensor | None = None,
        write: bool = True,
    ) -> Tensor:
        """Recompute slots (B, K), or all where None, and return logits (B, R, V) of ``rows``."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """Audio (B, S) at ``sample_rate`` with true lengths (B,) in samples -> ``Features``."""

    sample_rate: int
    out: FeatureSpec

    def __call__(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the hidden states of every layer."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """``Features`` -> ``Embeds``; ``out_lengths`` maps frame counts (B,) to embedding counts."""

    def __call__(self, features: Features) -> Embeds:
        """Return the embeddings of each row's true audio."""
        ...

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings (B,) rows of ``lengths`` (B,) frames become."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """Embeddings (B, S, W), positions (B, S) and a context -> hidden states (B, S, W)."""

    width: int
    vocab: Vocab
    decoding: Decoding
    tokenizer: Any

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., W)."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., W) -> logits (..., V)."""
        ...

    def __call__(self, embeds: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Return normalised hidden states, before the head."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Writes an answer into a canvas, yielding a ``Step`` after each call of ``denoise``."""

    decoding: Decoding

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Write the answers, yielding after each call of ``denoise``."""
        ...


@runtime_checkable
class Objective(Protocol):
    """Corrupts answers and measures how well hidden states restore them."""

    decoding: Decoding

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Corrupt ``tokens`` (B, L) where ``answer`` (B, L); row b draws from ``seeds[b]``."""
        ...

    def loss(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss of hidden (B, L, W) and the weight to divide it by."""
        ...
