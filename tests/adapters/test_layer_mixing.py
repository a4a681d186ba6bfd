"""Weighted layer mixing in the adapters that read one state otherwise."""

import pytest
import torch

from diffa.adapters.conv import Conv
from diffa.adapters.linear import Linear
from diffa.data.cache import layers_used_by
from diffa.errors import SpecError
from diffa.testing import AdapterSuite
from diffa.types import Features, FeatureSpec

SOURCE = FeatureSpec(width=12, layers=3, rate=50.0, heads=3)


class TestConvOverAllLayers(AdapterSuite):
    name = "conv"
    options = {"mix_layers": True}


class TestLinearOverAllLayers(AdapterSuite):
    name = "linear"
    options = {"stride": 3, "intermediate_size": 16, "mix_layers": True}


def features() -> Features:
    generator = torch.Generator().manual_seed(1)
    states = tuple(torch.randn(2, 24, 12, generator=generator) for _ in range(4))
    return Features(states, torch.tensor([24, 17]), torch.tensor([24, 24]))


@pytest.mark.parametrize("part", [Conv, Linear])
def test_all_weight_on_the_last_state_is_reading_the_last_state(part):
    torch.manual_seed(0)
    plain = part(SOURCE, 8)
    mixed = part(SOURCE, 8, mix_layers=True)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        mixed.mixer.weights[-1] = 60.0
        assert torch.allclose(plain(features()).values, mixed(features()).values, atol=1e-5)
        mixed.mixer.weights[0] = 60.0
        assert not torch.allclose(plain(features()).values, mixed(features()).values, atol=1e-2)


@pytest.mark.parametrize("part", [Conv, Linear])
def test_a_feature_cache_keeps_every_layer_that_is_mixed(part):
    assert layers_used_by([part(SOURCE, 8)], SOURCE) == (3,)
    assert layers_used_by([part(SOURCE, 8, mix_layers=True)], SOURCE) == (0, 1, 2, 3)


def test_published_weights_have_no_mixture():
    with pytest.raises(SpecError, match="no published weights"):
        Conv(SOURCE, 8, mix_layers=True, checkpoint="folder")
