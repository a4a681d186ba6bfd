"""Which slots a forward pass recomputes; keys and values of all others come from the KV cache.

Small policies each narrow or widen the choice; ``RecomputeSlots`` applies them in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from diffa.errors import SpecError, check_at_least, check_non_negative
from diffa.samplers.blocks import BlockState

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas
    from diffa.canvas.kv_cache import KVCache

CacheMode = Literal["none", "prefix", "dual"]


class RecomputePolicy(Protocol):
    """Change which slots (B, S) bool are recomputed in this pass."""

    def __call__(self, recompute: Tensor, canvas: Canvas, state: BlockState) -> Tensor:
        """Return the slots to recompute, given the choice of the policies before."""
        ...


class BlockCache:
    """Within a block, recompute only from the block on (``prefix``) or the block alone (``dual``).

    A pass that enters a block recomputes everything (Fast-dLLM, arXiv 2505.22618). ``vicinity``
    slots on each side of the block are recomputed with it (dInfer)::

        prompt ... | vicinity | block | vicinity | later blocks
        prefix:      ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
        dual:        ^^^^^^^^^^^^^^^^^^^^^^^^^^^
    """

    def __init__(self, cache: CacheMode, vicinity: int) -> None:
        self.cache, self.vicinity = cache, vicinity

    def __call__(self, recompute: Tensor, canvas: Canvas, state: BlockState) -> Tensor:
        """Leave out what is cached, in rows that did not just enter their block."""
        # By position, not by slot: padding lies between a short prompt and its answer.
        positions = canvas.positions[: canvas.count]
        first = positions.gather(1, state.start[:, None]) - self.vicinity
        window = positions >= first
        if self.cache == "dual":
            last = positions.gather(1, (state.end - 1)[:, None]) + self.vicinity
            window &= positions <= last
        return recompute & (window | state.entered[:, None])


class SuffixWindow:
    """Hide answer slots after the block except the next ``count`` and the last one, which keep
    their positions (Streaming-dLLM, arXiv 2601.17917)."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, recompute: Tensor, canvas: Canvas, state: BlockState) -> Tensor:
        """Hide far slots; a slot that comes into the window is recomputed in that pass."""
        slots = torch.arange(canvas.size, device=recompute.device)
        last = canvas.start + canvas.length - 1
        near = (slots < state.end[:, None] + self.count) | (slots == last)
        near = torch.where(state.active[:, None], near, canvas.valid[: canvas.count])
        before = canvas.valid[: canvas.count]
        canvas.hide(~near)
        canvas.show(near)
        visible = canvas.valid[: canvas.count]
        return (recompute | ~before) & visible


class AudioRefresh:
    """Recompute the audio's slots at most every ``interval`` passes (dLLM-Cache's rule for
    prompts, arXiv 2506.06295)."""

    def __init__(self, interval: int, canvas: Canvas) -> None:
        self.interval = interval
        self._audio = canvas.audio[: canvas.count]
        self._last = torch.full_like(canvas.seeds, -interval)

    def __call__(self, recompute: Tensor, canvas: Canvas, state: BlockState) -> Tensor:
        """Leave out audio that was recomputed less than ``interval`` passes ago."""
        due = state.step - self._last >= self.interval
        requested = (recompute & self._audio).any(dim=1)
        self._last = torch.where(due & requested, state.step, self._last)
        return recompute & ~(self._audio & ~due[:, None])


class DriftRefresh:
    """Refresh the prompt at a block's start only if its keys have moved.

    The first pass of a block recomputes only ``probes`` slots of the prompt. If their keys moved by
    more than ``threshold`` (mean of 1 - cosine), the second pass recomputes the whole prompt.
    """

    def __init__(
        self, threshold: float, canvas: Canvas, kv_cache: KVCache, probes: int = 16
    ) -> None:
        self.threshold, self._kv_cache = threshold, kv_cache
        kv_cache.probe = -1  # the last layer's keys reflect the changes of all layers
        slots = torch.arange(canvas.size, device=canvas.tokens.device)
        self._prompt = canvas.valid[: canvas.count] & (slots < canvas.start)
        share = (torch.arange(probes, device=slots.device) + 0.5) / probes  # evenly over the prompt
        self._probes = (share * self._prompt.sum(dim=1, keepdim=True)).long()
        self._probed = torch.zeros_like(canvas.seeds, dtype=torch.bool)

    def __call__(self, recompute: Tensor, canvas: Canvas, state: BlockState) -> Tensor:
        """Add the prompt where the last pass's probes moved; leave it out where they are due."""
        if bool(self._probed.any()):
            moved = self._kv_cache.drift(self._probes).mean(dim=1) > self.threshold
            refresh = moved & self._probed & state.active
            recompute = recompute | (self._prompt & refresh[:, None])
        self._probed = state.entered & (state.step > 0)
        probes = torch.zeros_like(recompute).scatter(1, self._probes, True)
        return recompute & (~self._prompt | ~self._probed[:, None] | probes)


class RecomputeSlots:
    """Apply policies in turn to "all valid slots of active rows".

    While rows are held in their blocks (``BlockTracker``), the choice is the same in every pass.
    """

    def __init__(self, policies: list[RecomputePolicy], *, hold: bool = False) -> None:
        self.policies, self._hold = policies, hold
        self._window: tuple[Tensor | None, bool] | None = None

    def __call__(self, canvas: Canvas, state: BlockState) -> tuple[Tensor | None, bool]:
        """Return the ``recompute`` (B, K; None: all slots) and ``write`` arguments of a pass."""
        if state.stays and self._window is not None:
            return self._window
        if self._hold:
            within = state._replace(entered=torch.zeros_like(state.entered))
            self._window = self._choose(canvas, within)
        return self._choose(canvas, state)

    def _choose(self, canvas: Canvas, state: BlockState) -> tuple[Tensor | None, bool]:
        everything = canvas.valid[: canvas.count] & state.active[:, None]
        recompute = everything
        for policy in self.policies:
            recompute = policy(recompute, canvas, state)
        # Policies may have changed canvas.valid: compare with what is valid now.
        everything = canvas.valid[: canvas.count] & state.active[:, None]
        answers_valid = canvas.valid[: canvas.count, canvas.start :].all()
        is_full = answers_valid & (everything == recompute).all()
        # One transfer from the device instead of two.
        longest, full = torch.stack([recompute.sum(dim=1).max(), is_full.long()]).tolist()
        if full:
            return None, bool(self.policies)
        slots = (~recompute).sort(dim=1, stable=True).indices[:, :longest]
        return torch.where(recompute.gather(1, slots), slots, -1), True


def check_recompute_options(
    *,
    vicinity_window: int,
    suffix_window: int | None,
    audio_refresh_interval: int,
    drift_threshold: float,
    cache: CacheMode,
) -> None:
    """Raise SpecError for a number out of its range, or an option that needs a cache."""
    check_at_least(0, vicinity_window=vicinity_window, suffix_window=suffix_window)
    check_at_least(1, audio_refresh_interval=audio_refresh_interval)
    check_non_negative(drift_threshold=drift_threshold)
    needs_cache = {"vicinity_window": vicinity_window, "drift_threshold": drift_threshold}
    for name, value in needs_cache.items():
        if value and cache == "none":
            raise SpecError(f"{name} needs a cache: set cache to prefix or dual")
