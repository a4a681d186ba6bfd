"""Whisper and tiny: features, windows, batches, weights of other shapes, errors."""

import json

import numpy as np
import pytest
import torch
from helpers.hearing import hear
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import diffa
from diffa.encoders.mel import LogMelConfig, log_mel, mel_filters
from diffa.encoders.tiny import Tiny
from diffa.encoders.whisper import Whisper
from diffa.encoders.whisper_windows import hidden_states
from diffa.errors import AudioError, CheckpointError, SpecError
from diffa.types import Encoder, FeatureSpec

SECOND = 16_000


@pytest.fixture(scope="module")
def tiny():
    return Tiny(width=16, layers=3, heads=2, window_seconds=1.0).eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_config(**changes):
    options = {
        "d_model": 24,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 40,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 16,
        "num_mel_bins": 64,
        "max_source_positions": 100,
        "vocab_size": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "decoder_start_token_id": 4,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    return WhisperConfig(**options | changes)


def saved(folder, kind=WhisperForConditionalGeneration, dtype=torch.float32, **changes):
    """A Whisper folder with random weights, written by transformers."""
    torch.manual_seed(0)
    model = kind(small_config(**changes)).to(dtype)
    model.save_pretrained(folder)
    return model


# log-mel


@pytest.mark.parametrize("bins", [64, 80, 128])
def test_log_mel_equals_transformers(bins):
    audio = noise(2, 3 * SECOND) * 0.1
    audio[1] *= 1e-4
    theirs = WhisperFeatureExtractor(feature_size=bins, chunk_length=3)
    expected = theirs(list(audio.numpy()), sampling_rate=SECOND, return_tensors="pt")
    assert torch.allclose(
        log_mel(audio, LogMelConfig(bins)), expected.input_features, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("bins, rate", [(80, 16000), (128, 16000), (40, 24000)])
def test_mel_filters_equal_transformers(bins, rate):
    theirs = mel_filter_bank(201, bins, 0.0, 8000.0, rate, norm="slaney", mel_scale="slaney")
    ours = mel_filters(LogMelConfig(bins, sampling_rate=rate))
    assert np.allclose(ours.numpy(), theirs.T, atol=1e-7)


def test_silence_gives_finite_features():
    assert log_mel(torch.zeros(1, SECOND), LogMelConfig()).isfinite().all()


def test_log_mel_stays_float32_under_autocast_and_in_a_bfloat16_encoder():
    audio = noise(1, SECOND)
    expected = log_mel(audio, LogMelConfig())
    with torch.autocast("cpu", torch.bfloat16):
        assert log_mel(audio, LogMelConfig()).equal(expected)
    encoder = Tiny(width=16, layers=1, heads=2, window_seconds=1.0).to(torch.bfloat16).eval()
    with torch.no_grad():
        features = encoder(audio, torch.tensor([SECOND]))
        states = hidden_states(encoder.encoder, expected)
    assert features.states[-1].dtype == torch.bfloat16
    assert features.states[-1].equal(states[-1])


def test_the_front_end_trains_after_inference_mode():
    mel = LogMelConfig(num_mel_bins=33)
    with torch.inference_mode():
        log_mel(noise(1, SECOND), mel)
    audio = noise(1, SECOND).requires_grad_()
    log_mel(audio, mel).sum().backward()
    assert audio.grad.isfinite().all()


# states


def test_an_encoder_emits_what_it_declares(tiny):
    features = hear(tiny, noise(SECOND // 2))
    assert isinstance(tiny, Encoder)
    assert tiny.out == FeatureSpec(width=16, layers=3, rate=50.0, heads=2)
    assert len(features.states) == tiny.out.layers + 1
    assert all(state.shape == (1, 50, 16) for state in features.states)
    assert features.lengths.tolist() == [25] and features.extents.tolist() == [50]


def test_states_equal_transformers(tmp_path):
    theirs = saved(tmp_path).model.encoder.eval()
    ours = Whisper(checkpoint=str(tmp_path)).eval()
    wave = noise(SECOND)
    features = hear(ours, wave)
    mel = log_mel(torch.nn.functional.pad(wave, (0, SECOND))[None], ours.mel)
    with torch.no_grad():
        expected = theirs(mel, output_hidden_states=True)
    assert len(features.states) == len(expected.hidden_states)
    for state, other in zip(features.states, expected.hidden_states, strict=True):
        assert torch.allclose(state, other, atol=1e-5)
    assert torch.allclose(features.states[-1], expected.last_hidden_state, atol=1e-5)


def test_reading_twice_gives_the_same(tiny):
    first, second = (hear(tiny, noise(SECOND)) for _ in range(2))
    assert first.states[-1].equal(second.states[-1])


def test_encode_log_mel_gives_the_states_of_the_audio_that_the_frames_come_from(tiny):
    wave = noise(1, SECOND)
    with torch.no_grad():
        states = tiny.encode_log_mel(log_mel(wave, tiny.mel))
    for state, other in zip(states, hear(tiny, wave[0]).states, strict=True):
        assert state.equal(other)


@pytest.mark.parametrize("offset", [0, 7, 30])
def test_encode_log_mel_places_the_frames_at_the_position_offset(tiny, offset):
    frames = log_mel(noise(1, 20 * 320), tiny.mel)
    with torch.no_grad():
        states = tiny.encode_log_mel(frames, position_offset=offset)
        start = tiny.encode_log_mel(frames)
    positions = tiny.encoder.embed_positions.weight
    assert states[0].shape == (1, 20, 16) and tiny.window_frames == 50
    moved = start[0] - positions[:20] + positions[offset : offset + 20]
    assert torch.allclose(states[0], moved, atol=1e-5)
    assert states[-1].equal(start[-1]) == (offset == 0)


# windows


def test_audio_beyond_the_window_is_read_in_windows_not_cut(tiny):
    wave = noise(2 * SECOND + 500)
    features = hear(tiny, wave)
    assert features.extents.tolist() == [150]
    assert features.lengths.tolist() == [102]
    for i in range(3):
        alone = hear(tiny, wave[i * SECOND : (i + 1) * SECOND])
        for whole, part in zip(features.states, alone.states, strict=True):
            assert torch.allclose(whole[:, 50 * i : 50 * (i + 1)], part, atol=1e-5)


def test_half_a_minute_and_a_sample_takes_two_windows():
    encoder = Tiny(width=4, layers=1, heads=1).eval()
    for samples, windows in ((30 * SECOND, 1), (30 * SECOND + 1, 2)):
        features = hear(encoder, noise(samples))
        assert features.extents.tolist() == [windows * 1500]
        assert features.states[0].shape[1] == windows * 1500
        assert features.lengths.tolist() == [1500 + windows - 1]


def test_batch_equals_single_when_rows_need_different_numbers_of_windows(tiny):
    waves = [noise(n, seed=n) for n in (700, 2 * SECOND + 9000, SECOND, SECOND + 1)]
    batch = hear(tiny, *waves)
    assert batch.extents.tolist() == [50, 150, 50, 100]
    for row, wave in enumerate(waves):
        alone = hear(tiny, wave)
        extent = int(batch.extents[row])
        assert int(batch.lengths[row]) == int(alone.lengths)
        for state, other in zip(batch.states, alone.states, strict=True):
            assert torch.allclose(state[row, :extent], other[0], atol=1e-5)
            assert state[row, extent:].eq(0).all()


def test_max_seconds_cuts_recordings_before_the_windows(tiny):
    cut = Tiny(width=16, layers=3, heads=2, window_seconds=1.0, max_seconds=1.5).eval()
    waves = [noise(2 * SECOND + 500), noise(700, seed=1)]
    features = hear(cut, *waves)
    expected = hear(tiny, waves[0][: 3 * SECOND // 2], waves[1])
    assert features.lengths.tolist() == [75, 3] and features.extents.tolist() == [100, 50]
    for state, other in zip(features.states, expected.states, strict=True):
        assert state.equal(other)


def test_max_seconds_does_not_hide_lengths_that_do_not_fit():
    cut = Tiny(width=4, layers=1, heads=1, window_seconds=1.0, max_seconds=0.5)
    with pytest.raises(AudioError, match="lengths"):
        cut(torch.zeros(1, SECOND), torch.tensor([SECOND + 1]))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_max_seconds_out_of_range_is_refused(seconds):
    with pytest.raises(SpecError, match="max_seconds must be positive and finite"):
        Tiny(width=4, layers=1, heads=1, max_seconds=seconds)


@pytest.mark.parametrize("preset", ["diffa-1", "diffa-2"])
def test_published_presets_give_439_embeddings_for_45_seconds_as_the_original(preset):
    """64 queries and 375 frames of 30 s; without the cut, 45 s give 64 and 562."""
    spec = diffa.Spec.read(preset)
    options = spec.data["encoder"]
    assert options["max_seconds"] == 30.0
    model = diffa.build(spec, device="meta")
    counts = {}
    for max_seconds in (options["max_seconds"], None):
        encoder = Tiny(width=4, layers=1, heads=1, max_seconds=max_seconds)
        frames = encoder(torch.zeros(1, 45 * SECOND), torch.tensor([45 * SECOND])).lengths
        counts[max_seconds] = sum(int(a.out_lengths(frames)) for a in model.adapters.values())
    assert counts == {30.0: 439, None: 626}


@pytest.fixture(scope="module")
def brief():
    """Reads half a second of silence after audio, not a whole window of three seconds."""
    return Tiny(width=16, layers=3, heads=2, window_seconds=3.0, trailing_silence=0.5).eval()


def test_a_tail_reads_whole_seconds_that_hold_the_audio_and_the_tail(brief):
    lengths = (0, SECOND // 2, SECOND // 2 + 1, 2 * SECOND, 3 * SECOND, 3 * SECOND + 1)
    heard = hear(brief, *(noise(n, seed=n) for n in lengths))
    assert heard.extents.tolist() == [50, 50, 100, 150, 150, 300]
    assert heard.lengths.tolist() == [0, 25, 26, 100, 150, 151]


def test_a_row_without_samples_and_without_a_tail_still_has_a_window():
    heard = hear(
        Tiny(width=4, layers=1, heads=1, window_seconds=3.0, trailing_silence=0.0).eval(),
        torch.zeros(0),
    )
    assert heard.extents.tolist() == [50] and heard.lengths.tolist() == [0]


def test_a_tail_is_as_if_the_window_were_so_short(brief):
    short = Tiny(width=16, layers=3, heads=2, window_seconds=1.0).eval()
    wave, places = noise(6000), short.encoder.embed_positions.weight
    short.encoder.load_state_dict(brief.encoder.state_dict() | {"embed_positions.weight": places})
    for one, other in zip(hear(brief, wave).states, hear(short, wave).states, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("lengths", [(40_000, 700, SECOND, 50_000, 900), (SECOND, 700), (900, 700)])
def test_batch_equals_single_with_a_tail(brief, lengths):
    """Rows of three windows, of two, and of one."""
    waves = [noise(n, seed=n) for n in lengths]
    batch = hear(brief, *waves, garbage=float("nan"))
    for row, wave in enumerate(waves):
        alone = hear(brief, wave)
        extent = int(batch.extents[row])
        assert extent == int(alone.extents)
        for state, other in zip(batch.states, alone.states, strict=True):
            assert torch.allclose(state[row, :extent], other[0], atol=1e-5)
            assert state[row, extent:].eq(0).all()


@pytest.mark.parametrize("garbage", [1e4, float("nan")])
def test_padding_does_not_leak(tiny, garbage):
    waves = [noise(5000), noise(SECOND + 3000, seed=1)]
    clean, dirty = hear(tiny, *waves), hear(tiny, *waves, garbage=garbage)
    assert all(a.equal(b) for a, b in zip(clean.states, dirty.states, strict=True))


def test_audio_padded_beyond_the_longest_row_changes_nothing(tiny):
    wave = noise(1, 3 * SECOND)
    with torch.no_grad():
        long = tiny(wave, torch.tensor([SECOND]))
    assert long.states[-1].equal(hear(tiny, wave[0, :SECOND]).states[-1])


def test_a_row_without_samples_still_has_a_window(tiny):
    features = tiny(noise(2, SECOND), torch.tensor([0, SECOND]))
    assert features.lengths.tolist() == [0, 50] and features.extents.tolist() == [50, 50]
    assert features.states[-1].isfinite().all()


@pytest.mark.parametrize(
    "audio, lengths",
    [((100,), [100]), ((2, 100), [100]), ((1, 100), [101]), ((1, 100), [-1])],
)
def test_audio_and_lengths_that_do_not_fit_are_refused(tiny, audio, lengths):
    with pytest.raises(AudioError, match="lengths"):
        tiny(torch.zeros(*audio), torch.tensor(lengths))


# train mode


def test_layerdrop_acts_in_training_only_and_keeps_every_state_in_place(tiny):
    encoder = WhisperEncoder(small_config(encoder_layerdrop=1.0))
    features = noise(1, 64, 200)
    states = hidden_states(encoder.train(), features)
    assert len(states) == 4 and states[0].equal(states[2])
    states = hidden_states(encoder.eval(), features)
    assert not states[0].equal(states[2])


def test_dropout_of_the_configuration_acts_in_training_only(tmp_path):
    saved(tmp_path, dropout=0.5)
    encoder = Whisper(checkpoint=str(tmp_path))
    wave = noise(SECOND)
    encoder.train()
    assert not hear(encoder, wave).states[0].equal(hear(encoder, wave).states[0])
    encoder.eval()
    assert hear(encoder, wave).states[0].equal(hear(encoder, wave).states[0])


def test_gradients_reach_the_encoder():
    encoder = Tiny(width=8, layers=2, heads=2, window_seconds=1.0)
    encoder(noise(2, SECOND), torch.tensor([SECOND, 900])).states[-1].square().sum().backward()
    for name, value in encoder.named_parameters():
        if value.requires_grad:
            assert value.grad is not None and value.grad.isfinite().all(), name


# weights


@pytest.mark.parametrize("kind", [WhisperForConditionalGeneration, WhisperModel, WhisperEncoder])
def test_whole_headless_and_bare_encoders_load(tmp_path, kind):
    model = saved(tmp_path, kind)
    own = dict(model.named_parameters())
    encoder = Whisper(checkpoint=str(tmp_path))
    assert encoder.out == FeatureSpec(width=24, layers=3, rate=50.0, heads=2)
    for name, value in encoder.encoder.named_parameters():
        match = [key for key in own if key.endswith("encoder." + name) or key == name]
        assert value.equal(own[match[0]])


def test_half_precision_weights_become_float32(tmp_path):
    saved(tmp_path, dtype=torch.float16)
    encoder = Whisper(checkpoint=str(tmp_path))
    assert {value.dtype for value in encoder.parameters()} == {torch.float32}


def test_the_front_end_follows_the_preprocessor(tmp_path):
    saved(tmp_path)
    told = {"feature_size": 64, "hop_length": 80, "n_fft": 200, "sampling_rate": 8000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    encoder = Whisper(checkpoint=str(tmp_path)).eval()
    assert encoder.mel == LogMelConfig(64, 200, 80, 8000) and encoder.sample_rate == 8000
    assert encoder.out.rate == 50.0
    assert hear(encoder, noise(8000)).lengths.tolist() == [50]


def test_front_end_and_encoder_must_agree(tmp_path):
    saved(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"feature_size": 80}')
    with pytest.raises(CheckpointError, match=r"80 mel bins, config\.json 64"):
        Whisper(checkpoint=str(tmp_path))


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(CheckpointError, match="'wav2vec2' model"):
        Whisper(checkpoint=str(tmp_path))


def test_weights_that_do_not_fit_their_configuration_are_named(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"encoder_layers": 2}))
    with pytest.raises(CheckpointError, match=r"unexpected: layers\.2\."):
        Whisper(checkpoint=str(tmp_path))


def test_a_dry_run_reads_no_weights(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        whisper, tiny = Whisper(checkpoint=str(tmp_path)), Tiny()
    assert whisper.out.width == 24
    assert all(value.is_meta for value in [*whisper.parameters(), *tiny.parameters()])


# tiny


def test_tiny_is_its_seeds(tiny):
    options = {"width": 16, "layers": 3, "heads": 2, "window_seconds": 1.0}
    torch.manual_seed(1)
    same, other = Tiny(**options), Tiny(**options, seed=1)
    assert same.encoder.conv1.weight.equal(tiny.encoder.conv1.weight)
    assert not other.encoder.conv1.weight.equal(tiny.encoder.conv1.weight)


def test_tiny_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Tiny(width=8, layers=1, heads=2)
    assert torch.get_rng_state().equal(before)


def test_tiny_listens(tiny):
    seconds = torch.arange(SECOND) / SECOND
    low, high = (hear(tiny, (2 * torch.pi * pitch * seconds).sin()) for pitch in (300, 3000))
    assert (low.states[-1] - high.states[-1]).abs().mean() > 0.05


@pytest.mark.parametrize(
    "options, told",
    [
        ({"width": 10, "heads": 4}, "multiple of heads"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"num_mel_bins": -1}, "num_mel_bins must be at least 1"),
        ({"window_seconds": 0.0}, "window_seconds must be at least 0.02"),
        ({"window_seconds": float("inf")}, "window_seconds must be"),
        ({"trailing_silence": -0.5}, "trailing_silence must be 0 or more"),
        ({"trailing_silence": float("nan")}, "trailing_silence must be 0 or more"),
    ],
)
def test_options_out_of_range_say_the_range(options, told):
    with pytest.raises(SpecError, match=told):
        Tiny(**options)
