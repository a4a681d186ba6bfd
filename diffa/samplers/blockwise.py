"""Iterative unmasking in blocks, left to right: LLaDA's, DIFFA's and Fast-dLLM's decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers import select
from diffa.samplers.draws import categorical, uniform
from diffa.types import Denoise, Step, Vocab

if TYPE_CHECKING:
    from diffa.canvas import Canvas

Order = Literal["confidence", "margin", "entropy", "random"]


class Guess(NamedTuple):
    """What one forward says of the asked slots: tokens, their probability, and a score for the
    order of unmasking, each (B, R)."""

    tokens: Tensor
    confidence: Tensor
    score: Tensor


class Blockwise:
    """Unmask blocks from left to right, several tokens per forward by a rule.

    Args:
        vocab: the backbone's vocabulary.
        block: answer tokens per block.
        steps: forwards over the whole answer, spread over blocks by width, at least one each
            (LLaDA, arXiv 2502.09992). The default is one per token.
        threshold: instead, accept probabilities of at least this (Fast-dLLM, arXiv 2505.22618).
        factor: instead, accept n tokens while (n + 1)(1 - c_n) < factor (Fast-dLLM; DIFFA-2: 1.0).
        entropy: instead, accept while the summed entropy stays within this (EB, arXiv 2505.24857).
        order: what ranks masked tokens: probability, gap to the second, entropy, or chance.
        temperature: of the tokens; 0 takes the likeliest.
        guidance: 0 for none; logits are u + (guidance + 1)(c - u), u without its condition.
        unconditional: what u is without: the prompt's ``text`` (DIFFA), the ``audio``, or both.
        cache: ``none`` recomputes everything at every step; ``prefix`` remembers what lies before
            the block, ``dual`` also what lies behind it; both refresh as a block begins.
        stop: end a row when all tokens before its first EOS are decided; the rest becomes EOS.

    Raises:
        SpecError: more than one rule, or a number out of its range.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        vocab: Vocab,
        *,
        block: int = 32,
        steps: int | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        entropy: float | None = None,
        order: Order = "confidence",
        temperature: float = 0.0,
        guidance: float = 0.0,
        unconditional: Literal["text", "audio", "both"] = "text",
        cache: Literal["none", "prefix", "dual"] = "none",
        stop: bool = True,
    ) -> None:
        self.vocab, self.block, self.steps = vocab, block, steps
        self.threshold, self.factor, self.entropy = threshold, factor, entropy
        self.order: Order = "entropy" if entropy is not None else order
        self.temperature, self.guidance, self.unconditional = temperature, guidance, unconditional
        self.cache, self.stop = cache, stop
        rules = {"steps": steps, "threshold": threshold, "factor": factor, "entropy": entropy}
        self._check({name: value for name, value in rules.items() if value is not None}, order)

    def _check(self, rules: dict[str, float], order: Order) -> None:
        if len(rules) > 1:
            raise SpecError(f"choose one of {' and '.join(rules)}: each decides how many tokens")
        for name, value in {"block": self.block, "steps": rules.get("steps", 1)}.items():
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise SpecError(f"threshold must lie between 0 and 1, got {self.threshold}")
        numbers = {"factor": self.factor or 0.0, "entropy": self.entropy or 0.0}
        for name, value in {**numbers, "temperature": self.temperature}.items():
            if not 0 <= value < float("inf"):
                raise SpecError(f"{name} must be 0 or more, got {value}")
        if ("threshold" in rules or "factor" in rules) and order in ("entropy", "random"):
            raise SpecError(f"order {order!r} gives no probability for {next(iter(rules))} to test")
        if "entropy" in rules and order not in ("confidence", "entropy"):
            raise SpecError(f"order {order!r} has no part in the entropy rule; leave it out")

    def __call__(self, canvas: Canvas, denoise: Denoise) -> Iterator[Step]:
        """Fill the canvas's answers, yielding after every forward."""
        if self.guidance:
            canvas.branch(self.unconditional)
        columns = torch.arange(self.block, device=canvas.tokens.device)
        block = torch.full_like(canvas.seeds, -1)
        step, entered, due = (torch.zeros_like(block) for _ in range(3))
        masked = canvas.undecided()
        while bool((alive := masked.any(dim=1)).any()):
            now = torch.where(alive, masked.int().argmax(dim=1) // self.block, block)
            fresh = (now != block) & alive
            places = now[:, None] * self.block + columns
            inside = alive[:, None] & (places < canvas.length)
            places = places.clamp(max=canvas.length - 1)
            open_ = masked.gather(1, places) & inside
            entered, due = torch.where(fresh, step, entered), torch.where(fresh, open_.sum(1), due)
            rows = self._rows(torch.where(open_, canvas.start + places, -1))
            recompute, write = self._recompute(canvas, alive, fresh, now, inside)
            logits = denoise(recompute, rows, write=write)
            guess = self._read(logits, canvas.seeds, step, rows - canvas.start)
            quota = self._quota(now, step - entered, due, canvas.length)
            take = self._take(guess.score, rows >= 0, quota)
            canvas.write(torch.where(take, rows, -1), guess.tokens, guess.confidence)
            if self.stop:
                self._end(canvas)
            block, step, masked = now, step + 1, canvas.undecided()
            yield Step(canvas.answer.clone(), ~masked, canvas.confidence.clone())

    def _rows(self, slots: Tensor) -> Tensor:
        """Ask for masked slots alone. A GPU takes the whole block: a fixed shape, no waiting."""
        if slots.is_cuda:
            return slots
        most = int((slots >= 0).sum(dim=1).max())
        first = (slots < 0).sort(dim=1, stable=True).indices[:, :most]
        return slots.gather(1, first)

    def _recompute(
        self, canvas: Canvas, alive: Tensor, fresh: Tensor, block: Tensor, inside: Tensor
    ) -> tuple[Tensor | None, bool]:
        """Which slots to recompute (None: all), and whether the memory is to keep them."""
        keep = self.cache != "none"
        whole = alive if not keep else fresh
        if bool((whole | ~alive).all()):
            return None, keep
        slots = torch.arange(canvas.size, device=block.device).expand(canvas.count, -1)
        first = canvas.start + block * self.block
        last = canvas.size if self.cache == "prefix" else first + inside.sum(dim=1)
        ends = last if isinstance(last, int) else last[:, None]
        window = (slots >= first[:, None]) & (slots < ends) & alive[:, None]
        chosen = torch.where(whole[:, None], canvas.valid[: canvas.count], window)
        most = int(chosen.sum(dim=1).max())
        picked = (~chosen).sort(dim=1, stable=True).indices[:, :most]
        return torch.where(chosen.gather(1, picked), picked, -1), keep

    def _read(self, logits: Tensor, seeds: Tensor, step: Tensor, places: Tensor) -> Guess:
        """Tokens, probabilities and scores from one float32 pass over logits (B or 2B, R, V).

        ``places`` (B, R) count from the answer's start, so that draws do not depend on the prompt.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.guidance:
            given, without = logits.chunk(2)
            logits = without + (self.guidance + 1) * (given - without)
        logits[..., self.vocab.mask] = -torch.inf  # an accepted mask would stay undecided
        best, tokens = logits.max(dim=-1)
        total = logits.logsumexp(dim=-1)
        if self.temperature:
            draws = uniform(seeds, step, places, stream=1)
            tokens = categorical(logits, self.temperature, draws)
            best = logits.gather(-1, tokens[..., None])[..., 0]
        confidence = (best - total).exp()
        if self.order == "random":
            return Guess(tokens, confidence, uniform(seeds, step, places, stream=2))
        if self.order == "margin":
            top = (logits.topk(2, dim=-1).values - total[..., None]).exp()
            return Guess(tokens, confidence, top[..., 0] - top[..., 1])
        if self.order == "entropy":
            logs = logits - total[..., None]
            return Guess(tokens, confidence, (logs.exp() * logs.clamp(min=-1e4)).sum(dim=-1))
        return Guess(tokens, confidence, confidence)

    def _take(self, score: Tensor, masked: Tensor, quota: Tensor) -> Tensor:
        """Apply the one rule that is set."""
        if self.threshold is not None:
            return select.threshold(score, masked, self.threshold)
        if self.factor is not None:
            return select.factor(score, masked, self.factor)
        if self.entropy is not None:
            return select.entropy_bound(-score, masked, self.entropy)
        return select.fixed(score, masked, quota)

    def _quota(self, block: Tensor, step: Tensor, masks: Tensor, length: int) -> Tensor:
        """Tokens for a block's ``step``-th forward: its masks split evenly, remainder first."""
        total = min(self.steps or length, length)
        ends = [(block_end * total) // length for block_end in self._ends(length)]
        spread = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        steps = torch.tensor(spread, device=block.device).clamp(min=1)[block.clamp(min=0)]
        return masks // steps + (step < masks % steps).long()

    def _ends(self, length: int) -> list[int]:
        return [min(end + self.block, length) for end in range(0, length, self.block)]

    def _end(self, canvas: Canvas) -> None:
        """Fill rows with EOS behind a first EOS that has nothing undecided before it."""
        answer = canvas.answer
        ended = (answer == self.vocab.eos).cumsum(dim=1) > 0
        settled = ~((answer == self.vocab.mask) & ~ended).any(dim=1, keepdim=True)
        behind = ended & settled & (answer != self.vocab.eos)
        if bool(behind.any()):
            canvas.fill(behind, self.vocab.eos)
