"""Compiled blocks: the same answers, only where no gradient is wanted, and only where torch can."""

import copy

import pytest
import torch

import diffa
from diffa.backbones import compile as compiling
from diffa.backbones.llada import LLaDA
from diffa.canvas.kv_cache import AttentionContext, KVCache

CONFIG = {
    "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 40,
    "vocab_size": 60, "embedding_size": 64, "max_sequence_length": 128, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "eos_token_id": 50, "pad_token_id": 50, "mask_token_id": 55,
}  # fmt: skip


@pytest.fixture
def fresh():
    """No earlier test's compiler is remembered, nor this one's by a later test."""
    for known in (compiling._compiled, compiling._cannot_compile):
        known.cache_clear()
    yield
    for known in (compiling._compiled, compiling._cannot_compile):
        known.cache_clear()


def heard(backbone):
    """What a whole pass and then a window of four slots give."""
    places, memory = torch.arange(12)[None], KVCache()
    memory.reserve(1, 12)
    embeds = backbone.embed(places)
    whole = backbone(embeds, places, AttentionContext(kv_cache=memory, write=True))
    window = places[:, 4:8]
    context = AttentionContext(positions=places, query_slots=window, kv_cache=memory)
    return torch.cat([whole, backbone(embeds[:, 4:8], window, context)], dim=1)


@pytest.mark.usefixtures("fresh")
def test_parts_are_compiled_once_for_all_layers_and_not_for_training(monkeypatch):
    compiled, called = [], []

    def stand_in(part, **_):
        compiled.append(part)
        return lambda *given: called.append(part) or part(*given)

    monkeypatch.setattr(torch, "compile", stand_in)
    backbone = LLaDA(config=CONFIG, compile=True)
    heard(backbone).sum().backward()
    assert not compiled
    with torch.no_grad():
        again = copy.deepcopy(backbone)
        assert heard(again).equal(heard(LLaDA(config=CONFIG)))
    assert compiled == [torch.sin, *compiling_parts()]
    assert [part for part in called if part is not torch.sin] == 3 * compiling_parts()


def compiling_parts():
    from diffa.backbones.transformer import PARTS

    return list(PARTS)


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch, caplog):
    def missing(part, **_):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", missing)
    backbone = LLaDA(config=CONFIG, compile=True)
    with torch.no_grad():
        found = [heard(backbone) for _ in range(2)]
        assert found[0].equal(heard(LLaDA(config=CONFIG)))
    told = [r.getMessage() for r in caplog.records if "backbone.compile" in r.getMessage()]
    assert told == ["backbone.compile: nothing is compiled for cpu: RuntimeError: no C++ compiler"]


@pytest.mark.slow
def test_compiled_blocks_write_the_same_tokens():
    plain = diffa.swap(diffa.build("nano"), sampler={"name": "blockwise", "cache": "dual"})
    backbone = {**plain.spec.data["backbone"], "compile": True}
    fast = diffa.swap(plain, backbone=backbone)
    wave = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    asked = ["What can you hear from the audio?"] * 2
    one, other = (m.answer(list(wave), asked, max_tokens=24) for m in (plain, fast))
    assert one.text == other.text
