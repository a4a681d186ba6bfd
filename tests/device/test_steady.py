"""Within a block, decoding on a GPU never waits for it."""

import itertools

import pytest
import torch
from helpers import small

from diffa.samplers.blockwise import Blockwise
from diffa.testing.device import StandInDevice

RULES = {"threshold": {"threshold": 0.5}, "factor": {"factor": 1.0}, "steps": {"steps": 6}}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", RULES)
def test_a_block_is_decoded_without_host_syncs(rule, cache, rows):
    asked = small.questions(rows)
    model = small.backbone()
    sampler = Blockwise(model.vocab, block_length=4, cache=cache, **RULES[rule])
    due, passes = small.decode(model, sampler, asked)
    with StandInDevice() as device, torch.no_grad():
        board, denoise = small.canvas(small.backbone().to("cuda:0"), asked)
        stores, syncs = set(), []
        for _ in sampler(board, denoise):
            syncs.append(device.syncs)
            stores.update(keys.data_ptr() for keys in denoise.kv_cache._keys)
        assert board.answer.tolist() == due.tolist()
    waits = [after - before for before, after in itertools.pairwise([0, *syncs])]
    blocks = sum(count > 0 for count in waits)
    assert 3 <= blocks <= 3 * rows  # a pass waits where a row enters a block, and nowhere else
    assert denoise.num_forwards <= passes + blocks
    assert len(stores) == (0 if cache == "none" else 2)  # of two layers, from the first pass on


def test_rows_that_wait_draw_what_they_draw_alone():
    asked, options = small.questions(3), {"temperature": 0.8, "block_length": 4}
    model = small.backbone()
    due, _ = small.decode(model, Blockwise(model.vocab, **options), asked)
    with StandInDevice():
        moved = small.backbone().to("cuda:0")
        tokens, _ = small.decode(moved, Blockwise(moved.vocab, **options), asked)
        assert tokens.tolist() == due.tolist()
