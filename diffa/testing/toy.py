"""A toy denoiser: takes the backbone's place in decoding, with an exactly known distribution.

Samplers only call ``denoise``, so this is enough to test them. The toy reads what a backbone reads
(content, positions, validity, branches), keeps what a KV cache keeps (attending to a slot that was
never computed is an error), and gets its logits from a law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.canvas.canvas import NO_TOKEN, Canvas
from diffa.types import BlockAttention, Embeds, Vocab

MASKED = Vocab(size=8, eos=5, pad=6, mask=7)
CAUSAL = Vocab(size=8, eos=5, pad=6, mask=None)
WORDS = 5  # tokens 0 to 4 are words

Law = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps known answer tokens (N, A; -1: unknown), place (N,) and a hash of the prompt (N,) to the
logits (N, V) of the token at that place."""

_NOT_COMPUTED = -2


def toy_canvas(
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    seeds: Sequence[int] | None = None,
    draft: Tensor | None = None,
    vocab: Vocab = MASKED,
    attention: BlockAttention | None = None,
) -> Canvas:
    """Return a canvas with one-hot embeddings; ``NO_TOKEN`` in a prompt is an audio slot.

    Args:
        prompts: Token ids of each row.
        length: Answer tokens per row.
        seeds: Seeds of the rows.
        draft: What the answers begin with instead of masks, (B, length).
        vocab: Vocabulary of the toy.
        attention: How a block-causal backbone attends. None: all slots attend to all.
    """
    count = len(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    text = torch.full((count, int(lengths.max())), NO_TOKEN)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = torch.tensor(prompt)
    begin = vocab.pad if vocab.mask is None else vocab.mask
    return Canvas(
        Embeds(_one_hot(text), lengths),
        text,
        torch.full((count, length), begin) if draft is None else draft.clone(),
        embed=_one_hot,
        vocab=vocab,
        seeds=torch.arange(count) if seeds is None else torch.tensor(seeds),
        attention=attention,
    )


class ToyDenoise:
    """``denoise`` over a toy canvas; counts forward passes and checks its arguments."""

    def __init__(self, canvas: Canvas, law: Law, *, most: int = 10_000) -> None:
        self.canvas, self.law, self.most = canvas, law, most
        self.num_forwards = 0
        self._cached = torch.full((0, 0), _NOT_COMPUTED)

    def __call__(
        self,
        recompute: Tensor | None,
        output_slots: Tensor,
        *,
        attn_mask: Tensor | None = None,
        write: bool = True,
    ) -> Tensor:
        """Compute slots (B, K; None: all); return the logits (B, R, V) of ``output_slots``."""
        self.num_forwards += 1
        if self.num_forwards > self.most:
            raise AssertionError(f"the sampler has not ended after {self.most} forward passes")
        if self.canvas.twins:
            output_slots = output_slots.repeat(2, 1)
            recompute = None if recompute is None else recompute.repeat(2, 1)
            attn_mask = None if attn_mask is None else attn_mask.repeat(2, 1, 1)
        predicted, attention = output_slots, self.canvas.attention
        if attention is not None and attention.shifted:
            output_slots = self.canvas.previous_slots(output_slots)
        slots = self._slots(recompute, output_slots)
        self._check(slots, output_slots)
        now = self._cache(slots, write=write)
        logits = torch.zeros(*output_slots.shape, self.canvas.vocab.size)
        row, column = (output_slots >= 0).nonzero(as_tuple=True)
        slot = output_slots[row, column]
        visible = self._visible(row, slot)
        if attn_mask is not None:
            order = slot if recompute is None else _first(recompute[row] == slot[:, None])
            visible = visible & attn_mask[row, order]
        if bool((visible & (now[row] == _NOT_COMPUTED)).any()):
            raise AssertionError("a slot that was never computed is attended to")
        known, prompt = self._known(row, now[row], visible)
        ahead = int(self.canvas.vocab.mask is None)  # a causal slot predicts the next token
        place = self._places()[row, predicted[row, column]] + ahead
        if bool(((place < 0) | (place >= self.canvas.length + ahead)).any()):
            raise AssertionError("output_slots has a slot that predicts no answer token")
        logits[row, column] = self.law(known, place.clamp(max=self.canvas.length - 1), prompt)
        logits[output_slots < 0, 0] = 50.0  # a conspicuous value: padding must not be read
        return logits

    def _slots(self, recompute: Tensor | None, output_slots: Tensor) -> Tensor:
        """Return which slots (B, S) are recomputed."""
        shape = (len(output_slots), self.canvas.size)
        if recompute is None:
            return (output_slots >= 0).any(dim=1, keepdim=True).expand(shape)
        recomputed = torch.zeros(len(output_slots), shape[1] + 1, dtype=torch.bool)
        recomputed.scatter_(1, torch.where(recompute < 0, shape[1], recompute), True)
        return recomputed[:, :-1]

    def _check(self, slots: Tensor, output_slots: Tensor) -> None:
        if len(output_slots) != len(self.canvas.tokens):
            raise AssertionError(
                f"{len(output_slots)} rows of a canvas of {len(self.canvas.tokens)}"
            )
        if output_slots.numel() and int(output_slots.max()) >= self.canvas.size:
            raise AssertionError("output_slots has a slot outside the canvas")
        if not bool((slots.gather(1, output_slots.clamp(min=0)) | (output_slots < 0)).all()):
            raise AssertionError("output_slots has a slot that is not recomputed")

    def _cache(self, slots: Tensor, *, write: bool) -> Tensor:
        """Return the tokens (B, S) that the toy's cache holds, ``_NOT_COMPUTED`` elsewhere."""
        grown = torch.full(slots.shape, _NOT_COMPUTED)
        grown[: self._cached.shape[0], : self._cached.shape[1]] = self._cached
        sure, token = self.canvas.content.max(dim=-1)
        now = torch.where(slots, torch.where(sure > 0.9, token, NO_TOKEN), grown)
        self._cached = now if write else grown
        return now

    def _visible(self, row: Tensor, slot: Tensor) -> Tensor:
        """Return which slots (N, S) each output slot may attend to."""
        canvas = self.canvas
        visible = canvas.valid[row]
        if canvas.branches is not None:
            own = canvas.branches[row, slot][:, None]
            visible = visible & ((canvas.branches[row] == 0) | (canvas.branches[row] == own))
        if canvas.vocab.mask is None:
            visible = visible & (canvas.positions[row] <= canvas.positions[row, slot][:, None])
        if canvas.attention is not None:
            blocks = canvas.block_numbers(canvas.attention.length)
            visible = visible & (blocks[row] <= blocks[row, slot][:, None])
        return visible

    def _places(self) -> Tensor:
        """Return the place in the answer of every slot, (B, S); -1 in the prompt."""
        canvas = self.canvas
        places = canvas.positions - canvas.positions[:, canvas.start : canvas.start + 1]
        prompt = torch.arange(canvas.size) < canvas.start
        return torch.where(prompt, -1, places)

    def _known(self, row: Tensor, now: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Return the visible answer tokens (N, A), -1 elsewhere, and a hash of the prompt (N,)."""
        canvas = self.canvas
        places = self._places()[row]
        counts = visible & (places >= 0) & (now >= 0) & (now != canvas.vocab.mask)
        known = torch.full((len(row), canvas.length), -1)
        tokens, at = torch.where(counts, now, -1), places.clamp(0, canvas.length - 1)
        known = known.scatter_reduce(1, at, tokens, "amax")
        hashes = _hash(now * 1009 + canvas.positions[row] + 17)
        return known, torch.where(visible & (places < 0), hashes, 0).sum(dim=1)


class Sure:
    """Certain predictions: ``answer`` gives the token, which depends on prompt and place."""

    def answer(self, place: Tensor, prompt: Tensor) -> Tensor:
        """Return the token (N,) at ``place`` after a prompt."""
        return _hash(prompt + _hash(place + 5)) % WORDS

    def __call__(self, known: Tensor, place: Tensor, prompt: Tensor) -> Tensor:
        """Return logits of a certain prediction."""
        return 30.0 * F.one_hot(self.answer(place, prompt), MASKED.size).float()


class Chaos:
    """Arbitrary logits between 0 and ``scale``, hashed from everything visible, so that any mix-up
    changes them. The mask and EOS are as likely as any word."""

    def __init__(self, scale: float = 6.0, end: bool = True) -> None:
        self.scale, self.end = scale, end

    def __call__(self, known: Tensor, place: Tensor, prompt: Tensor) -> Tensor:
        """Return hashed logits."""
        key = _hash(prompt + _hash(place))
        for column in range(known.shape[1]):
            mixed = _hash(key + known[:, column] * 31 + column)
            key = torch.where(known[:, column] >= 0, mixed, key)
        bits = _hash(key[:, None] + torch.arange(MASKED.size)) % 4096
        logits = bits / 4096 * self.scale
        logits[:, MASKED.pad] = -30.0
        if not self.end:
            logits[:, MASKED.eos] = -30.0
        return logits


class Joint:
    """A joint distribution (3, 3, 3) of the words 0, 1 and 2 at three places. Logits are the exact
    conditionals of a place given the decided tokens."""

    def __init__(self, table: Tensor | None = None) -> None:
        if table is None:
            table = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(5)) ** 3
        self.table = (table / table.sum()).double()

    def __call__(self, known: Tensor, place: Tensor, prompt: Tensor) -> Tensor:
        """Return log-probabilities of the three words; all other tokens have none."""
        mass = self.table.expand(len(known), 3, 3, 3)
        for column in range(3):
            decided = known[:, column]
            only = F.one_hot(decided.clamp(0, 2), 3).double()
            only = torch.where((decided < 0)[:, None], 1.0, only)
            shape = [len(known), 1, 1, 1]
            shape[column + 1] = 3
            mass = mass * only.view(shape)
        marginals = torch.stack([mass.sum((2, 3)), mass.sum((1, 3)), mass.sum((1, 2))], dim=1)
        conditional = marginals[torch.arange(len(known)), place].clamp(min=1e-30).log()
        return F.pad(conditional.float(), (0, MASKED.size - 3), value=-200.0)


def _one_hot(tokens: Tensor) -> Tensor:
    """Return one-hot embeddings (..., V); an audio slot is uniform over all tokens."""
    content = F.one_hot(tokens.clamp(min=0), MASKED.size).float()
    return torch.where((tokens < 0)[..., None], 1 / MASKED.size, content)


def _first(where: Tensor) -> Tensor:
    """Return the index (N,) of each row's first true value."""
    return where.int().argmax(dim=1)


def _hash(x: Tensor) -> Tensor:
    """Hash integers below about 2**31 to 0 .. 2**31 - 1, equal on every machine."""
    x = x * 6364136223846793005 + 1442695040888963407
    x = (x ^ ((x >> 29) & 0x7FFFFFFFF)) * 2862933555777941757
    return (x >> 33) & 0x7FFFFFFF
