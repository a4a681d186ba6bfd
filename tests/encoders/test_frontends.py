"""timm backbones, filter banks and stacks of two encoders."""

import sys

import pytest
import torch
import torchaudio
from helpers.hearing import hear, noise

from diffa.encoders.filterbank import FilterBank
from diffa.encoders.stack import Stack, resample_frames
from diffa.encoders.vision import MEAN, STD, Timm
from diffa.encoders.windows import split_windows
from diffa.errors import CheckpointError, PluginError, SpecError
from diffa.testing import EncoderSuite
from diffa.types import Encoder

SECOND = 16_000
TINY = {"name": "tiny", "width": 16, "layers": 2, "heads": 2, "window_seconds": 1.0}
MAKERS = {
    "mel": lambda: FilterBank(num_mel_bins=12),
    "kaldi": lambda: FilterBank(filterbank="kaldi", num_mel_bins=12, hop_seconds=0.02),
    "vit": lambda: Timm(model="vit_tiny_patch16_224", num_mel_bins=32, window_seconds=0.64),
    "conv": lambda: Timm(model="resnet10t", num_mel_bins=64, window_seconds=0.64),
    "stack": lambda: Stack(first=TINY, second={"name": "mel", "num_mel_bins": 8}),
    "stack-slow": lambda: Stack(first={"name": "mel", "num_mel_bins": 8}, second=TINY),
}


class TestMel(EncoderSuite):
    name = "mel"
    options = {"num_mel_bins": 8}

    def test_gradient_reaches_every_trainable_weight(self):
        """There is none to reach."""
        assert not list(self.new().parameters())


class TestStack(EncoderSuite):
    name = "stack"
    options = {"first": TINY, "second": {"name": "mel", "num_mel_bins": 8}}


class TestTimm(EncoderSuite):
    name = "timm"
    options = {"model": "resnet10t", "num_mel_bins": 32, "window_seconds": 0.64}


@pytest.fixture(params=MAKERS, scope="module")
def encoder(request):
    return MAKERS[request.param]().eval()


def test_an_encoder_emits_what_it_declares(encoder):
    features = hear(encoder, noise(SECOND))
    assert isinstance(encoder, Encoder)
    assert len(features.states) == encoder.out.layers + 1
    shape = (1, int(features.extents), encoder.out.width)
    assert all(state.shape == shape for state in features.states)
    assert encoder.out.width % encoder.out.heads == 0
    assert abs(int(features.lengths) - encoder.out.rate) < 2


def test_batch_equals_single(encoder):
    waves = [noise(n, seed=n) for n in (11_200, 5000, 22_401, 200)]
    batch = hear(encoder, *waves, garbage=float("nan"))
    for row, wave in enumerate(waves):
        alone = hear(encoder, wave)
        extent = int(alone.extents)
        assert int(batch.extents[row]) == extent
        assert int(batch.lengths[row]) == int(alone.lengths) > 0
        for state, other in zip(batch.states, alone.states, strict=True):
            assert torch.allclose(state[row, :extent], other[0], atol=1e-4)
            assert state[row, extent:].eq(0).all()


def test_a_row_without_samples_has_no_frames(encoder):
    features = encoder(noise(2 * SECOND).view(2, -1), torch.tensor([0, SECOND]))
    assert features.lengths[0] == 0 and features.extents[0] >= 1
    assert features.states[-1].isfinite().all()


def test_a_dry_run_has_no_weights(request):
    for maker in MAKERS.values():
        with torch.device("meta"):
            dry = maker()
        assert all(value.is_meta for value in dry.parameters())


# filter banks


def test_mel_equals_torchaudio():
    wave = noise(7003)
    transform = torchaudio.transforms.MelSpectrogram(16000, 400, hop_length=160, n_mels=12)
    expected = transform(wave).clamp(min=1e-10).log().T
    heard = hear(FilterBank(num_mel_bins=12), wave)
    assert torch.allclose(heard.states[0][0], expected, atol=1e-5)


def test_kaldi_equals_torchaudio():
    wave = noise(7003)
    expected = torchaudio.compliance.kaldi.fbank(wave[None], num_mel_bins=12, dither=0.0)
    heard = hear(FilterBank(filterbank="kaldi", num_mel_bins=12), wave)
    assert torch.allclose(heard.states[0][0], expected, atol=1e-5)


def test_the_last_state_is_levelled_and_silence_is_finite():
    heard = hear(FilterBank(num_mel_bins=6), noise(9000), torch.zeros(9000))
    assert heard.states[1].isfinite().all()
    assert torch.allclose(heard.states[1][0].std(dim=0, correction=0), torch.ones(6), atol=1e-3)
    assert heard.states[1][0].mean(dim=0).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [{"num_mel_bins": 0}, {"hop_seconds": 0.0}, {"hop_seconds": -1.0}, {"hop_seconds": 1e9}],
)
def test_filter_banks_out_of_range_say_the_range(options):
    with pytest.raises(SpecError, match="must"):
        FilterBank(**options)


# timm


@torch.no_grad()
def test_a_vision_transformer_equals_timm():
    encoder = Timm(model="vit_tiny_patch16_224", num_mel_bins=32, window_seconds=0.64).eval()
    wave = noise(64 * 160)
    bank = torchaudio.compliance.kaldi.fbank(
        wave[None], num_mel_bins=32, window_type="hanning", dither=0.0
    )
    image = torch.zeros(1, 1, 64, 32)
    image[0, 0, : len(bank)] = bank
    image = (image - MEAN) / (2 * STD)
    features = encoder.encoder.forward_features(image)[:, 1:].unflatten(1, (4, 2)).mean(dim=2)
    heard = hear(encoder, wave)
    assert len(heard.states) == 13  # twelve blocks, and the last one normalised
    assert torch.allclose(heard.states[-1], features, atol=1e-5)
    third = encoder.encoder.forward_intermediates(
        image, indices=[2], output_fmt="NLC", intermediates_only=True
    )[0]
    assert torch.allclose(heard.states[2], third.unflatten(1, (4, 2)).mean(dim=2), atol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet10t"])
@torch.no_grad()
def test_pyramids_equal_timm(name):
    encoder = Timm(model=name, num_mel_bins=64, window_seconds=0.64).eval()
    image = torch.randn(1, 1, 64, 64)
    features = encoder.encoder.forward_features(image)
    features = features.mean(dim=2) if name[0] == "s" else features.mean(dim=3).transpose(1, 2)
    assert torch.allclose(encoder._states(image)[-1], features, atol=1e-5)


def test_timm_weights_load_without_their_classifier_and_colours(tmp_path):
    import timm
    from safetensors.torch import save_file

    coloured = timm.create_model("resnet10t", num_classes=5)
    save_file(coloured.state_dict(), tmp_path / "model.safetensors")
    encoder = Timm(
        model="resnet10t", num_mel_bins=64, window_seconds=0.64, checkpoint=str(tmp_path)
    )
    own = encoder.encoder.state_dict()
    grey = coloured.conv1[0].weight.sum(dim=1, keepdim=True)
    assert torch.allclose(own["conv1.0.weight"], grey)
    assert own["layer4.0.conv1.weight"].equal(coloured.layer4[0].conv1.weight)
    with pytest.raises(CheckpointError, match="does not fit"):
        Timm(model="resnet18", num_mel_bins=64, window_seconds=0.64, checkpoint=str(tmp_path))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"model": "vit_tny"}, "timm cannot make 'vit_tny'"),
        ({"num_mel_bins": 0}, "num_mel_bins must"),
        ({"window_seconds": float("nan")}, "window_seconds must"),
        ({"num_mel_bins": 4, "window_seconds": 0.04}, "4 x 4|timm cannot make"),
        ({"pretrained": True, "checkpoint": "x"}, "exclude each other"),
    ],
)
def test_timm_options_out_of_range_say_what_to_do(options, told):
    with pytest.raises(SpecError, match=told):
        Timm(**options)


def test_a_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PluginError, match=r"pip install 'diffa-audio\[timm\]'"):
        Timm()
    FilterBank()  # and disturbs nothing else


# stack


def test_a_stack_holds_both_encoders_frames():
    stack = Stack(first=TINY, second={"name": "mel", "num_mel_bins": 8}).eval()
    wave = noise(SECOND)
    both, one = hear(stack, wave), hear(stack.first, wave)
    two = hear(stack.second, wave)
    assert stack.out.width == 16 + 8 and stack.out.rate == 50.0
    assert both.states[-1][..., :16].equal(one.states[-1])
    pair = two.states[-1][:, 20:22].mean(dim=1)  # at twice the rate, two frames are one
    assert torch.allclose(both.states[-1][:, 10, 16:], pair, atol=1e-5)


def test_a_stack_resamples_the_audio():
    clap = {
        "model_type": "clap_audio_model",
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 4],
        "hidden_size": 64,
    }
    stack = Stack(first=TINY, second={"name": "pretrained", "config": clap}).eval()
    assert stack.sample_rate == 48000
    waves = [noise(48000), noise(24000, seed=1)]
    batch = hear(stack, *waves, garbage=1e4)
    assert batch.lengths.tolist() == [50, 25]
    alone = hear(stack, waves[1])
    assert torch.allclose(batch.states[-1][1, :50], alone.states[-1][0], atol=1e-3)


@pytest.mark.parametrize("ratio, expected", [(2.0, [0.5, 2.5]), (0.5, [0, 0]), (1.0, [0, 1])])
def test_resampling_averages_or_repeats(ratio, expected):
    state = torch.arange(4.0)[None, :, None]
    out = resample_frames(state, torch.tensor([4]), ratio, 2)
    assert out[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "second, told",
    [
        ({"name": "tny"}, "did you mean 'tiny'"),
        ({"name": "tiny", "widht": 3}, "second.widht: unknown option, did you mean 'width'"),
        ({}, "must name an encoder"),
    ],
)
def test_a_stack_names_what_it_cannot_build(second, told):
    with pytest.raises(SpecError, match=told):
        Stack(second=second)


def test_cutting_keeps_every_sample():
    rows = split_windows(torch.arange(10.0)[None], torch.tensor([7]), 3)
    assert [piece.tolist() for piece in rows[0]] == [[0, 1, 2], [3, 4, 5], [6]]
