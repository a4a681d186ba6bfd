"""Lossless self-speculation: draft several steps in one pass, verify them in the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffa.errors import check_at_least, check_non_negative
from diffa.samplers.acceptance import AcceptanceRule
from diffa.samplers.blocks import (
    BlockState,
    BlockTracker,
    block_slots,
    fill_after_eos,
    make_step,
)
from diffa.samplers.drafts import BlockView, Drafts, draft_ahead, read_versions
from diffa.samplers.predictions import Predictions, Ranking, predict
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
        ranking: Ranking = "confidence",
        temperature: float = 0.0,
        stop_at_eos: bool = True,
    ) -> None:
        self.rule = AcceptanceRule(block_length=block_length, steps=steps, threshold=threshold)
        self.rule.check_ranking(ranking)
        check_non_negative(temperature=temperature)
        check_at_least(1, draft_steps=draft_steps)
        self.ranking: Ranking = ranking
        self.vocab, self.draft_steps, self.block_length = vocab, draft_steps, block_length
        self.temperature, self.stop_at_eos = temperature, stop_at_eos

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the masks of the canvas's answers, yielding after every forward pass."""
        width = min(self.block_length, canvas.length)
        blocks, draft = BlockTracker(canvas, self.block_length), ~canvas.undecided()
        depth = self.draft_steps - 1
        parts = [canvas.add_scratch(width, branch=branch + 1) for branch in range(depth)]
        scratch = torch.cat(parts) if parts else canvas.tokens.new_zeros(0)
        no_tokens = canvas.tokens.new_zeros(canvas.count, depth, width)
        drafts = Drafts(no_tokens, torch.zeros_like(canvas.seeds, dtype=torch.bool))
        while (state := blocks.current()) is not None:
            view = BlockView(*block_slots(canvas, state, width))
            block = canvas.tokens[: canvas.count].gather(1, view.slots)
            versions = torch.cat([block[:, None], drafts.tokens], dim=1)
            has_drafts = drafts.exists & ~state.entered & state.active
            logits = read_versions(canvas, denoise, state, view, versions, has_drafts, scratch)
            num_steps, drafts = self._verify(canvas, state, view, logits, versions, has_drafts)
            if self.stop_at_eos:
                fill_after_eos(canvas, draft)
            blocks.advance(num_steps)
            yield make_step(canvas, draft=draft if self.stop_at_eos else None)

    def _verify(
        self,
        canvas: Canvas,
        state: BlockState,
        view: BlockView,
        logits: Tensor,
        versions: Tensor,
        has_drafts: Tensor,
    ) -> tuple[Tensor, Drafts]:
        """Take the sampler's steps while the drafts predicted them.

        Step k is exact if versions 0 .. k - 1 became versions 1 .. k: then the logits of version k
        are those that the plain sampler would have computed.

        Returns:
            How many steps each row took, (B,), and new drafts.
        """
        block, going, num_steps = versions[:, 0], state.active, torch.zeros_like(state.step)
        score, tokens = torch.zeros_like(logits[:, 0, :, 0]), block
        for depth in range(versions.shape[1]):
            masked = (block == canvas.vocab.mask) & view.exists & going[:, None]
            going = masked.any(dim=1)
            here = state._replace(
                masked_slots=torch.where(masked, view.slots, -1),
                places=view.slots - canvas.start,
                step=state.step + num_steps,
                block_step=state.block_step + num_steps,
            )
            predictions = predict(
                logits[:, depth], seeds=canvas.seeds, step=here.step, places=here.places,
                ranking=self.ranking, temperature=self.temperature,
            )  # fmt: skip
            accepted = self.rule.accept(predictions, here) & masked
            slots = torch.where(accepted, view.slots, -1)
            canvas.write(slots, predictions.tokens, predictions.confidence)
            block = torch.where(accepted, predictions.tokens, block)
            num_steps = num_steps + going.long()
            score = torch.where(going[:, None], predictions.score, score)
            tokens = torch.where(going[:, None], predictions.tokens, tokens)
            if depth + 1 < versions.shape[1]:
                predicted = (block == versions[:, depth + 1]) | ~view.exists
                going = going & has_drafts & predicted.all(dim=1)
        ahead = state._replace(block_step=state.block_step + num_steps)
        latest = Predictions(tokens, score, score, score, score)  # rules read tokens and score only
        depth = self.draft_steps - 1
        mask_id = canvas.vocab.mask
        return num_steps, draft_ahead(self.rule, ahead, depth, block, view.exists, latest, mask_id)
