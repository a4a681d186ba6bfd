"""A prefix cache shares what was computed, changes no token, and keeps to its memory."""

import pytest
import torch
from test_combinations import BACKBONES, TINY

import diffa
from diffa.canvas.prefix_cache import PrefixCache
from diffa.errors import SpecError

TEXT = torch.arange(20) % 30


def text_model(backbone="sdar", **options):
    model = diffa.build({
        "backbone": BACKBONES[backbone] | {"block_length": 4},
        "sampler": {"name": "blockwise", "block_length": 4, "cache": "prefix", **options},
    })  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.backbone.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 2 * weight.shape[1] ** -0.5, generator=generator)
    return model


@pytest.mark.parametrize("backbone", ["sdar", "llada2", "fastdllm2"])
@pytest.mark.parametrize("cut", [16, 18, 20])
def test_a_prompt_that_begins_alike_gets_the_same_tokens(backbone, cut):
    model, cache = text_model(backbone), PrefixCache()
    first, second = TEXT, torch.cat([TEXT[:cut], torch.tensor([7, 8, 9])])
    vectors = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    for prompt in (first, second, second):
        due = model.generate(prompt, embeds=vectors, audio_at=2, max_tokens=9)
        answer = model.generate(
            prompt, embeds=vectors, audio_at=2, max_tokens=9, prefix_cache=cache
        )
        assert answer.tokens[0].tolist() == due.tokens[0].tolist()
        assert answer.confidence == pytest.approx(due.confidence, abs=1e-4)
    assert cache.reused > 0


def test_rows_of_a_batch_reuse_what_each_of_them_shares():
    model, cache = text_model(), PrefixCache()
    model.generate(TEXT, max_tokens=5, prefix_cache=cache)
    prompts = [torch.cat([TEXT[:12], torch.tensor([3])]), TEXT.flip(0), TEXT]
    due = model.generate(prompts, max_tokens=6)
    answer = model.generate(prompts, max_tokens=6, prefix_cache=cache)
    assert [row.tolist() for row in answer.tokens] == [row.tolist() for row in due.tokens]
    assert cache.reused == 12 // 4 + 0 + 20 // 4


def test_a_second_question_computes_only_what_is_new():
    model, cache = text_model(), PrefixCache()
    counts = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
    model.generate(TEXT, max_tokens=4, prefix_cache=cache)
    assert counts[0] == 24  # the prompt and the first block
    counts.clear()
    model.generate(torch.cat([TEXT[:16], TEXT[:4]]), max_tokens=4, prefix_cache=cache)
    assert counts[0] == 8


def test_a_recording_is_encoded_once():
    model = diffa.build({
        "encoder": TINY, "adapters": {"audio": "pool"}, "backbone": BACKBONES["llada"],
        "sampler": {"name": "blockwise", "block_length": 4},
    })  # fmt: skip
    passes = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    waves = [0.1 * torch.randn(9000, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    cache, prompts = PrefixCache(), [TEXT[:4], TEXT[:3]]
    due = model.generate(prompts, waves, max_tokens=4)
    passes.clear()
    for _ in range(2):
        answer = model.generate(prompts, waves, max_tokens=4, prefix_cache=cache)
        assert [row.tolist() for row in answer.tokens] == [row.tolist() for row in due.tokens]
    assert passes == [2]


def test_memory_is_bounded_and_the_oldest_go_first():
    model, cache = text_model(), PrefixCache(max_bytes=6 * 2 * 2 * 4 * 2 * 8 * 4)
    for start in range(8):
        model.generate((TEXT + start) % 30, max_tokens=2, prefix_cache=cache)
        assert cache.size <= cache.max_bytes
    assert cache.size > 0
    empty = PrefixCache(0)
    model.generate(TEXT, max_tokens=2, prefix_cache=empty)
    assert empty.size == 0
    with pytest.raises(SpecError, match="max_bytes"):
        PrefixCache(-1)


def test_another_models_entries_are_refused():
    model, cache = text_model(), PrefixCache()
    model.generate(TEXT, max_tokens=2, prefix_cache=cache)
    with pytest.raises(SpecError, match="another model"):
        text_model().generate(TEXT, max_tokens=2, prefix_cache=cache)
