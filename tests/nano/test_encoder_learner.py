"""The trained encoder that ships: it loads, its window is short, and it tells digits apart."""

from __future__ import annotations

import torch

from diffa.audio import pad, prepare
from diffa.encoders.whisper import Whisper
from diffa.nano import demo


def test_the_trained_encoder_loads_from_the_package() -> None:
    encoder = Whisper(checkpoint="package:nano/whisper").eval()
    assert encoder.out == (192, 4, 50.0, 6)
    waves = [prepare(demo.recordings() / f"{n}.flac", 16_000) for n in ("digits", "melody")]
    with torch.no_grad():
        heard = encoder(*pad(waves))
        random = encoder(torch.zeros(1, 16_000), torch.tensor([16_000]))
    assert heard.extents.tolist() == [400, 400]  # 8 s at 50 Hz, not Whisper's 30 s
    assert heard.states[-1].isfinite().all()
    digits, melody = (heard.states[-1][row, : heard.lengths[row]].mean(0) for row in (0, 1))
    silence = random.states[-1][0].mean(0)
    for other in (melody, silence):
        assert torch.cosine_similarity(digits, other, dim=0) < 0.9
