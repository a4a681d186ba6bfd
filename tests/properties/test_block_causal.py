"""Laws of decoding with block-causal attention, for prompts, blocks and rules of any kind."""

import itertools

import pytest
import torch
from helpers import small
from hypothesis import given, settings
from hypothesis import strategies as st
from test_combinations import QWEN

from diffa.backbones.fast_dllm import FastDLLM2
from diffa.backbones.sdar import SDAR
from diffa.errors import SpecError
from diffa.samplers import block_memory
from diffa.samplers.blockwise import Blockwise
from diffa.samplers.edit import Edit
from diffa.testing.toy import MASKED, Chaos, ToyDenoise, toy_canvas
from diffa.types import BlockAttention

PROMPTS = st.lists(
    st.lists(st.integers(-1, 4), min_size=1, max_size=11), min_size=1, max_size=3
)  # -1: audio
ATTENTIONS = st.builds(BlockAttention, st.sampled_from([1, 2, 4, 6]), st.booleans(), st.booleans())
RULES = st.sampled_from([
    {"threshold": 0.5}, {"factor": 1.0}, {"steps_per_block": 2}, {},
    {"threshold": 0.4, "steps_per_block": 3}, {"ranking": "left_to_right", "steps_per_block": 2},
    {"threshold": 0.5, "eos_check": "block"}, {"threshold": 0.5, "eos_check": "written"},
])  # fmt: skip


def run(sampler, prompts, length, attention):
    """The steps of a toy canvas, and its forward passes."""
    canvas = toy_canvas(prompts, length, attention=attention)
    denoise = ToyDenoise(canvas, Chaos(), most=40 * length + 40)
    steps = [step.tokens for step in sampler(canvas, denoise)]
    return steps, denoise.num_forwards


def divisor(width, length):
    return max(w for w in range(1, width + 1) if length % w == 0)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, ATTENTIONS, RULES, st.integers(1, 13), st.integers(1, 6), st.booleans())
def test_exact_memory_gives_the_tokens_of_recomputing(
    prompts, attention, rule, length, width, merge
):
    options = {"block_length": divisor(width, attention.length), **rule}
    plain, _ = run(Blockwise(MASKED, **options), prompts, length, attention)
    cached, _ = run(
        Blockwise(MASKED, cache="prefix", merge_commit=merge, **options), prompts, length, attention
    )
    assert torch.equal(plain[-1], cached[-1])
    assert not (cached[-1] == MASKED.mask).any()


@settings(max_examples=40, deadline=None)
@given(PROMPTS, ATTENTIONS, RULES, st.integers(1, 13), st.sampled_from(["none", "prefix", "dual"]))
def test_a_row_of_a_batch_is_the_row_alone(prompts, attention, rule, length, cache):
    sampler = Blockwise(MASKED, block_length=divisor(2, attention.length), cache=cache, **rule)
    together, _ = run(sampler, prompts, length, attention)
    for row, prompt in enumerate(prompts):
        alone, _ = run(sampler, [prompt], length, attention)
        assert torch.equal(together[-1][row], alone[-1][0])


@settings(max_examples=40, deadline=None)
@given(PROMPTS, ATTENTIONS, st.integers(1, 13), st.floats(0, 1), st.integers(0, 4))
def test_edits_stay_in_the_current_block(prompts, attention, length, edit_threshold, post_steps):
    """Between two passes a row changes in one block alone, and blocks never go back."""
    attention = attention._replace(shifted=False)
    for cache in ("none", "prefix"):
        sampler = Edit(
            MASKED, threshold=0.5, edit_threshold=edit_threshold, max_post_steps=post_steps,
            cache=cache, stop_at_eos=False,
        )  # fmt: skip
        steps, _ = run(sampler, prompts, length, attention)
        offsets = [0 if attention.from_prompt else len(p) % attention.length for p in prompts]
        current = [0] * len(prompts)
        for before, after in itertools.pairwise(steps):
            for row, offset in enumerate(offsets):
                places = (before[row] != after[row]).nonzero()[:, 0].tolist()
                blocks = {(place + offset) // attention.length for place in places}
                assert len(blocks) <= 1
                for block in blocks:
                    assert block >= current[row]
                    current[row] = block
        assert not (steps[-1] == MASKED.mask).any()
        if cache == "none":
            plain = steps[-1]
    assert torch.equal(plain, steps[-1])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 3, 4, 8]), st.booleans(), st.integers(0, 2))
def test_a_backbone_computes_the_same_from_memory(block, merge, kind):
    """Logits of a real backbone, cached and recomputed, choose the same tokens."""
    model = small.backbone(block_length=block) if kind == 2 else stirred(kind, block)
    compare_memories(model, merge_commit=merge)


def stirred(kind, block):
    model = (SDAR, FastDLLM2)[kind](
        config=QWEN | {"hidden_size": 32, "mask_token_id": small.MASK}, block_length=block
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 2 * weight.shape[1] ** -0.5, generator=generator)
    return model


def compare_memories(model, **options):
    asked, vocab = small.questions(), model.vocab

    def decode(cache, rows):
        sampler = Blockwise(vocab, threshold=0.6, cache=cache, stop_at_eos=False, **options)
        board, denoise = small.canvas(model, rows)
        with torch.no_grad():
            last = list(sampler(board, denoise))[-1]
        return last.tokens, last.confidence

    plain, cached = decode("none", asked), decode("prefix", asked)
    alone = [decode("prefix", asked[row : row + 1]) for row in range(3)]
    for tokens, confidence in (plain, map(torch.cat, zip(*alone, strict=True))):
        assert torch.equal(tokens, cached[0])
        assert torch.allclose(confidence, cached[1], atol=1e-4)


@pytest.mark.parametrize("fault", ["no_commit", "late_commit", "stale_tail"])
def test_a_memory_with_a_fault_is_noticed(fault, monkeypatch):
    """What is not stored, stored too early or left stale changes tokens or stops the toy."""
    right = block_memory.BlockMemory.__call__

    def wrong(self, recompute, canvas, state):
        wanted = right(self, recompute, canvas, state)
        own = self._block.gather(1, state.start[:, None])
        if fault == "no_commit":
            return wanted & (self._block >= own)
        if fault == "late_commit":  # a finished block keeps the keys of its masks
            first = (self._block[:, :1] == self._block) | (self._block >= own)
            return wanted & first
        answer = torch.arange(canvas.size) >= canvas.start
        return wanted & (answer | (self._block < own) | state.entered[:, None])

    monkeypatch.setattr(block_memory.BlockMemory, "__call__", wrong)
    with pytest.raises(AssertionError):
        if fault == "stale_tail":  # the toy's slots do not depend on each other
            compare_memories(stirred(0, 4))
        for length in (9, 12):
            for prompt in ([1, 2, 3, 4, 1], [2, 2, 1, 0, 1, 2, 3]):
                attention = BlockAttention(4, False, False)
                options = {"threshold": 0.5, "stop_at_eos": False}
                plain, _ = run(Blockwise(MASKED, **options), [prompt], length, attention)
                cached, _ = run(
                    Blockwise(MASKED, cache="prefix", **options), [prompt], length, attention
                )
                assert torch.equal(plain[-1], cached[-1])


def test_a_block_that_does_not_divide_the_backbones_is_refused():
    with pytest.raises(SpecError, match="divisor"):
        run(Blockwise(MASKED, block_length=3), [[1, 2]], 8, BlockAttention(8, False, False))
    with pytest.raises(SpecError, match="block-causal"):
        run(Blockwise(MASKED, suffix_window=3), [[1, 2]], 8, BlockAttention(8, False, False))
    with pytest.raises(SpecError, match="blockwise"):
        run(Edit(MASKED), [[1, 2]], 8, BlockAttention(8, False, True))


def test_a_finished_block_costs_no_pass_of_its_own_when_it_is_merged():
    attention, prompt = BlockAttention(4, False, False), [1, 2, 3, 4, 1]
    options = {"steps_per_block": 4, "cache": "prefix", "stop_at_eos": False}
    _, merged = run(Blockwise(MASKED, **options), [prompt], 11, attention)
    _, apart = run(Blockwise(MASKED, merge_commit=False, **options), [prompt], 11, attention)
    assert merged == 11  # three masks in the first block, then four and four
    assert apart == merged + 3  # the prompt's block, and two finished ones
