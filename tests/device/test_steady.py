"""Within a block, decoding on a GPU never waits for it."""

import itertools

import pytest
import torch
from helpers import small

from diffa.backbones.llada import LLaDA
from diffa.backbones.llada_moe import MoEFeedForward
from diffa.backbones.transformer import MoEConfig
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


def test_a_dual_step_of_32_layers_launches_at_most_700_kernels():
    config = {**small.CONFIG, "n_layers": 32}
    with StandInDevice() as device, torch.no_grad():
        model = LLaDA(config=config).eval().to(torch.bfloat16).to("cuda:0")
        sampler = Blockwise(model.vocab, block_length=8, cache="dual", threshold=0.999)
        launches = []
        for _ in itertools.islice(sampler(*small.canvas(model, small.questions(1))), 5):
            launches.append(device.launches)
            device.reset()
    assert max(launches[2:]) <= 700


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [8, 200])
def test_experts_take_as_many_kernels_however_many_they_are(tokens, dtype):
    counts = []
    for experts in (4, 32):
        part = MoEFeedForward(16, MoEConfig(experts, 2, intermediate_size=8, norm_topk_prob=True))
        for weight in part.parameters():
            torch.nn.init.normal_(weight)
        x = torch.randn(1, tokens, 16)
        with torch.no_grad():
            due = part.to(dtype)(x.to(dtype))
            with StandInDevice() as device:
                moved, states = part.to("cuda:0"), x.to("cuda:0", dtype)
                device.reset()
                out = moved(states)
                counts.append(device.launches)
                assert device.syncs == 0
                assert torch.allclose(out.cpu().float(), due.float(), atol=0.05, rtol=0.05)
    assert counts[0] == counts[1] <= 40
