"""Pooling, window Q-Former, perceiver, CTC compression, CIF, experts and layer mixing."""

import pytest
import torch

from diffa.adapters.cif import CIF, integrate_and_fire
from diffa.adapters.ctc import CTC, label_runs
from diffa.adapters.experts import Experts
from diffa.adapters.perceiver import Perceiver
from diffa.adapters.pool import Pool
from diffa.adapters.window import Window
from diffa.errors import SpecError
from diffa.testing import AdapterSuite
from diffa.types import Features, FeatureSpec

SOURCE = FeatureSpec(width=12, layers=3, rate=50.0, heads=3)
SMALL = {"intermediate_size": 32, "dropout": 0.0}


class TestPool(AdapterSuite):
    name = "pool"
    options = {"stride": 3}


class TestPoolOverAllLayers(AdapterSuite):
    name = "pool"
    options = {"mix_layers": True}


class TestWindow(AdapterSuite):
    name = "window"
    options = {"num_queries": 2, **SMALL}


class TestWindowOverAllLayers(AdapterSuite):
    name = "window"
    options = {"window_seconds": 0.1, "mix_layers": True, **SMALL}
    # one query alone attends to itself with weight one, whatever it asks
    idle = ("layers.*.self_attention.query.*", "layers.*.self_attention.key.*")


class TestPerceiver(AdapterSuite):
    name = "perceiver"
    options = {"num_queries": 5, "mix_layers": True, **SMALL}

    def test_it_hears_the_audio(self):
        """Other frames give other latents (a shift of all channels alike is lost in a norm)."""
        part = self.new().eval()
        first, second = features([48], self.sources[0]), features([47], self.sources[0])
        assert not torch.allclose(part(first).values, part(second).values, atol=1e-4)


class TestCIF(AdapterSuite):
    name = "cif"
    options = {"mix_layers": True}


class TestExperts(AdapterSuite):
    name = "experts"
    options = {"intermediate_size": 16, "mix_layers": True}
    rounding = 2.0  # bfloat16 may send a frame to other experts


class TestCTC(AdapterSuite):
    name = "ctc"
    options = {"num_labels": 5, "mix_layers": True}

    def test_lengths_equal_out_lengths(self):
        """They depend on what is said: ``out_lengths`` is the most there can be."""
        part = self.new().eval()
        lengths = torch.tensor([45, 33, 0])
        found = part(features([45, 33, 0], self.sources[0]))
        assert (found.lengths <= part.out_lengths(lengths)).all()
        assert found.lengths[:2].gt(0).all() and found.lengths[2] == 0
        inside = torch.arange(found.values.shape[1]) < found.lengths[:, None]
        assert found.values[~inside].eq(0).all()

    def test_bfloat16_agrees_with_float32(self):
        """It runs; its runs may end elsewhere, so numbers are not compared."""
        part = self.new().eval().to(torch.bfloat16)
        assert part(features([45], self.sources[0])).values.isfinite().all()


def features(lengths, source=SOURCE):
    most = max(lengths)
    states = [
        torch.randn(len(lengths), most, source.width, generator=torch.Generator().manual_seed(i))
        for i in range(source.layers + 1)
    ]
    return Features(tuple(states), torch.tensor(lengths), torch.tensor([most] * len(lengths)))


# pool


def test_pool_is_the_mean_of_its_frames():
    pool, heard = Pool(SOURCE, 7, stride=4), features([10])
    frames = heard.states[-1][0]
    expected = torch.stack([frames[:4].mean(0), frames[4:8].mean(0), frames[8:].mean(0)])
    assert torch.allclose(pool(heard).values[0], pool.proj(expected), atol=1e-6)


def test_a_mixture_begins_as_the_mean_of_all_states():
    pool, heard = Pool(SOURCE, 7, stride=1, mix_layers=True), features([5])
    expected = pool.proj(torch.stack(heard.states).mean(dim=0))
    assert torch.allclose(pool(heard).values, expected, atol=1e-6)


def test_a_mixture_that_chooses_the_last_state_is_no_mixture():
    pool, heard = Pool(SOURCE, 7, mix_layers=True), features([6])
    with torch.no_grad():
        pool.mixer.weights[-1] = 100.0
    plain = Pool(SOURCE, 7)
    plain.proj = pool.proj
    assert torch.allclose(pool(heard).values, plain(heard).values, atol=1e-5)


# window


def test_salmonns_windows_are_17_frames_of_whisper():
    window = Window(SOURCE, 7, **SMALL)
    assert window.frames == 17
    assert window.out_lengths(torch.tensor([0, 1, 17, 18, 1500])).tolist() == [0, 1, 1, 2, 89]


def test_windows_do_not_see_each_other():
    window = Window(SOURCE, 7, num_queries=2, **SMALL).eval()
    heard = features([40])
    states = list(heard.states)
    states[-1] = states[-1].clone()
    states[-1][:, 17:34] += 1.0
    before, after = window(heard).values, window(heard._replace(states=tuple(states))).values
    moved = (before - after).abs().amax(dim=2)[0] > 1e-6
    assert moved.tolist() == [False, False, True, True, False, False]


# perceiver


def test_latents_tell_the_order_of_frames():
    perceiver = Perceiver(SOURCE, 7, num_queries=3, **SMALL).eval()
    heard = features([12])
    turned = heard._replace(states=tuple(state.flip(1) for state in heard.states))
    assert not torch.allclose(perceiver(heard).values, perceiver(turned).values, atol=1e-4)


# ctc


def test_runs_of_equal_labels_are_one():
    labels = torch.tensor([[1, 1, 0, 0, 2, 2, 2, 9], [0, 0, 3, 3, 0, 3, 9, 9]])
    inside = torch.arange(8) < torch.tensor([[7], [6]])
    run, count = label_runs(labels, inside, keep_blanks=True)
    assert run.tolist() == [[0, 0, 1, 1, 2, 2, 2, -1], [0, 0, 1, 1, 2, 3, -1, -1]]
    assert count.tolist() == [3, 4]
    run, count = label_runs(labels, inside, keep_blanks=False)
    assert run.tolist() == [[0, 0, -1, -1, 1, 1, 1, -1], [-1, -1, 0, 0, -1, 1, -1, -1]]
    assert count.tolist() == [2, 2]


def test_a_row_of_blanks_keeps_one():
    labels, inside = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    assert label_runs(labels, inside, keep_blanks=False)[1].tolist() == [1]


@torch.no_grad()
def test_ctc_weighs_frames_by_their_label():
    ctc = CTC(SOURCE, 7, num_labels=3).eval()
    ctc.label.weight.zero_()
    ctc.label.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))  # one label for everything
    heard = features([6])
    expected = ctc.proj(heard.states[-1].mean(dim=1, keepdim=True))
    found = ctc(heard)
    assert found.lengths.tolist() == [1]
    assert torch.allclose(found.values, expected, atol=1e-5)


# cif


def test_firing_equals_the_recursion():
    weights = torch.rand(20, generator=torch.Generator().manual_seed(0)) * 0.9
    weights = weights * 7 / weights.sum()
    shares, room, at = torch.zeros(7, 20), 1.0, 0
    for frame, weight in enumerate(weights.tolist()):
        while weight > 1e-7 and at < 7:
            part = min(weight, room)
            shares[at, frame] += part
            weight, room = weight - part, room - part
            if room < 1e-7:
                room, at = 1.0, at + 1
    assert torch.allclose(integrate_and_fire(weights[None], 7)[0], shares, atol=1e-5)


def test_every_embedding_weighs_one():
    weights = torch.rand(2, 13)
    weights = weights * 4 / weights.sum(dim=1, keepdim=True)
    assert torch.allclose(integrate_and_fire(weights, 4).sum(dim=2), torch.ones(2, 4), atol=1e-5)


def test_content_moves_cifs_borders():
    cif = CIF(SOURCE, 7, stride=4).eval()
    with torch.no_grad():
        cif.weight.weight.mul_(20)
    heard = features([16])
    weights = cif.weight(cif.conv(heard.states[-1].transpose(1, 2)).relu().transpose(1, 2))
    assert weights.std() > 0.1
    even = cif.proj(heard.states[-1].unflatten(1, (4, 4)).mean(dim=2))
    assert not torch.allclose(cif(heard).values, even, atol=1e-3)


# experts


@torch.no_grad()
def test_all_experts_are_a_dense_mixture():
    experts = Experts(
        SOURCE, 7, num_experts=3, num_experts_per_tok=3, stride=1, intermediate_size=8
    ).eval()
    heard = features([9])
    rows = heard.states[-1][0]
    shares = experts.router(rows).softmax(dim=-1)
    each = torch.stack([expert(rows) for expert in experts.experts], dim=1)
    expected = (shares[..., None] * each).sum(dim=1)
    assert torch.allclose(experts(heard).values[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Pool(SOURCE, 7, stride=0), "stride must be at least 1"),
        (lambda: Window(SOURCE, 7, num_queries=0), "num_queries must be at least 1"),
        (lambda: Window(SOURCE, 7, window_seconds=0.0), "window_seconds must be positive"),
        (lambda: Window(SOURCE._replace(heads=5), 7), "multiple of its heads"),
        (lambda: Perceiver(SOURCE, 7, dropout=1.0), "dropout must lie between"),
        (lambda: CTC(SOURCE, 7, num_labels=1), "num_labels must be at least 2"),
        (lambda: CIF(SOURCE, 7, stride=0), "stride must be at least 1"),
        (
            lambda: Experts(SOURCE, 7, num_experts_per_tok=5),
            "must lie between 1 and num_experts .4.",
        ),
        (lambda: Experts(SOURCE, 7, intermediate_size=0), "intermediate_size must be at least 1"),
    ],
)
def test_options_out_of_range_say_the_range(make, told):
    with pytest.raises(SpecError, match=told):
        make()
