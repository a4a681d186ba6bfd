"""Which slots a forward recomputes: small policies that each narrow or widen the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from diffa.errors import SpecError
from diffa.samplers.blocks import Place

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas
    from diffa.canvas.kv_cache import KVCache

Cache = Literal["none", "prefix", "dual"]


class Policy(Protocol):
    """Changes which slots (B, S) are recomputed; ``Slots`` applies several in turn."""

    def __call__(self, chosen: Tensor, canvas: Canvas, place: Place) -> Tensor:
        """Return which slots to recompute, given what was chosen so far."""
        ...


class Remembered:
    """Between refreshes at each block's begin: ``prefix`` recomputes from the block on, ``dual``
    the block alone (Fast-dLLM, arXiv 2505.22618), and ``vicinity`` slots to its sides (dInfer)."""

    def __init__(self, cache: Cache, vicinity_window: int) -> None:
        self.cache, self.vicinity_window = cache, vicinity_window

    def __call__(self, chosen: Tensor, canvas: Canvas, place: Place) -> Tensor:
        """Keep the block's surroundings for rows that did not just enter it."""
        count = canvas.count
        # Positions, not slots: between a short prompt and its answer lies padding.
        here = canvas.positions[:count]
        start = here.gather(1, place.first[:, None]) - self.vicinity_window
        window = here >= start
        if self.cache == "dual":
            last = here.gather(1, (place.end - 1)[:, None]) + self.vicinity_window
            window &= here <= last
        return chosen & (window | place.fresh[:, None])


class Suffix:
    """Lets nobody see answer slots beyond the block but the next ``count`` and the last one
    (Streaming-dLLM, arXiv 2601.17917); they keep their positions."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, chosen: Tensor, canvas: Canvas, place: Place) -> Tensor:
        """Mark far slots invalid; a slot that comes into sight is computed there and then."""
        slots = torch.arange(canvas.size, device=chosen.device)
        last = canvas.start + canvas.length - 1
        near = (slots < place.end[:, None] + self.count) | (slots == last)
        near = torch.where(place.alive[:, None], near, canvas.valid[: canvas.count])
        before = canvas.valid[: canvas.count]
        canvas.hide(~near)
        canvas.show(near)
        visible = canvas.valid[: canvas.count]
        return (chosen | (visible & ~before)) & visible


class LazyAudio:
    """Recomputes the prompt's audio slots once in ``every`` forwards at most (dLLM-Cache's rule
    for prompts, arXiv 2506.06295)."""

    def __init__(self, every: int, canvas: Canvas) -> None:
        self.every = every
        self.audio = canvas.audio[: canvas.count]
        self.last = torch.full_like(canvas.seeds, -every)

    def __call__(self, chosen: Tensor, canvas: Canvas, place: Place) -> Tensor:
        """Leave out audio that was computed a short while ago."""
        due = place.step - self.last >= self.every
        wanted = (chosen & self.audio).any(dim=1)
        self.last = torch.where(due & wanted, place.step, self.last)
        return chosen & ~(self.audio & ~due[:, None])


class Drift:
    """Refreshes the prompt at a block's begin only where the keys of ``probes`` of its slots have
    moved by more than ``bound`` (1 - cosine): first the probes, at the next forward the rest."""

    def __init__(self, bound: float, canvas: Canvas, memory: KVCache, probes: int = 16) -> None:
        self.bound, self.memory = bound, memory
        memory.probe = -1  # the last layer has seen all that the others moved
        columns = torch.arange(canvas.size, device=canvas.tokens.device)
        self.prompt = canvas.valid[: canvas.count] & (columns < canvas.start)
        share = (torch.arange(probes, device=columns.device) + 0.5) / probes
        self.probes = (share * self.prompt.sum(dim=1, keepdim=True)).long()
        self.asked = torch.zeros_like(canvas.seeds, dtype=torch.bool)

    def __call__(self, chosen: Tensor, canvas: Canvas, place: Place) -> Tensor:
        """Add the prompt where the probes moved, leave it out where they are still to be asked."""
        if bool(self.asked.any()):
            moved = self.memory.drift(self.probes).mean(dim=1) > self.bound
            chosen = chosen | (self.prompt & (moved & self.asked & place.alive)[:, None])
        self.asked = place.fresh & (place.step > 0)
        if not self.prompt.any():
            return chosen
        probed = torch.zeros_like(chosen).scatter(1, self.probes, True) & self.prompt
        return chosen & (~self.prompt | ~self.asked[:, None] | probed)


class Slots:
    """Applies policies in turn to "every slot that there is"."""

    def __init__(self, policies: list[Policy]) -> None:
        self.policies = policies

    def __call__(self, canvas: Canvas, place: Place) -> tuple[Tensor | None, bool]:
        """Return slots (B, K) to recompute, None for all, and whether to remember them."""
        chosen = canvas.valid[: canvas.count] & place.alive[:, None]
        for policy in self.policies:
            chosen = policy(chosen, canvas, place)
        whole = (canvas.valid[: canvas.count] & place.alive[:, None]) == chosen
        full = canvas.valid[: canvas.count, canvas.start :].all() & whole.all()
        most, everything = torch.stack([chosen.sum(dim=1).max(), full.long()]).tolist()
        if everything:
            return None, bool(self.policies)
        picked = (~chosen).sort(dim=1, stable=True).indices[:, :most]
        return torch.where(chosen.gather(1, picked), picked, -1), True


def cached(cache: Cache) -> Slots:
    """Return the policy of a cache alone."""
    return Slots([] if cache == "none" else [Remembered(cache, 0)])


def check(
    vicinity_window: int,
    suffix_window: int | None,
    audio_refresh_interval: int,
    drift_threshold: float,
    cache: str,
) -> None:
    """Refuse numbers out of their range, and policies that need a cache without one."""
    lowest = {"vicinity_window": (vicinity_window, 0), "suffix_window": (suffix_window or 0, 0)}
    for name, (value, least) in {
        **lowest,
        "audio_refresh_interval": (audio_refresh_interval, 1),
    }.items():
        if value < least:
            raise SpecError(f"{name} must be at least {least}, got {value}")
    if not 0 <= drift_threshold < float("inf"):
        raise SpecError(f"drift_threshold must be 0 or more, got {drift_threshold}")
    for name, given in {
        "vicinity_window": vicinity_window,
        "drift_threshold": drift_threshold,
    }.items():
        if given and cache == "none":
            raise SpecError(f"{name} needs a cache: set cache to prefix or dual")
