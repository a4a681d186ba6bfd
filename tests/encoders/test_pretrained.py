"""Encoders of transformers, timm, filter banks and stacks: parity, batches, padding, errors."""

import importlib
import json

import pytest
import torch
import transformers
from helpers.families import CONFIGS
from helpers.hearing import hear, noise

from diffa.encoders.pretrained import FAMILIES, Pretrained
from diffa.errors import AudioError, CheckpointError, SpecError
from diffa.testing import EncoderSuite
from diffa.types import Encoder

FIXED = {"ast", "clap", "clap-fused", "qwen2-audio", "audio-flamingo"}


class TestUnmasked(EncoderSuite):
    name = "pretrained"
    options = {"config": CONFIGS["wav2vec2"]}


class TestMasked(EncoderSuite):
    name = "pretrained"
    options = {"config": CONFIGS["wavlm-large"]}


class TestParakeet(EncoderSuite):
    name = "pretrained"
    options = {"config": CONFIGS["parakeet"]}


class TestTower(EncoderSuite):
    name = "pretrained"
    options = {"config": CONFIGS["qwen2-audio"]}


class TestOmni(EncoderSuite):
    name = "pretrained"
    options = {"config": CONFIGS["qwen-omni"]}


class TestAst(EncoderSuite):
    name = "pretrained"
    options = {"config": CONFIGS["ast"] | {"max_length": 128}}


def library(name, encoder=None):
    """The library's own class, with the weights of ``encoder`` where there is one."""
    config = CONFIGS[name]
    module, _, cls = FAMILIES[config["model_type"]].model.partition(":")
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), cls)
    torch.manual_seed(0)
    model = cls(cls.config_class.from_dict(dict(config))).eval()
    if encoder is not None:
        report = model.load_state_dict(encoder.encoder.state_dict(), strict=False)
        assert not report.unexpected_keys
    return model


def seconds(encoder, *counts):
    """Noise of so many seconds and a few odd samples."""
    rate = encoder.sample_rate
    return [noise(int(count * rate) + 7, seed=i) for i, count in enumerate(counts)]


@pytest.fixture(params=CONFIGS)
def encoder(request):
    return Pretrained(config=CONFIGS[request.param]).eval()


# every family


def test_an_encoder_emits_what_it_declares(encoder):
    (wave,) = seconds(encoder, 0.9)
    features = hear(encoder, wave)
    assert isinstance(encoder, Encoder)
    assert len(features.states) == encoder.out.layers + 1
    count = int(features.lengths)
    assert all(state.shape == (1, count, encoder.out.width) for state in features.states)
    assert encoder.out.width % encoder.out.heads == 0
    assert abs(count - 0.9 * encoder.out.rate) < 2
    assert features.extents.tolist() == [count]


def test_batch_equals_single(encoder):
    waves = seconds(encoder, 0.7, 0.31, 1.4, 0.7, 0.001)
    batch = hear(encoder, *waves, garbage=1e3)
    for row, wave in enumerate(waves):
        alone = hear(encoder, wave)
        count = int(batch.lengths[row])
        assert count == int(alone.lengths) > 0
        for state, other in zip(batch.states, alone.states, strict=True):
            assert torch.allclose(state[row, :count], other[0], atol=2e-5)
            assert state[row, count:].eq(0).all()


@pytest.mark.parametrize("garbage", [1e4, float("nan")])
def test_padding_does_not_leak(encoder, garbage):
    waves = seconds(encoder, 0.2, 0.45)
    clean, dirty = hear(encoder, *waves), hear(encoder, *waves, garbage=garbage)
    assert all(a.equal(b) for a, b in zip(clean.states, dirty.states, strict=True))


def test_a_row_without_samples_has_no_frames(encoder):
    wave = noise(encoder.sample_rate // 2)
    features = encoder(torch.stack([wave, wave]), torch.tensor([0, len(wave)]))
    assert features.lengths[0] == 0 and features.extents[0] == 1
    assert features.states[-1].isfinite().all()


def test_gradients_reach_the_encoder(encoder):
    waves = torch.stack(seconds(encoder, 0.4))
    encoder(waves, torch.tensor([waves.shape[1]])).states[-1].square().sum().backward()
    for name, value in encoder.named_parameters():
        assert value.grad is not None or not value.requires_grad, name


def test_a_dry_run_has_no_weights(encoder):
    with torch.device("meta"):
        dry = Pretrained(config=encoder.encoder.config.to_dict())
    assert dry.out == encoder.out
    assert all(value.is_meta for value in dry.parameters())


def test_random_weights_are_their_seeds():
    first, same, other = (Pretrained(config=CONFIGS["wavlm"], seed=seed) for seed in (1, 1, 2))
    pairs = zip(first.parameters(), same.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    pairs = zip(first.parameters(), other.parameters(), strict=True)
    assert not all(a.equal(b) for a, b in pairs)


def test_bfloat16_weights_listen():
    for name in ("wavlm-large", "wav2vec2-bert", "ast", "qwen-omni", "parakeet"):
        encoder = Pretrained(config=CONFIGS[name]).eval().to(torch.bfloat16)
        features = hear(encoder, *seconds(encoder, 0.3))
        assert features.states[-1].dtype == torch.bfloat16, name
        assert features.states[-1].isfinite().all(), name


# parity with transformers: its own extractor and class, the same weights


SPEECH = [name for name in CONFIGS if name.startswith(("wav2vec2", "hubert", "wavlm", "data"))]


@pytest.mark.parametrize("name", [name for name in SPEECH if name != "wav2vec2-bert"])
@torch.no_grad()
def test_speech_encoders_equal_transformers(name):
    encoder = Pretrained(config=CONFIGS[name]).eval()
    wave = noise(9001)
    layered = "large" in name or name == "data2vec"
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=layered)
    told = extract(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    expected = library(name, encoder)(told.input_values, output_hidden_states=True)
    same(hear(encoder, wave), [*expected.hidden_states[:-1], expected.last_hidden_state])


@torch.no_grad()
def test_wav2vec2_bert_equals_transformers():
    encoder = Pretrained(config=CONFIGS["wav2vec2-bert"]).eval()
    for samples in (9001, 9161):  # an odd and an even number of filter banks
        wave = noise(samples)
        told = transformers.SeamlessM4TFeatureExtractor()(
            wave.numpy(), sampling_rate=16000, return_tensors="pt"
        )
        expected = library("wav2vec2-bert", encoder)(**told, output_hidden_states=True)
        count = int(told.attention_mask.sum())
        same(hear(encoder, wave), [s[:, :count] for s in expected.hidden_states], atol=1e-4)


@torch.no_grad()
def test_ast_equals_transformers():
    encoder = Pretrained(config=CONFIGS["ast"]).eval()
    extract = transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64)
    wave = noise(9001)
    told = extract(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    expected = library("ast", encoder)(**told, output_hidden_states=True)
    states = [*expected.hidden_states[:-1], expected.last_hidden_state]
    high, wide = 2, 5
    frames = [s[:, 2:].reshape(1, high, wide, 16).mean(dim=1) for s in states]
    heard = hear(encoder, wave)
    assert int(heard.lengths) == wide
    same(heard, frames)


@pytest.mark.parametrize("name, cut", [("clap", "rand_trunc"), ("clap-fused", "fusion")])
@torch.no_grad()
def test_clap_equals_transformers(name, cut):
    encoder = Pretrained(config=CONFIGS[name]).eval()
    extract = transformers.ClapFeatureExtractor(truncation=cut)
    wave = noise(4 * 48000 + 11)
    told = extract(wave.numpy(), sampling_rate=48000, return_tensors="pt")
    longer = torch.zeros(1, 1, dtype=torch.bool)  # the extractor draws one to call longer
    expected = library(name, encoder)(told.input_features.float(), is_longer=longer)
    frames = expected.last_hidden_state.mean(dim=2).transpose(1, 2)
    heard = hear(encoder, wave)
    assert heard.lengths.tolist() == [13]
    assert torch.allclose(heard.states[-1], frames[:, :13], atol=1e-4)


@torch.no_grad()
def test_parakeet_equals_transformers():
    encoder = Pretrained(config=CONFIGS["parakeet"]).eval()
    wave = noise(9001)
    extract = transformers.ParakeetFeatureExtractor()
    told = extract(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    expected = library("parakeet", encoder)(**told, output_hidden_states=True)
    count = int(expected.attention_mask.sum())
    same(hear(encoder, wave), [s[:, :count] for s in expected.hidden_states])


def whisper_mel(wave, mels=32, chunk=1):
    extract = transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=chunk)
    return extract(
        wave.numpy(), sampling_rate=16000, return_tensors="pt", return_attention_mask=True
    )


@pytest.mark.parametrize("name", ["qwen2-audio", "audio-flamingo"])
@torch.no_grad()
def test_towers_equal_transformers(name):
    encoder, wave = Pretrained(config=CONFIGS[name]).eval(), noise(9001)
    theirs = library(name, encoder)
    told = whisper_mel(wave)
    mask = told.attention_mask
    if name == "audio-flamingo":
        expected = theirs(told.input_features, input_features_mask=mask, output_hidden_states=True)
    else:
        seen = torch.arange(50) < (mask.sum() - 1) // 2 + 1
        bias = torch.zeros(1, 1, 50, 50).masked_fill(~seen, float("-inf"))
        expected = theirs(told.input_features, attention_mask=bias, output_hidden_states=True)
    _, count = theirs._get_feat_extract_output_lengths(mask.sum())
    heard = hear(encoder, wave)
    assert int(heard.lengths) == count
    states = [s.unflatten(1, (25, 2)).mean(dim=2) for s in expected.hidden_states[:-1]]
    same(heard, [s[:, :count] for s in [*states, expected.last_hidden_state]])


@torch.no_grad()
def test_omni_equals_transformers():
    encoder = Pretrained(config=CONFIGS["qwen-omni"]).eval()
    theirs = library("qwen-omni", encoder)
    for samples in (9001, 6400 + 161):
        wave = noise(samples)
        told = whisper_mel(wave)
        count = told.attention_mask.sum()
        expected = theirs(told.input_features[0, :, :count], feature_lens=count[None])
        heard = theirs.proj(hear(encoder, wave).states[-1][0])  # the projection is not diffa's
        assert torch.allclose(heard, expected.last_hidden_state, atol=1e-5)


def same(heard, states, atol=1e-5):
    assert len(heard.states) == len(states)
    for ours, theirs in zip(heard.states, states, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=atol)


# windows


def test_windows_follow_one_another():
    encoder = Pretrained(config=CONFIGS["qwen2-audio"]).eval()
    wave = noise(2 * 16000 + 500)
    whole = hear(encoder, wave)
    assert whole.lengths.tolist() == [25 + 25 + 1]
    for i in range(2):
        part = hear(encoder, wave[i * 16000 : (i + 1) * 16000])
        assert torch.allclose(
            whole.states[-1][:, 25 * i : 25 * (i + 1)], part.states[-1], atol=1e-5
        )


def test_seconds_cut_long_audio_into_pieces():
    encoder = Pretrained(config=CONFIGS["wavlm"], window_seconds=0.5).eval()
    wave = noise(16000)
    whole, part = hear(encoder, wave), hear(encoder, wave[8000:])
    assert int(whole.lengths) == 2 * int(part.lengths)
    assert torch.allclose(whole.states[1][:, int(part.lengths) :], part.states[1], atol=1e-5)


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("ast", 3.0, "window is 0.64 s"),
        ("wavlm", 0.001, "at least 0.025"),
        ("wavlm", -1.0, "least"),
    ],
)
def test_seconds_out_of_range_say_the_range(name, value, told):
    with pytest.raises(SpecError, match=told):
        Pretrained(config=CONFIGS[name], window_seconds=value)


# checkpoints


WHOLE = {
    "wavlm": (transformers.WavLMForCTC, CONFIGS["wavlm"]),
    "hubert-large": (transformers.HubertForCTC, CONFIGS["hubert-large"]),
    "wav2vec2": (transformers.Wav2Vec2Model, CONFIGS["wav2vec2"]),
    "wav2vec2-bert": (transformers.Wav2Vec2BertForCTC, CONFIGS["wav2vec2-bert"]),
    "ast": (transformers.ASTForAudioClassification, CONFIGS["ast"]),
    "parakeet": (transformers.ParakeetEncoder, CONFIGS["parakeet"]),
    "qwen2-audio": (None, CONFIGS["qwen2-audio"]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_checkpoints_of_encoders_and_of_whole_models_load(name, tmp_path):
    cls, config = WHOLE[name]
    if cls is None:
        module, _, kind = FAMILIES[config["model_type"]].model.partition(":")
        cls = getattr(importlib.import_module(f"transformers.models.{module}"), kind)
    torch.manual_seed(3)
    settings = cls.config_class.from_dict({**config, "vocab_size": 20})
    model = cls(settings)
    model.save_pretrained(tmp_path)
    encoder = Pretrained(checkpoint=str(tmp_path)).eval()
    theirs = getattr(model, model.base_model_prefix, model)
    expected = dict(theirs.named_parameters())
    for key, value in encoder.encoder.named_parameters():
        assert value.equal(expected[key]), key


def test_towers_are_found_inside_whole_models(tmp_path):
    """A whole Parakeet CTC model and a whole CLAP, whose encoders lie below a prefix."""
    ctc = transformers.ParakeetForCTC(
        transformers.ParakeetCTCConfig(vocab_size=12, encoder_config=CONFIGS["parakeet"])
    )
    ctc.save_pretrained(tmp_path / "ctc")
    encoder = Pretrained(checkpoint=str(tmp_path / "ctc"))
    first = encoder.encoder.layers[0].self_attn.q_proj.weight
    assert first.equal(ctc.encoder.layers[0].self_attn.q_proj.weight)
    text = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    clap = transformers.ClapModel(
        transformers.ClapConfig(audio_config=CONFIGS["clap"], text_config=text)
    )
    clap.save_pretrained(tmp_path / "clap")
    encoder = Pretrained(checkpoint=str(tmp_path / "clap"))
    expected = dict(clap.audio_model.named_parameters())
    assert all(v.equal(expected[k]) for k, v in encoder.encoder.named_parameters())


def test_the_front_end_follows_the_preprocessor(tmp_path):
    transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            **{k: v for k, v in CONFIGS["wav2vec2"].items() if k[:5] != "model"}
        )
    ).save_pretrained(tmp_path)
    wave = noise(8000) * 3 + 0.1
    plain = hear(Pretrained(checkpoint=str(tmp_path)).eval(), wave)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    levelled = hear(Pretrained(checkpoint=str(tmp_path)).eval(), wave)
    assert not torch.allclose(plain.states[0], levelled.states[0])


def test_weights_that_are_missing_are_named(tmp_path):
    model = library("wavlm")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"missing: encoder\.layers\.3"):
        Pretrained(checkpoint=str(tmp_path))


def test_an_unknown_family_says_what_is_known():
    with pytest.raises(SpecError, match="did you mean 'wavlm'"):
        Pretrained(config={"model_type": "wavml"})
    with pytest.raises(SpecError, match="give either checkpoint"):
        Pretrained()


def test_audio_and_lengths_that_do_not_fit_are_refused():
    encoder = Pretrained(config=CONFIGS["hubert"])
    with pytest.raises(AudioError, match="do not fit"):
        encoder(torch.zeros(1, 100), torch.tensor([101]))
