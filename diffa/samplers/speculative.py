"""Lossless self-speculation: several steps drafted from one forward and checked in the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers.acceptance import Rule, positive
from diffa.samplers.blocks import Blocks, Place, end, snapshot
from diffa.samplers.drafts import Draft, extend, look
from diffa.samplers.predictions import Order, Predictions, read
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class Speculative:
    """Decode the tokens of ``blockwise`` with a dual cache in fewer passes, by self-speculation.

    Each pass also reads drafts of the block one, two, ... steps ahead, each in a branch of its own,
    and takes as many steps as the drafts predicted right (FreeDave, arXiv 2510.00294).

    Args:
        vocab: The backbone's vocabulary.
        draft_steps: Most decoding steps that one forward pass can take.
        block_length: Answer tokens per block (LLaDA).
        steps: Denoising steps for the whole answer, as in ``blockwise``. Default: one token per
            step.
        threshold: Accept every token whose probability reaches this value (Fast-dLLM). Excludes
            ``steps``.
        ranking: Order in which masked tokens are accepted: highest confidence, margin to the second
            token, lowest entropy, or random.
        temperature: Sampling temperature. Default: take the most likely token.
        stop_at_eos: End a row once all tokens before its first EOS are decided; the rest becomes
            EOS.

    Raises:
        SpecError: steps and threshold together, or a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        draft_steps: int = 4,
        block_length: int = 32,
        steps: int | None = None,
        threshold: float | None = None,
        ranking: Order = "confidence",
        temperature: float = 0.0,
        stop_at_eos: bool = True,
    ) -> None:
        self.rule = Rule(block_length=block_length, steps=steps, threshold=threshold)
        self.rule.check_ranking(ranking)
        self.ranking: Order = ranking
        positive("temperature", temperature)
        if draft_steps < 1:
            raise SpecError(f"draft_steps must be at least 1, got {draft_steps}")
        self.vocab, self.draft_steps, self.block_length, self.stop_at_eos = (
            vocab,
            draft_steps,
            block_length,
            stop_at_eos,
        )
        self.temperature = temperature

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""
        width, blocks = min(self.block_length, canvas.length), Blocks(canvas, self.block_length)
        given = ~canvas.undecided()
        slots = [canvas.add_scratch(width, branch=d) for d in range(1, self.draft_steps)]
        shadows = torch.cat(slots) if slots else canvas.tokens.new_zeros(0)
        draft = Draft(canvas.tokens.new_zeros(canvas.count, len(slots), width), canvas.seeds < 0)
        while (place := blocks.enter()) is not None:
            own, there = self._slots(canvas, place, width)
            tokens = canvas.tokens[: canvas.count].gather(1, own)
            drafted = draft.there & ~place.fresh & place.alive
            both = torch.cat([tokens[:, None], draft.tokens], dim=1)
            logits = look(canvas, denoise, place, own, there, both, drafted, shadows)
            taken, draft = self._follow(canvas, place, logits, own, there, both, drafted)
            if self.stop_at_eos:
                end(canvas, given)
            blocks.advance(taken)
            yield snapshot(canvas, given=given if self.stop_at_eos else None)

    def _slots(self, canvas: Canvas, place: Place, width: int) -> tuple[Tensor, Tensor]:
        """The slots of each row's block (B, W), and which of them there are."""
        own = place.first[:, None] + torch.arange(width, device=place.first.device)
        there = (own < place.end[:, None]) & place.alive[:, None]
        return own.clamp(max=canvas.start + canvas.length - 1), there

    def _follow(
        self,
        canvas: Canvas,
        place: Place,
        logits: Tensor,
        own: Tensor,
        there: Tensor,
        both: Tensor,
        drafted: Tensor,
    ) -> tuple[Tensor, Draft]:
        """Take steps while the drafts foresaw them; return how many per row, and new drafts."""
        now, going, taken = both[:, 0], place.alive, torch.zeros_like(place.step)
        score, chosen = torch.zeros_like(logits[:, 0, :, 0]), now
        for depth in range(both.shape[1]):
            masked = (now == canvas.vocab.mask) & there & going[:, None]
            going = masked.any(dim=1)
            here = place._replace(
                rows=torch.where(masked, own, -1),
                places=own - canvas.start,
                step=place.step + taken,
                since=place.since + taken,
            )
            predictions = self._read(canvas, logits[:, depth], here)
            take = self.rule.take(predictions, here, canvas.length, None) & masked
            canvas.write(torch.where(take, own, -1), predictions.tokens, predictions.confidence)
            now = torch.where(take, predictions.tokens, now)
            taken = taken + going.long()
            score = torch.where(going[:, None], predictions.score, score)
            chosen = torch.where(going[:, None], predictions.tokens, chosen)
            if depth + 1 < both.shape[1]:
                foreseen = (now == both[:, depth + 1]) | ~there
                going = going & drafted & foreseen.all(dim=1)
        ahead = place._replace(since=place.since + taken)
        draft = extend(
            self.rule,
            ahead,
            self.draft_steps - 1,
            now,
            there,
            chosen,
            score,
            length=canvas.length,
            mask=canvas.vocab.mask,
        )
        return taken, draft

    def _read(self, canvas: Canvas, logits: Tensor, place: Place) -> Predictions:
        return read(
            logits,
            seeds=canvas.seeds,
            step=place.step,
            places=place.places,
            ranking=self.ranking,
            temperature=self.temperature,
        )
