"""The published weights hear what the reference code hears: features, states, embeddings."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diffa.adapters.conv import Conv
from diffa.adapters.prompt import Prompt
from diffa.adapters.qformer import QFormer
from diffa.encoders.mel import log_mel
from diffa.encoders.whisper import Whisper

GOLDEN = Path(__file__).parent
CLIPS = ["clip0", "clip1"]
WIDTH = 48


class Reference:
    """One golden folder: expected values, and the parts loaded from its weights."""

    def __init__(self, folder: Path) -> None:
        self.expected = load_file(folder / "expected.safetensors")
        self.encoder = Whisper(checkpoint=str(folder / "whisper")).eval()
        source, weights = self.encoder.out, str(folder / "diffa")
        self.semantic = Conv(source, WIDTH, checkpoint=weights).eval()
        self.acoustic = QFormer(source, WIDTH, checkpoint=weights).eval()
        self.prompt = Prompt(WIDTH, checkpoint=weights).eval()
        self.heard = {clip: self.hear([clip]) for clip in CLIPS}

    def waveform(self, clip):
        return self.expected[f"{clip}.waveform"].float() / 32768

    @torch.no_grad()
    def hear(self, clips):
        waves = [self.waveform(clip) for clip in clips]
        most = max(map(len, waves))
        # what lies in the padding must not matter
        audio = torch.stack([F.pad(wave, (0, most - len(wave)), value=0.7) for wave in waves])
        features = self.encoder(audio, torch.tensor([len(wave) for wave in waves]))
        return features, self.acoustic(features), self.semantic(features), self.prompt(features)


@pytest.fixture(scope="module", params=["diffa1-tiny", "diffa2-tiny"])
def reference(request):
    return Reference(GOLDEN / request.param)


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= tolerance


@pytest.mark.parametrize("clip", CLIPS)
def test_log_mel_features_are_the_references(reference, clip):
    wave = reference.waveform(clip)
    window = F.pad(wave, (0, 480_000 - len(wave)))[None]
    features = log_mel(window, reference.encoder.mel)
    close(features[..., ::50], reference.expected[f"{clip}.features.every50"], 1e-4)


@pytest.mark.parametrize("clip", CLIPS)
def test_true_lengths_are_the_references(reference, clip):
    features = reference.heard[clip][0]
    assert features.lengths.tolist() == reference.expected[f"{clip}.encoder.length"].tolist()
    assert features.extents.tolist() == [1500]


@pytest.mark.parametrize("clip", CLIPS)
def test_encoder_states_are_the_references(reference, clip):
    features = reference.heard[clip][0]
    last = features.states[-1][:, : int(features.lengths)]
    close(last[:, ::25], reference.expected[f"{clip}.encoder.last.every25"], 1e-3)
    start, end = f"{clip}.encoder.hidden", ".every100"
    entries = [key for key in reference.expected if key.startswith(start)]
    assert len(entries) == len(reference.acoustic.encoder_layers)
    for key in entries:
        entry = int(key.removeprefix(start).removesuffix(end))
        assert entry in reference.acoustic.encoder_layers
        close(features.states[entry][:, ::100], reference.expected[key], 1e-3)


@pytest.mark.parametrize("clip", CLIPS)
def test_embeddings_are_the_references(reference, clip):
    _, acoustic, semantic, prompt = reference.heard[clip]
    for first, name in ((acoustic, "acoustic_semantic"), (prompt, "prompt_semantic")):
        values = torch.cat([first.values, semantic.values], dim=1)
        close(values, reference.expected[f"{clip}.embeds.{name}"], 1e-5)


def test_clips_in_one_batch_embed_as_they_do_alone(reference):
    _, acoustic, semantic, _ = reference.hear(CLIPS)
    for row, clip in enumerate(CLIPS):
        _, acoustic_alone, semantic_alone, _ = reference.heard[clip]
        close(acoustic.values[row], acoustic_alone.values[0], 1e-5)
        length = int(semantic_alone.lengths)
        assert int(semantic.lengths[row]) == length
        close(semantic.values[row, :length], semantic_alone.values[0], 1e-5)
        assert semantic.values[row, length:].eq(0).all()
