"""Where each row of a canvas is decoding: blocks from left to right, each row at its own pace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffa.types import Steady, Step

if TYPE_CHECKING:
    from diffa.canvas.canvas import Canvas


class BlockState(NamedTuple):
    """The block that each row is decoding in this forward pass.

    Shapes: B rows, R masked slots of the widest row. Slots count from the canvas's start, places
    from the answer's start::

        slots    0 ......... start ... end .........
                 prompt      |-block--|  later blocks
        places   -           0 + block * block_length ...

    Attributes:
        active: (B,) bool, rows with masks left. The other rows wait.
        block: (B,) number of the block.
        start: (B,) first slot of the block.
        end: (B,) slot after the block.
        entered: (B,) bool, rows that have just entered the block.
        step: (B,) steps since decoding began.
        block_step: (B,) steps since the row entered the block.
        initial_masks: (B,) masks when the row entered the block.
        masked_slots: (B, R) slots of the block that are masks, -1 for padding.
        places: (B, R) the same slots as indices within the answer.
        answer_length: Answer tokens per row, A.
        requested: How many of them were asked for.
        width: Tokens per block.
        stays: Whether nobody has looked if rows are done with their block (``BlockTracker``).
    """

    active: Tensor
    block: Tensor
    start: Tensor
    end: Tensor
    entered: Tensor
    step: Tensor
    block_step: Tensor
    initial_masks: Tensor
    masked_slots: Tensor
    places: Tensor
    answer_length: int
    requested: int
    width: int
    stays: bool = False

    @property
    def masked(self) -> Tensor:
        """Which of ``masked_slots`` are no padding, (B, R) bool."""
        return self.masked_slots >= 0

    @property
    def memory_index(self) -> tuple[Tensor, Tensor]:
        """Index of the masked slots in a (B, A + 1, ...) tensor; padding gets the last column."""
        column = torch.where(self.masked, self.places, self.answer_length)
        return torch.arange(len(column), device=column.device)[:, None], column


class BlockTracker:
    """Follows every row of a canvas through blocks of ``block_length`` answer tokens.

    With block-causal attention these are the backbone's blocks, or parts of them. The first one
    then begins in the prompt if the prompt does not fill its last block.

    A GPU would have to finish a pass before the host could see whether a row is done with its
    block. With ``hold`` the host looks one pass later, while the next one runs: rows are held in
    their blocks until then, and that pass writes nothing where a row is done.

    Args:
        canvas: What is decoded.
        block_length: Answer tokens per block.
        hold: Look one pass late. Needs a sampler that masks no token again.
    """

    def __init__(self, canvas: Canvas, block_length: int, *, hold: bool = False) -> None:
        self._hold = hold
        self._last: BlockState | None = None
        self._ends: list[_LateFlag] = []  # of the passes since the host looked
        self._canvas, self._block_length = canvas, block_length
        self._offset = torch.zeros_like(canvas.seeds)
        if canvas.attention is not None:
            self._offset = canvas.attention.offset(canvas.prompt_lengths, block_length)
        self._columns = torch.arange(block_length, device=canvas.tokens.device)
        self._block = torch.full_like(canvas.seeds, -1)
        self._step, self._entry_step, self._initial_masks = (
            torch.zeros_like(self._block) for _ in range(3)
        )

    def current(self, stay: Tensor | None = None) -> BlockState | None:
        """Return each row's leftmost block with masks, or None when no row has masks left.

        Rows that ``stay`` (B,) remain in their block though its masks are gone.
        """
        if self._last is not None and not (len(self._ends) > 1 and bool(self._ends.pop(0))):
            return self._stay(self._last)
        canvas, width, offset = self._canvas, self._block_length, self._offset
        masked = canvas.undecided()
        requested = masked[:, : canvas.requested]
        active = requested.any(dim=1)
        block = (requested.int().argmax(dim=1) + offset) // width
        if stay is not None:
            active, block = active | stay, torch.where(stay, self._block, block)
        if not bool(active.any()):
            canvas.steady = None
            return None
        block = torch.where(active, block, self._block)
        entered = block != self._block
        places = (block * width - offset)[:, None] + self._columns
        in_block = masked.gather(1, places.clamp(0, canvas.length - 1))
        in_block &= (places >= 0) & (places < canvas.length) & active[:, None]
        self._block = block
        self._entry_step = torch.where(entered, self._step, self._entry_step)
        self._initial_masks = torch.where(entered, in_block.sum(dim=1), self._initial_masks)
        # A row without masks from the start has never entered a block: its number is still -1.
        first = canvas.start + block.clamp(min=0) * width - offset
        slots = drop_padding(torch.where(in_block, canvas.start + places, -1))
        state = BlockState(
            active=active,
            block=block,
            start=first.clamp(min=canvas.start),
            end=(first + width).clamp(max=canvas.start + canvas.length),
            entered=entered,
            step=self._step,
            block_step=self._step - self._entry_step,
            initial_masks=self._initial_masks,
            masked_slots=slots,
            places=slots - canvas.start,
            answer_length=canvas.length,
            requested=canvas.requested,
            width=width,
        )
        if self._hold:
            self._last, self._ends = state, []
            self._inside = (places >= 0) & (places < canvas.length) & active[:, None]
            self._places, self._slots = places.clamp(0, canvas.length - 1), canvas.start + places
            canvas.steady = Steady.of(canvas, active)
        return state

    def _stay(self, last: BlockState) -> BlockState:
        """Return the state of rows that stay in their blocks."""
        canvas = self._canvas
        if not last.stays:  # the first pass over the windows of these blocks
            assert canvas.steady is not None
            canvas.steady = canvas.steady._replace(memo={})
        slots = torch.where(self._left, self._slots, -1)
        self._last = last._replace(
            entered=torch.zeros_like(last.entered),
            step=self._step,
            block_step=self._step - self._entry_step,
            masked_slots=slots,
            places=slots - canvas.start,
            stays=True,
        )
        return self._last

    def advance(self, steps: Tensor | int = 1) -> None:
        """Count ``steps``, for all rows or for each row (B,)."""
        if self._last is not None:
            # A pass in which a row had no masks left is no step of it.
            steps = steps * self._last.masked.any(dim=1)
            self._left = self._canvas.undecided().gather(1, self._places) & self._inside
            self._ends.append(_LateFlag((self._last.active & ~self._left.any(dim=1)).any()))
        self._step = self._step + steps


class _LateFlag:
    """A flag of a GPU on its way to the host, which is read when later work is queued."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag.to("cpu", non_blocking=True)
        event: Any = torch.cuda.Event  # untyped
        self._event = event()
        self._event.record()

    def __bool__(self) -> bool:
        self._event.synchronize()
        return bool(self._flag)


def block_slots(canvas: Canvas, state: BlockState, width: int) -> tuple[Tensor, Tensor]:
    """Return all slots (B, W) of each row's block, and which of them exist, (B, W) bool."""
    slots = state.start[:, None] + torch.arange(width, device=state.start.device)
    exists = (slots < state.end[:, None]) & state.active[:, None]
    return slots.clamp(max=canvas.start + canvas.length - 1), exists


def drop_padding(slots: Tensor) -> Tensor:
    """Drop columns that are -1 in every row of slots (B, R), moving -1 to the right."""
    if slots.is_cuda:  # a fixed shape, and no wait for a count on the device
        return slots
    longest = int((slots >= 0).sum(dim=1).max())
    order = (slots < 0).sort(dim=1, stable=True).indices[:, :longest]
    return slots.gather(1, order)


def fill_after_eos(canvas: Canvas, draft: Tensor) -> None:
    """Fill a row with EOS after its first EOS, once no mask is left before that EOS.

    Tokens of the ``draft`` (B, A) bool stay.
    """
    answer, eos = canvas.answer, canvas.vocab.eos
    ended = (answer == eos).cumsum(dim=1) > 0
    settled = ~((answer == canvas.vocab.mask) & ~ended).any(dim=1, keepdim=True)
    after = ended & settled & (answer != eos) & ~draft
    if after.is_cuda or bool(after.any()):  # asking a GPU takes longer than filling nothing
        canvas.fill(after, eos)


def fill_after_block(canvas: Canvas, state: BlockState, where: Tensor | None = None) -> None:
    """Fill the masks of a row with EOS once the block that it decoded is complete and holds one.

    With block-causal attention it is the backbone's block. ``where`` (B,) names the rows to look
    at. Default: all.
    """
    masked, answer = canvas.undecided(), slice(canvas.start, canvas.start + canvas.length)
    before = torch.arange(canvas.size, device=masked.device)[answer] < state.end[:, None]
    if canvas.attention is not None:
        number = canvas.block_numbers(canvas.attention.length)[: canvas.count]
        before = (number <= number.gather(1, state.start[:, None]))[:, answer]
    complete = ~(masked & before).any(dim=1)
    ended = ((canvas.answer == canvas.vocab.eos) & before).any(dim=1) & complete
    ended = ended if where is None else ended & where
    canvas.fill(masked & ended[:, None], canvas.vocab.eos)


def make_step(
    canvas: Canvas, *, draft: Tensor | None = None, revisable_block_length: int | None = None
) -> Step:
    """Return what callers see of the canvas after a forward pass.

    Args:
        canvas: The canvas after the pass.
        draft: (B, A) bool, tokens of a draft. Given where ``fill_after_eos`` may still replace
            tokens: then only the draft and tokens with no mask before them are final.
        revisable_block_length: Given where tokens of the current block may be masked again: then
            only blocks of this length that are complete are final.
    """
    here = slice(canvas.requested)
    masked = canvas.undecided()[:, here]
    final = ~masked if draft is None else draft[:, here] | (masked.cumsum(dim=1) == 0)
    if revisable_block_length is not None:
        width = revisable_block_length
        done = ~masked.any(dim=1, keepdim=True)
        current = masked.int().argmax(dim=1, keepdim=True) // width * width
        final = done | (torch.arange(masked.shape[1], device=masked.device) < current)
    return Step(canvas.answer[:, here].clone(), final, canvas.confidence[:, here].clone())
