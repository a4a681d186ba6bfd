"""Reading, mixing down, resampling, checking and padding recordings."""

import io
import logging
import sys
import types

import numpy as np
import pytest
import soundfile
import torch

from diffa import audio
from diffa.audio import decode, formats, resampling
from diffa.errors import AudioError


def tone(seconds=0.5, rate=16_000, pitch=440.0):
    return torch.sin(2 * torch.pi * pitch * torch.arange(int(seconds * rate)) / rate) * 0.5


def write(path, wave, rate=16_000, **options):
    soundfile.write(path, np.asarray(wave), rate, **options)
    return path


# read


@pytest.mark.parametrize("suffix, tolerance", [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.1)])
def test_every_common_format_is_read(tmp_path, suffix, tolerance):
    wave, rate = audio.read(write(tmp_path / f"a.{suffix}", tone()))
    assert rate == 16_000 and wave.dtype == torch.float32 and wave.shape == (8000,)
    assert (wave - tone()).abs().max() < tolerance


def test_mp3_is_read(tmp_path):
    wave, rate = audio.read(write(tmp_path / "a.mp3", tone(2.0)))
    assert rate == 16_000 and abs(len(wave) - 32_000) < 4000
    assert 0.2 < wave.square().mean().sqrt() < 0.5


def test_channels_are_averaged(tmp_path):
    stereo = torch.stack([tone(), -tone() / 2], dim=1)
    wave, _ = audio.read(write(tmp_path / "a.wav", stereo))
    assert torch.allclose(wave, tone() / 4, atol=1e-4)


def test_what_cannot_be_read_says_why(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is no recording, however long it goes on")
    write(tmp_path / "none.wav", np.zeros(0))
    cases = [
        (tmp_path / "absent.wav", "there is no file"),
        (tmp_path, "is a folder"),
        (tmp_path / "empty.wav", "is an empty file"),
        (tmp_path / "none.wav", "holds no samples"),
    ]
    for path, told in cases:
        with pytest.raises(AudioError, match=told) as caught:
            audio.read(path)
        assert str(path) in str(caught.value)


def test_what_is_not_audio_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as if PyAV were not installed
    (tmp_path / "a.wav").write_text("this is no recording")
    with pytest.raises(AudioError, match=r"pip install 'diffa-audio\[audio\]'"):
        audio.read(tmp_path / "a.wav")


def test_bytes_and_file_objects_decode_as_the_file_does(tmp_path):
    path = write(tmp_path / "a.flac", tone())
    expected, rate = audio.read(path)
    for source in (path.read_bytes(), io.BytesIO(path.read_bytes()), str(path)):
        waveform, found = audio.read(source)
        assert found == rate and waveform.equal(expected)


def test_a_recording_of_several_pieces_is_decoded_whole(tmp_path):
    wave = torch.rand(decode._PIECE * 2 + 7) - 0.5
    waveform, _ = audio.read(write(tmp_path / "a.wav", wave, subtype="FLOAT"))
    assert waveform.equal(wave)


@pytest.mark.parametrize("trusted", [True, False])
def test_the_bound_on_length_is_inclusive(tmp_path, trusted):
    path = write(tmp_path / "a.wav", tone(0.5))
    waveform, _ = audio.read(path, max_seconds=0.5, trusted=trusted)
    assert len(waveform) == 8000
    with pytest.raises(audio.AudioTooLongError, match=r"a\.wav is longer than 0\.4 s"):
        audio.read(path, max_seconds=0.4, trusted=trusted)


@pytest.mark.parametrize("suffix", audio.FORMATS)
def test_untrusted_recordings_may_have_the_listed_formats(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", tone())
    assert audio.read(path.read_bytes(), trusted=False)[0].equal(audio.read(path)[0])


def test_untrusted_recordings_of_other_formats_are_refused(tmp_path):
    path = write(tmp_path / "a.aiff", tone())
    assert len(audio.read(path)[0]) == 8000
    for source in (path, path.read_bytes(), b"", b"x"):
        with pytest.raises(AudioError, match="is not a wav, mp3, flac or ogg file"):
            audio.read(source, trusted=False)


def test_untrusted_recordings_have_few_channels_and_an_ordinary_rate(tmp_path):
    wide = write(tmp_path / "wide.wav", np.zeros((100, audio.MAX_CHANNELS + 1)))
    slow = write(tmp_path / "slow.wav", tone(), 500)
    for path, message in ((wide, "9 channels"), (slow, "500 samples per second")):
        audio.read(path)
        with pytest.raises(AudioError, match=message):
            audio.read(path, trusted=False)


def test_damaged_untrusted_recordings_never_reach_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_decode_pyav", lambda *_: pytest.fail("FFmpeg was asked"))
    with pytest.raises(AudioError, match="cannot be decoded"):
        audio.read(b"RIFF" + b"x" * 100, trusted=False)


class FakeFrame:
    """A frame of PyAV: planar formats give (channels, S), packed ones (1, channels * S)."""

    def __init__(self, samples, planar):
        self.format = types.SimpleNamespace(is_planar=planar)
        self.layout = types.SimpleNamespace(channels=[0, 1])
        self.samples = samples

    def to_ndarray(self):
        return self.samples


@pytest.mark.parametrize(
    "samples, planar",
    [
        (np.array([[0.5, -0.5], [0.0, 0.0]], dtype=np.float32), True),
        (np.array([[0.5, 0.0, -0.5, 0.0]], dtype=np.float32), False),
        (np.array([[16384, 0, -16384, 0]], dtype=np.int16), False),
        (np.array([[192, 128, 64, 128]], dtype=np.uint8), False),
    ],
)
def test_pyav_frames_become_floats_whatever_their_format(samples, planar):
    frame = decode._planar(FakeFrame(samples, planar))
    assert frame.equal(torch.tensor([[0.5, -0.5], [0.0, 0.0]]))


# resample


def test_resampling_keeps_the_tone():
    wave = audio.resample(tone(1.0, 44_100), 44_100, 16_000)
    inner = slice(1000, 15_000)
    assert wave.shape == (16_000,)
    assert torch.allclose(wave[inner], tone(1.0)[inner], atol=1e-2)


def test_resampling_to_the_same_rate_is_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    wave = tone()
    assert audio.resample(wave, 16_000, 16_000) is wave


@pytest.mark.parametrize("rates", [(0, 16_000), (16_000, -1)])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(AudioError, match="at least 1"):
        audio.resample(tone(), *rates)


def test_a_broken_torchaudio_is_told_apart(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "torchaudio.functional", Broken("torchaudio.functional"))
    with pytest.raises(AudioError, match=r"torchaudio does not import.*libcudart.*16000 Hz"):
        audio.resample(tone(), 44_100, 16_000)


# prepare


def test_a_path_is_read_at_the_rate_asked_for(tmp_path):
    path = write(tmp_path / "a.wav", tone(0.5, 8000), 8000)
    for given in (path, str(path)):
        wave = audio.prepare(given, 16_000)
        assert wave.shape == (8000,) and wave.dtype == torch.float32


def test_a_waveform_is_taken_as_it_is():
    wave = tone()
    assert audio.prepare(wave, 16_000).equal(wave)
    assert audio.prepare(wave.double(), 16_000).dtype == torch.float32
    backwards = wave.numpy()[::-1]
    assert audio.prepare(backwards, 16_000).equal(wave.flip(0))


@pytest.mark.parametrize(
    "wave, told",
    [
        (torch.zeros(0), "is empty"),
        (torch.zeros(2, 100), r"shape \(2, 100\).*mean"),
        (torch.tensor(0.5), r"shape \(\)"),
        (torch.tensor([0.0, float("nan")]), "1 samples that are NaN or infinite, the first at 1"),
        (torch.tensor([float("inf"), 0.0]), "the first at 0"),
        (torch.zeros(10, dtype=torch.int16), r"int16.*audio.float\(\) / 32768"),
        (np.zeros(10, dtype=np.int32), r"int32.*/ 2147483648"),
        (torch.zeros(10, dtype=torch.bool), "is bool, but floats"),
        (np.zeros(10, dtype=complex), "floats between -1 and 1"),
        (np.array(["a"]), "cannot be read as numbers"),
        ([0.1, 0.2], "must be a path or a waveform.*not list"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_waveform_says_what_to_do(wave, told):
    with pytest.raises(AudioError, match=told):
        audio.prepare(wave, 16_000)


def test_a_file_that_is_not_finite_is_refused(tmp_path):
    wave = tone()
    wave[100] = float("nan")
    path = write(tmp_path / "a.wav", wave, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav holds 1 samples .* first at 100"):
        audio.prepare(path, 16_000)


# read_dataset_audio


def test_relative_paths_of_a_data_set_start_in_its_folder(tmp_path):
    write(tmp_path / "a.wav", tone())
    for value in ("a.wav", {"path": "a.wav"}, {"bytes": None, "path": str(tmp_path / "a.wav")}):
        assert audio.read_dataset_audio(value, tmp_path)[0].shape == (8000,)


def test_bytes_of_a_data_set_come_before_its_path(tmp_path):
    stored = write(tmp_path / "a.wav", tone()).read_bytes()
    for value in (stored, {"bytes": stored, "path": "absent.wav"}):
        assert audio.read_dataset_audio(value)[0].shape == (8000,)


@pytest.mark.parametrize("shape", [(2, 100), (100, 2)])
def test_samples_of_a_data_set_are_averaged_over_the_shorter_dimension(shape):
    waveform, rate = audio.read_dataset_audio({"array": np.ones(shape), "sampling_rate": 8000})
    assert rate == 8000 and waveform.equal(torch.ones(100))


@pytest.mark.parametrize(
    "value", [None, 5, "", ["a.wav"], {}, {"array": [0.5]}, {"array": "x", "sampling_rate": 8000}]
)
def test_other_forms_of_a_recording_are_refused(value):
    with pytest.raises(AudioError, match="recording"):
        audio.read_dataset_audio(value)


# pad


def test_padding_keeps_every_waveform_and_its_length():
    waves = [tone(0.1), tone(0.3), tone(0.2)]
    batch, lengths = audio.pad(waves)
    assert lengths.tolist() == [1600, 4800, 3200] and batch.shape == (3, 4800)
    for row, wave in zip(batch, waves, strict=True):
        assert row[: len(wave)].equal(wave) and row[len(wave) :].eq(0).all()


def test_nothing_cannot_be_padded():
    with pytest.raises(AudioError, match="no waveforms"):
        audio.pad([])


# files that lie, that are damaged, or that were joined


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_all_links_of_a_chained_stream_are_read(tmp_path, suffix):
    one = write(tmp_path / f"one.{suffix}", tone(1.0))
    data = one.read_bytes()
    (tmp_path / f"two.{suffix}").write_bytes(data + data)
    (tmp_path / f"three.{suffix}").write_bytes(data * 3)
    single, _ = audio.read(one)
    for name, count in (("two", 2), ("three", 3)):
        wave, rate = audio.read(tmp_path / f"{name}.{suffix}")
        assert rate == 16_000 and len(wave) == count * len(single)
        assert torch.equal(wave[-len(single) :], single)


def test_a_link_of_another_rate_is_resampled(tmp_path):
    parts = [
        write(tmp_path / "a.flac", tone(1.0)),
        write(tmp_path / "b.flac", tone(1.0, 8000), 8000),
    ]
    wave, rate = audio.read(b"".join(part.read_bytes() for part in parts))
    assert (len(wave), rate) == (32_000, 16_000)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF - 44, 0x7FFFFFFF - 36])
def test_a_wav_header_that_was_never_finished_is_read_to_the_end(tmp_path, size, caplog):
    data = bytearray(write(tmp_path / "a.wav", tone()).read_bytes())
    data[4:8] = data[40:44] = size.to_bytes(4, "little")
    wave, _ = audio.read(bytes(data))
    assert torch.allclose(wave, tone(), atol=1e-4) and not caplog.records


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_of_a_cut_file_the_rest_is_used_with_a_warning(tmp_path, suffix, caplog):
    data = write(tmp_path / f"a.{suffix}", torch.rand(48_000) - 0.5).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: len(data) // 2])
    with caplog.at_level(logging.WARNING):
        wave, rate = audio.read(path)
    assert 0.5 < len(wave) / rate < 2.5
    assert str(path) in caplog.text and "is damaged" in caplog.text
    with pytest.raises(AudioError, match=f"{path} is damaged"):
        audio.read(path, strict=True)


@pytest.mark.parametrize("seconds", [0.01, 1.0, 3.0, 4.096, 10.0, 61.3])
@pytest.mark.parametrize("trusted", [True, False])
def test_flac_of_unknown_length_is_read(tmp_path, caplog, seconds, trusted):
    noise = torch.rand(int(16_000 * seconds)) - 0.5
    path = write(tmp_path / "a.flac", noise)
    whole, _ = audio.read(path)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # total samples: 36 bits of STREAMINFO
    data[22:26] = b"\0" * 4
    wave, _ = audio.read(bytes(data), trusted=trusted, strict=True)
    assert torch.equal(wave, whole) and not caplog.records


def test_a_damaged_place_costs_what_is_there_and_not_the_rest(tmp_path, caplog):
    path = write(tmp_path / "a.flac", torch.rand(160_000) - 0.5)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    wave, _ = audio.read(bytes(data), trusted=False)
    assert len(wave) > 70_000 and "is damaged" in caplog.text
    pytest.importorskip("av")
    assert len(audio.read(bytes(data))[0]) > 140_000


def encode(path, wave, codec="aac"):
    """Write a file with PyAV."""
    av = pytest.importorskip("av")
    with path.open("wb") as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave.numpy()[None], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return path


def test_m4a_is_read_by_pyav_whatever_its_name(tmp_path):
    for name in ("a.m4a", "http:a.m4a", "concat:b.m4a"):
        wave, rate = audio.read(encode(tmp_path / name, tone(2.0)))
        assert rate == 16_000 and abs(len(wave) - 32_000) < 3000
        assert audio.probe(tmp_path / name).seconds == pytest.approx(2.0, abs=0.1)


def test_of_a_damaged_m4a_the_rest_is_used(tmp_path, caplog):
    path = encode(tmp_path / "a.m4a", torch.rand(64_000) - 0.5)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4000
    data[start : start + 300] = b"\xff" * 300
    wave, _ = audio.read(bytes(data))
    assert 16_000 < len(wave) < 70_000


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path):
    data = bytearray(write(tmp_path / "a.flac", tone()).read_bytes())
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    with pytest.raises(
        audio.AudioTooLongError, match=r"68,719,476,735 frames.*at most 100,000,000"
    ):
        audio.read(bytes(data))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_the_bound_is_on_frames(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", tone(1.0))
    assert len(audio.read(path, max_frames=16_000)[0]) == 16_000
    with pytest.raises(audio.AudioTooLongError, match=r"at most 15,999 \(1 s at 16000 Hz\)"):
        audio.read(path, max_frames=15_999)


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (1, -1, 1, -1), (1, 1, -1, -1, 0)])
def test_channels_that_cancel_are_not_mixed(tmp_path, caplog, signs):
    channels = torch.stack([sign * tone() / 2 for sign in signs], dim=1)
    wave, _ = audio.read(write(tmp_path / "a.wav", channels))
    assert torch.allclose(wave.abs(), (tone() / 2).abs(), atol=1e-4)
    assert caplog.text.count("cancel each other") == 1
    wave, _ = audio.read_dataset_audio({"array": channels.T, "sampling_rate": 16_000})
    assert torch.allclose(wave.abs(), (tone() / 2).abs(), atol=1e-4)


def test_channels_that_cancel_in_one_half_are_heard_in_both(tmp_path):
    right = torch.cat([-tone(1.0), tone(1.0)])
    stereo = torch.stack([torch.cat([tone(1.0), tone(1.0)]), right], dim=1)
    wave, _ = audio.read(write(tmp_path / "a.wav", stereo))
    energies = wave.view(2, -1).square().mean(1)
    assert 0.7 < float(energies[0] / energies[1]) < 1.3


def test_the_bound_holds_for_what_resampling_makes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", torch.rand(1000), 8)
    monkeypatch.setenv("DIFFA_MAX_FRAMES", "100000")
    with pytest.raises(audio.AudioTooLongError, match="too long at 16000 Hz"):
        audio.prepare(path, 16_000)


def test_names_with_a_colon_are_files(tmp_path):
    path = write(tmp_path / "http:a.wav", tone())
    assert len(audio.read(path)[0]) == 8000
    (tmp_path / "concat:b.aac").write_bytes(b"no audio at all")
    with pytest.raises(AudioError, match=r"concat:b\.aac"):
        audio.read(tmp_path / "concat:b.aac")


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-this-name/a.wav"])
def test_names_that_the_system_refuses_are_an_error(name):
    with pytest.raises(AudioError, match=r"cannot be opened|there is no file"):
        audio.read(name)


def test_samples_of_an_extreme_size_are_refused(tmp_path):
    path = write(tmp_path / "a.wav", tone() * 1e18, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"samples of size 5\.0e"):
        audio.read(path)


@pytest.mark.parametrize(
    "data", [b"RIFF", b"OggS", b"fLaC", b"ID3", b"\xff\xfb", b"RIFF\0\0\0\0WAVE"]
)
@pytest.mark.parametrize("length", [0, 20, 3000])
def test_a_header_without_audio_is_told(data, length):
    with pytest.raises(AudioError):
        audio.read(data + b"\xab" * length)


# odd rates


@pytest.mark.parametrize("rate", [44_099, 47_999, 22_254, 8001, 16_001, 383_999])
def test_odd_rates_are_resampled_by_the_same_formula(rate):
    time = torch.arange(rate // 4) / rate
    wave = torch.sin(2 * torch.pi * 440 * time)
    out = audio.resample(wave, rate, 16_000)
    assert abs(len(out) - 4000) <= 1
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(len(out)) / 16_000)
    assert (out - expected)[50:-50].abs().max() < 2e-3


@pytest.mark.parametrize(
    "pair", [(8000, 16_000), (44_100, 16_000), (48_000, 16_000), (16_000, 8000)]
)
def test_sample_by_sample_agrees_with_torchaudio(pair):
    wave = torch.randn(2, 5000)
    expected = audio.resample(wave, *pair)
    found = resampling._resample_by_sample(wave, *pair)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)


def test_a_header_is_probed_without_decoding(tmp_path):
    path = write(tmp_path / "a.wav", tone(2.0))
    assert audio.probe(path) == audio.Header(2.0, "")
    data = path.read_bytes()
    path.write_bytes(data[:20_000])
    assert "is cut" in audio.probe(path).fault
    path.write_text("no audio")
    assert "no audio" in audio.probe(path).fault or "not readable" in audio.probe(path).fault


def test_find_links_of_other_data_is_one_link():
    assert (
        formats.find_links(b"RIFF") == formats.find_links(b"") == formats.find_links(b"xyz") == [0]
    )


@pytest.mark.parametrize(
    "pair", [(8000, 16_000), (44_100, 16_000), (48_000, 16_000), (22_050, 16_000)]
)
@pytest.mark.parametrize("size", [10_000, 44_101, 50_003])
def test_long_waveforms_are_resampled_by_pieces_to_the_same_samples(monkeypatch, pair, size):
    wave = torch.randn(size)
    whole = audio.resample(wave, *pair)
    monkeypatch.setattr(resampling, "_LONG", 9000)
    pieces = audio.resample(wave, *pair)
    assert pieces.shape == whole.shape and torch.allclose(pieces, whole, atol=1e-6)


def test_the_environment_sets_the_bound_of_every_command(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", tone(1.0))
    monkeypatch.setenv("DIFFA_MAX_FRAMES", "8000")
    with pytest.raises(audio.AudioTooLongError, match="at most 8,000"):
        audio.prepare(path, 16_000)
    monkeypatch.setenv("DIFFA_MAX_FRAMES", "many")
    with pytest.raises(AudioError, match="DIFFA_MAX_FRAMES must be a number"):
        audio.prepare(path, 16_000)
