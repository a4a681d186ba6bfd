"""Records of an answer for the page: its canvas after every forward pass, and its cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from diffa.runtime.render import token_text

if TYPE_CHECKING:
    from diffa.model import Model
    from diffa.types import Step


class Token(NamedTuple):
    """One place of the canvas.

    Attributes:
        text: as it is written; "" where the place is undecided or behind the end.
        kind: ``mask`` while undecided, ``end`` for the end of the text, else ``word``.
        confidence: Probability of the token when it was accepted, 0 to 1.
        step: Forward pass, counted from 1, that made it final; 0 while it may change.
    """

    text: str
    kind: Literal["mask", "end", "word"]
    confidence: float
    step: int


Frame = tuple[Token, ...]


class Replay(NamedTuple):
    """An answer with every canvas on the way to it.

    Attributes:
        name: of the sampler preset.
        text: the answer so far.
        frames: The canvas after each forward pass.
        tokens: tokens of the answer up to its end, the end included.
        seconds: spent in the model so far, without the page's own work.
    """

    name: str
    text: str
    frames: tuple[Frame, ...]
    tokens: int
    seconds: float

    @property
    def num_forwards(self) -> int:
        """Forward passes so far."""
        return len(self.frames)

    @property
    def pace(self) -> float:
        """Tokens of the answer per forward pass."""
        return self.tokens / max(1, self.num_forwards)


class Request(NamedTuple):
    """A waveform at the encoder's rate, a question, and the settings of the answer."""

    wave: Any
    question: str
    max_tokens: int = 24
    system: str | None = None
    seed: int = 0


def ask(
    model: Model, name: str, sampler: Mapping[str, Any] | str, request: Request
) -> Iterator[Replay]:
    """Answer with a sampler and yield a replay after every forward pass.

    Raises:
        SpecError: the sampler's options are wrong.
        AudioError: the recording is too long for the backbone's context.
    """
    from diffa.build import swap

    start = time.perf_counter()
    candidate = swap(model, sampler=sampler)
    prompt = candidate.chat_format.encode(request.question, system=request.system)
    steps = candidate.stream(
        prompt.tokens,
        request.wave,
        audio_at=prompt.audio_at or 0,
        max_tokens=request.max_tokens,
        seeds=request.seed,
    )
    frames: list[Frame] = []
    since: list[int] = [0] * request.max_tokens
    spent = time.perf_counter() - start
    while True:
        start = time.perf_counter()
        step = next(steps, None)
        spent += time.perf_counter() - start  # the time that the browser takes does not count
        if step is None:
            return
        frames.append(frame(step, len(frames) + 1, since, candidate))
        text = _text(candidate, step.tokens[0])
        yield Replay(name, text, tuple(frames), length(frames[-1]), spent)


def frame(step: Step, number: int, since: list[int], model: Model) -> Frame:
    """Return the canvas of a step; record in ``since`` which places became final."""
    vocab, tokenizer = model.backbone.vocab, model.backbone.tokenizer
    tokens: list[int] = step.tokens[0].tolist()
    entries: list[Token] = []
    for place, token in enumerate(tokens):
        settled = bool(step.final[0, place])
        since[place] = (since[place] or number) if settled else 0
        if token == vocab.mask:
            entries.append(Token("", "mask", 0.0, 0))
            continue
        sure = float(step.confidence[0, place])
        if token in (vocab.eos, vocab.pad):
            entries.append(Token("", "end", sure, since[place]))
        else:
            text = token_text(token, tokens, place, tokenizer)
            entries.append(Token(text, "word" if text else "end", sure, since[place]))
    return tuple(entries)


def _text(model: Model, tokens: Any) -> str:
    """The text decided so far: masks are left out."""
    decided = tokens[tokens != model.backbone.vocab.mask]
    return str(model.chat_format.decode(decided.cpu()))


def length(frame: Frame) -> int:
    """Count the tokens decided up to the first end of the text, which counts."""
    count = 0
    for token in frame:
        count += token.kind != "mask"
        if token.kind == "end":
            break
    return count
