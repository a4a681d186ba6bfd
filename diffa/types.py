"""The values that parts exchange, and the protocols that each kind of part implements.

Shapes: B rows of a batch, S samples or slots, T frames, N audio embeddings, L tokens, K recomputed
slots, R slots whose logits are returned, A answer tokens, W width, V vocabulary.

The protocols at the end are optional: a part that has their members gets the faster or the special
path, one without them works as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from diffa.canvas.canvas import Canvas
    from diffa.canvas.kv_cache import AttentionContext

Decoding = Literal["masked", "causal"]


class FeatureSpec(NamedTuple):
    """Shape of an encoder's output.

    An encoder of ``layers`` layers returns ``layers + 1`` states: the first is the embedding, the
    last one is taken after the final normalisation.

    Attributes:
        width: Width of one frame.
        layers: Transformer layers.
        rate: Frames per second.
        heads: Attention heads.
    """

    width: int
    layers: int
    rate: float
    heads: int


class Features(NamedTuple):
    """An encoder's hidden states.

    Attributes:
        states: Frames of every layer, each (B, T, width); zero past ``extents``.
        lengths: Frames of real audio, (B,).
        extents: Frames that the encoder produced, padding of its window included, (B,).
    """

    states: tuple[Tensor, ...]
    lengths: Tensor
    extents: Tensor


class Embeds(NamedTuple):
    """Embeddings for the backbone.

    Attributes:
        values: (B, N, W), zero past ``lengths``.
        lengths: Embeddings of each row, (B,).
        content: (B, N, W) ``values`` before the adapter added embeddings of word numbers, for
            auxiliary losses. None: the adapter adds none.
    """

    values: Tensor
    lengths: Tensor
    content: Tensor | None = None


class Vocab(NamedTuple):
    """Size and special token ids of a backbone's vocabulary.

    Attributes:
        size: Rows of the embedding.
        eos: Id of the end-of-sequence token.
        pad: Id of the padding token.
        mask: Id of the mask token. None for a causal backbone.
    """

    size: int
    eos: int
    pad: int
    mask: int | None


class BlockAttention(NamedTuple):
    """How a block-causal backbone attends: to the own block and to all blocks before it.

    Attributes:
        length: Positions per block.
        from_prompt: Whether blocks count from the end of the prompt, which is then one block, or
            from position 0.
        shifted: Whether the state of a slot predicts the token of the next slot.
    """

    length: int
    from_prompt: bool
    shifted: bool

    def offset(self, prompt_lengths: Tensor, width: int) -> Tensor:
        """Return how many slots of the prompt (B,) lie in the answer's first block of a width."""
        return prompt_lengths * 0 if self.from_prompt else prompt_lengths % width


class Noised(NamedTuple):
    """A corrupted answer.

    Attributes:
        tokens: Token ids with masks written in, (B, L).
        masked: Tokens to be predicted, (B, L) bool.
        weights: Loss weight of each token, (B, L); zero where not ``masked``.
        answer: Tokens of the answer, (B, L) bool.
    """

    tokens: Tensor
    masked: Tensor
    weights: Tensor
    answer: Tensor


class Step(NamedTuple):
    """The state of the answers after one call of ``denoise``.

    Attributes:
        tokens: The current answers, (B, A), with the mask id where undecided.
        final: Tokens that will not change any more, (B, A) bool.
        confidence: Probability of each token when it was written, (B, A); 0 where undecided.
    """

    tokens: Tensor
    final: Tensor
    confidence: Tensor


class Generation(NamedTuple):
    """Answers of a batch.

    Attributes:
        tokens: Token ids of each row, (A,) int64.
        num_forwards: Forward passes of the backbone.
        confidence: Mean log-probability of each row's tokens when they were written, up to EOS.
    """

    tokens: list[Tensor]
    num_forwards: int
    confidence: list[float]


class Answer(NamedTuple):
    """An answer, or the answers of a batch. It prints as its text.

    Attributes:
        text: The answer; a list of them for a batch.
        tokens: Its token ids, (A,); a list of them for a batch.
        num_forwards: Forward passes of the backbone.
        confidence: Mean log-probability of its tokens when they were written; a list for a batch.
    """

    text: Any
    tokens: Any
    num_forwards: int
    confidence: Any

    def __str__(self) -> str:
        return self.text if isinstance(self.text, str) else "\n".join(self.text)


class Loss(NamedTuple):
    """A summed loss.

    Attributes:
        sum: Sum of the weighted token losses.
        weight: Divisor of the sum; the mean is ``sum / weight``.
        hidden: Hidden states that the loss was computed from, (B, L, W).
        noised: The corrupted rows.
        num_correct: Number of restored tokens. None: the objective is no ``CountingObjective``.
        num_tokens: Number of masked tokens. None: as for ``num_correct``.
    """

    sum: Tensor
    weight: Tensor
    hidden: Tensor
    noised: Noised
    num_correct: Tensor | None = None
    num_tokens: Tensor | None = None


class Preference(NamedTuple):
    """The preference loss of P pairs.

    Attributes:
        loss: (P,) -log sigmoid(margin).
        margin: (P,) beta times the policy's gain on the chosen answer over its gain on the
            rejected one, both against the reference.
    """

    loss: Tensor
    margin: Tensor


class Steady(NamedTuple):
    """What the passes over a canvas have in common while rows stay in their blocks.

    Attributes:
        rows: Rows that are computed, twins included. None: all.
        memo: What a pass derived from its slots, for the next pass over the same slots.
    """

    rows: Tensor | None
    memo: dict[str, Any]

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` returns, computed once for all passes over the same slots."""
        if name not in self.memo:
            self.memo[name] = compute()
        return self.memo[name]

    @classmethod
    def of(cls, canvas: Canvas, active: Tensor) -> Steady:
        """Return what passes over the ``active`` (B,) rows of a canvas have in common; waits."""
        if bool(active.all()):
            return cls(None, {})
        rows = (active.repeat(2) if canvas.twins else active).nonzero()[:, 0]
        return cls(rows, {})


class Denoise(Protocol):
    """One forward pass over some slots of the canvas (see ``diffa.canvas.denoiser``)."""

    def __call__(
        self,
        recompute: Tensor | None,
        output_slots: Tensor,
        *,
        attn_mask: Tensor | None = None,
        write: bool = True,
    ) -> Tensor:
        """Recompute slots (B, K), None for all; return logits (B, R, V) of ``output_slots``."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """Maps audio (B, S) at ``sample_rate``, with lengths (B,) in samples, to ``Features``."""

    sample_rate: int
    out: FeatureSpec

    def __call__(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the hidden states of every layer."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """Maps ``Features`` to ``Embeds``; ``out_lengths`` maps frame counts to embedding counts."""

    def __call__(self, features: Features) -> Embeds:
        """Return the embeddings of each row's true audio."""
        ...

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many embeddings (B,) rows of ``lengths`` (B,) frames become."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """Maps embeddings (B, S, W), positions (B, S) and a context to hidden states (B, S, W)."""

    width: int
    vocab: Vocab
    decoding: Decoding
    tokenizer: Any

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (..., W) of token ids (...)."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., W)."""
        ...

    def __call__(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Return normalised hidden states, before the head."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Decodes the answers of a canvas, step by step."""

    decoding: Decoding

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Write the answers, yielding a ``Step`` after each call of ``denoise``."""
        ...


@runtime_checkable
class Objective(Protocol):
    """Corrupts answers and computes the loss of restoring them."""

    decoding: Decoding

    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        """Corrupt ``tokens`` (B, L) where ``answer`` (B, L); row b draws from ``seeds[b]``."""
        ...

    def loss(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss of hidden (B, L, W) and the weight to divide it by."""
        ...


@runtime_checkable
class PartialBackbone(Protocol):
    """Optional: a backbone with ``partial = True`` may leave hidden states unfinished that
    ``AttentionContext.output_slots`` does not name. diffa's Transformer skips its last layer."""

    partial: bool


@runtime_checkable
class RaggedBackbone(Protocol):
    """Optional: a backbone with ``ragged = True`` packs rows of different lengths end to end."""

    ragged: bool


@runtime_checkable
class BoundedBackbone(Protocol):
    """Optional: the longest sequence, in slots, that a backbone can read; None for any."""

    max_length: int | None


@runtime_checkable
class BlockCausalBackbone(Protocol):
    """Optional: a backbone whose slots attend to their own block and to the blocks before it;
    ``block_length`` None stands for attention without blocks (see ``BlockAttention``)."""

    block_length: int | None
    block_origin: Literal["sequence", "prompt"]
    shifted: bool


@runtime_checkable
class BlockObjective(Protocol):
    """Optional: an objective that trains answers block by block, ``block_length`` tokens each;
    None for whole answers (block diffusion, arXiv 2503.09573)."""

    block_length: int | None


@runtime_checkable
class SecondCorruption(Protocol):
    """Optional: an objective that measures every batch under a second corruption too."""

    def second(self, tokens: Tensor, noised: Noised, seeds: Tensor) -> Noised | None:
        """Return the second corruption of ``tokens`` (B, L), or None."""
        ...


@runtime_checkable
class CountingObjective(Protocol):
    """Optional: an objective that also counts which masked tokens the model restores."""

    def measure(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the summed loss, its weight, the restored and the masked tokens."""
        ...


@runtime_checkable
class PairedObjective(Protocol):
    """Optional: an objective with ``paired = True`` compares a chosen and a rejected answer.

    Rows come in pairs: chosen, rejected, chosen, rejected ... The learner ``preferences`` calls
    these members.
    """

    paired: bool
    shared_masks: bool
    sft_weight: float

    def draws(
        self, tokens: Tensor, answer: Tensor, seeds: Tensor, *, apart: bool = False
    ) -> Noised:
        """Return several corruptions of rows (B, L), (draws * B, L), one draw after another."""
        ...

    def bounds(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], tokens: Tensor, noised: Noised
    ) -> Tensor:
        """Return bounds (B,) on the log-likelihood of answers from states (draws * B, L, W)."""
        ...

    def compare(self, policy: Tensor, reference: Tensor) -> Preference:
        """Compare the bounds (2 P,) of P pairs under policy and reference."""
        ...


def max_length(backbone: Backbone) -> int | None:
    """Return the longest sequence that a backbone can read, in slots; None for any."""
    return backbone.max_length if isinstance(backbone, BoundedBackbone) else None


def block_attention(backbone: Backbone) -> BlockAttention | None:
    """Return how a block-causal backbone attends; None for any other."""
    if not isinstance(backbone, BlockCausalBackbone) or backbone.block_length is None:
        return None
    from_prompt = backbone.block_origin == "prompt"
    return BlockAttention(backbone.block_length, from_prompt, backbone.shifted)


if TYPE_CHECKING:

    class EncoderModule(Module, Encoder):
        """An encoder in a model: a module with the members of ``Encoder``."""

    class BackboneModule(Module, Backbone):
        """A backbone in a model: a module with the members of ``Backbone``."""
