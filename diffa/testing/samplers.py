"""Conformance of samplers, over a toy denoiser whose joint distribution is known exactly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffa.canvas.canvas import Canvas
from diffa.spec.schema import read_schema
from diffa.testing.parts import PartSuite, ensure, seeded
from diffa.testing.toy import CAUSAL, MASKED, Chaos, Joint, Law, Sure, ToyDenoise, toy_canvas
from diffa.types import Step, Vocab

PROMPTS = ([1, 2, 3], [4], [-1, -1, 0, 2, -1, 3, 3])  # -1: audio
LENGTHS = (1, 5, 12)


class SamplerSuite(PartSuite):
    """Checks of a sampler.

    Attributes:
        exact: Options, with a temperature, under which the sampler draws from the model's joint
            distribution. Required if the sampler has a temperature.
        edits: Whether the sampler may change tokens of a draft.
    """

    kind: ClassVar[str] = "sampler"
    exact: ClassVar[Mapping[str, Any] | None] = None
    edits: ClassVar[bool] = False

    @property
    def vocab(self) -> Vocab:
        """Return the toy vocabulary for the sampler's decoding."""
        return CAUSAL if self.cls.decoding == "causal" else MASKED

    def new(self, options: Mapping[str, Any] | None = None) -> Any:
        """Build the sampler for the toy vocabulary, with ``options`` over the suite's."""
        return self.make(options, vocab=self.vocab)

    def decode(
        self,
        law: Law,
        prompts: Sequence[Sequence[int]] = PROMPTS,
        length: int = 12,
        *,
        seeds: Sequence[int] | None = None,
        draft: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Canvas, list[Step], ToyDenoise]:
        """Run the sampler over a toy canvas to its end."""
        canvas = toy_canvas(prompts, length, seeds=seeds, draft=draft, vocab=self.vocab)
        denoise = ToyDenoise(canvas, law, most=20 * length + 20)
        steps = []
        for step in self.new(options)(canvas, denoise):
            steps.append(step)
            ensure(
                denoise.num_forwards == len(steps), "it must yield once after every forward pass"
            )
        return canvas, steps, denoise

    def test_it_declares_a_decoding(self) -> None:
        """``decoding`` is ``masked`` or ``causal``."""
        ensure(self.cls.decoding in ("masked", "causal"), f"decoding is {self.cls.decoding!r}")

    def test_it_ends_with_everything_decided(self) -> None:
        """No mask is left, for any predictions and any answer length."""
        for length in LENGTHS:
            canvas, steps, _ = self.decode(Chaos(), length=length)
            answer = canvas.answer
            undecided = self.vocab.pad if self.vocab.mask is None else self.vocab.mask
            ensure(not (answer == undecided).any(), "an answer token is left undecided")
            ensure(torch.equal(steps[-1].tokens, answer), "the last step is not the answer")
            ensure(steps[-1].final.all(), "the last step marks some tokens as not final")

    def test_final_tokens_do_not_change(self) -> None:
        """Steps have the answer's shape and probabilities, and final tokens stay the same."""
        _, steps, _ = self.decode(Chaos())
        for step in steps:
            shapes = {tuple(value.shape) for value in step}
            ensure(shapes == {(len(PROMPTS), 12)}, f"a step's shapes are {shapes}")
            ensure(step.final.dtype == torch.bool, "final is not bool")
            inside = (step.confidence >= 0) & (step.confidence <= 1 + 1e-6)
            ensure(inside.all(), "a confidence is not a probability")
            masks = step.tokens == self.vocab.mask
            ensure(not (step.final & masks).any(), "a mask is marked as final")
        for before, after in itertools.pairwise(steps):
            ensure(
                (after.final | ~before.final).all(), "a final token is not final in the next step"
            )
            same = torch.where(before.final, after.tokens == before.tokens, True)
            ensure(same.all(), "a final token changes")

    def test_the_prompt_is_never_touched(self) -> None:
        """Tokens, content, positions and validity of the prompt do not change."""
        fresh = toy_canvas(PROMPTS, 12, vocab=self.vocab)
        canvas, _, _ = self.decode(Chaos())
        for name in ("tokens", "content", "positions", "valid"):
            before = getattr(fresh, name)[:, : fresh.start]
            after = getattr(canvas, name)[: fresh.count, : fresh.start]
            ensure(torch.equal(before, after), f"the prompt's {name} changed")
        same = torch.equal(fresh.positions, canvas.positions[: fresh.count, : fresh.size])
        ensure(same, "the answer's positions changed")

    def test_draft_tokens_do_not_change(self) -> None:
        """Tokens of a draft do not change, unless ``edits`` is set or the sampler is causal."""
        if self.vocab.mask is None:
            return
        draft = torch.full((3, 12), MASKED.mask or 0)
        # The last row is done long before the others and must not change after that.
        draft[0, 4:7], draft[1, 0], draft[2, 2:] = torch.tensor([1, 2, 3]), 4, 0
        is_draft = draft != MASKED.mask
        canvas, steps, _ = self.decode(Chaos(), draft=draft)
        ensure(not canvas.undecided().any(), "a mask is left beside a draft")
        if not self.edits:
            for tokens in (*(step.tokens for step in steps), canvas.answer):
                ensure(torch.equal(tokens[is_draft], draft[is_draft]), "a draft's token changed")

    def test_certain_predictions_are_the_answer(self) -> None:
        """If all predictions are certain, they are the answer, each in its place and row."""
        answer = self.decode(Sure())[0].answer
        for row, prompt in enumerate(PROMPTS):
            law = _Recorder()
            self.decode(law, [prompt])
            expected = torch.tensor([law.predictions[place] for place in range(12)])
            ensure(torch.equal(answer[row], expected), f"row {row} is not what was predicted")

    def test_the_same_seeds_give_the_same_answer(self) -> None:
        """Random numbers depend on the rows' seeds only, not on a global generator."""
        for options in ({}, self.exact or {}):
            with seeded(1):
                state = torch.get_rng_state()
                first = self.decode(Chaos(), seeds=[3, 4, 5], options=options)[0].answer
                ensure(
                    torch.equal(state, torch.get_rng_state()), "torch's global generator was used"
                )
            for _ in range(3):
                again = self.decode(Chaos(), seeds=[3, 4, 5], options=options)[0].answer
                ensure(torch.equal(first, again), "the same seeds give another answer")

    def test_a_row_alone_is_the_row_in_a_batch(self) -> None:
        """Other rows with longer prompts or shorter answers change nothing."""
        for options in ({}, self.exact or {}):
            seeds = [11, 12, 13]
            batch = self.decode(Chaos(), seeds=seeds, options=options)[0].answer
            for row, prompt in enumerate(PROMPTS):
                alone = self.decode(Chaos(), [prompt], seeds=seeds[row : row + 1], options=options)
                same = torch.equal(alone[0].answer[0], batch[row])
                ensure(same, f"row {row} has another answer when it is alone")

    def test_samples_follow_the_model_exactly(self) -> None:
        """Under ``exact``, answers of three tokens follow the joint distribution."""
        if self.exact is None:
            options = read_schema(self.cls).options
            ensure("temperature" not in options, "the sampler has a temperature: set `exact`")
            return
        law, rows = Joint(), 4000
        canvas = self.decode(law, [[1]] * rows, 3, options=self.exact)[0]
        places = (canvas.answer * torch.tensor([9, 3, 1])).sum(dim=1)
        counts = torch.bincount(places, minlength=27)
        ensure(len(counts) == 27, "a token of probability 0 was drawn")
        expected = law.table.flatten()
        allowed = 5 * (expected * (1 - expected) / rows).sqrt() + 1 / rows
        off = (counts / rows - expected).abs() > allowed
        ensure(not off.any(), f"{int(off.sum())} of 27 answers have a wrong frequency")


class _Recorder(Sure):
    """Certain predictions that are recorded by place."""

    def __init__(self) -> None:
        self.predictions: dict[int, int] = {}

    def __call__(self, known: Tensor, place: Tensor, prompt: Tensor) -> Tensor:
        tokens = self.answer(place, prompt)
        for at, token in zip(place.tolist(), tokens.tolist(), strict=True):
            self.predictions.setdefault(at, token)  # guidance asks a second time, unconditionally
        return super().__call__(known, place, prompt)
