"""A sound sampler, and samplers and objectives with one fault each."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from diffa.objectives.masked import Masked
from diffa.samplers.rng import sample_categorical, slot_uniform
from diffa.types import Noised, Step, Vocab


class Steady:
    """A sound sampler: from left to right, one token at a time."""

    decoding: Literal["masked"] = "masked"

    def __init__(self, vocab: Vocab, *, temperature: float = 0.0) -> None:
        self.vocab, self.temperature = vocab, temperature

    def places(self, canvas: Any) -> Any:
        while bool((masked := canvas.undecided()).any()):
            at = masked.int().argmax(1)
            yield torch.where(masked.any(1), canvas.start + at, -1)[:, None]

    def choose(self, canvas: Any, logits: Tensor, rows: Tensor) -> Tensor:
        if not self.temperature:
            return logits.argmax(-1)
        places = rows - canvas.start
        draws = slot_uniform(canvas.seeds, places[:, 0], places, stream=1)
        return sample_categorical(logits, self.temperature, draws)

    def logits(self, denoise: Any, rows: Tensor) -> Tensor:
        return denoise(None, rows)

    def __call__(self, canvas: Any, denoise: Any) -> Any:
        for rows in self.places(canvas):
            logits = self.logits(denoise, rows)
            logits[..., self.vocab.mask] = -torch.inf
            canvas.write(rows, self.choose(canvas, logits, rows), torch.ones_like(rows) * 0.5)
            yield self.step(canvas)

    def step(self, canvas: Any) -> Step:
        return Step(canvas.answer.clone(), ~canvas.undecided(), canvas.confidence.clone())


class LeavesAMask(Steady):
    def places(self, canvas: Any) -> Any:
        for rows in super().places(canvas):
            if int(rows.max()) == canvas.size - 1:
                return
            yield rows


class TouchesThePrompt(Steady):
    def __call__(self, canvas: Any, denoise: Any) -> Any:
        canvas.write(torch.zeros(canvas.count, 1).long(), torch.zeros(canvas.count, 1).long())
        yield from super().__call__(canvas, denoise)


class TouchesTheDraft(Steady):
    def places(self, canvas: Any) -> Any:
        for place in range(canvas.length):
            yield torch.full((canvas.count, 1), canvas.start + place)


class GlobalChance(Steady):
    def choose(self, canvas: Any, logits: Tensor, rows: Tensor) -> Tensor:
        return logits.add(torch.rand(logits.shape)).argmax(-1)


class OneSeedForAll(Steady):
    def choose(self, canvas: Any, logits: Tensor, rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(canvas.seeds[0]))
        return logits.add(torch.rand(logits.shape, generator=generator)).argmax(-1)


class Cold(Steady):
    def __init__(self, vocab: Vocab, *, temperature: float = 0.0) -> None:
        super().__init__(vocab, temperature=0.7 * temperature)


class SaysTheMask(Steady):
    def __call__(self, canvas: Any, denoise: Any) -> Any:
        for rows in self.places(canvas):
            logits = self.logits(denoise, rows)
            canvas.write(rows, logits.argmax(-1), torch.ones_like(rows) * 0.5)
            yield self.step(canvas)


class Stale(Steady):
    def logits(self, denoise: Any, rows: Tensor) -> Tensor:
        return denoise(rows, rows)


class Silent(Steady):
    def __call__(self, canvas: Any, denoise: Any) -> Any:
        steps = list(super().__call__(canvas, denoise))
        yield steps[-1]


class Shifted(Steady):
    def logits(self, denoise: Any, rows: Tensor) -> Tensor:
        return super().logits(denoise, rows).roll(1, dims=0)


class Wavering(Steady):
    def step(self, canvas: Any) -> Step:
        return super().step(canvas)._replace(final=torch.ones_like(canvas.undecided()))


class Undeclared(Steady):
    def __init__(self, vocab: Vocab, **options: Any) -> None:
        super().__init__(vocab, temperature=options.get("temperature", 0.0))


class CorruptsThePrompt(Masked):
    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        return super().corrupt(tokens, torch.ones_like(answer), seeds)._replace(answer=answer)


class GlobalNoise(Masked):
    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        return super().corrupt(tokens, answer, torch.randint(0, 1000, seeds.shape))


class BatchNoise(Masked):
    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        return super().corrupt(tokens, answer, seeds + tokens.shape[1])


class Unweighted(Masked):
    def corrupt(self, tokens: Tensor, answer: Tensor, seeds: Tensor) -> Noised:
        noised = super().corrupt(tokens, answer, seeds)
        return noised._replace(weights=noised.masked.float())


class Doubled(Masked):
    def loss(self, hidden: Tensor, head: Any, tokens: Tensor, noised: Noised) -> Any:
        total, weight = super().loss(hidden, head, tokens, noised)
        return 2 * total, weight


class Everywhere(Masked):
    def loss(self, hidden: Tensor, head: Any, tokens: Tensor, noised: Noised) -> Any:
        total, weight = super().loss(hidden, head, tokens, noised)
        return total + 0.01 * hidden.square().sum(), weight
