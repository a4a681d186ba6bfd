"""An encoder that maps 20 ms of waveform at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffa.errors import SpecError
from diffa.types import Features, FeatureSpec

HOP = 320  # samples of 20 ms


class Part(nn.Module):
    """Frames of 20 ms of waveform, mapped to ``width`` and then through one layer."""

    def __init__(self, *, width: int = 32) -> None:
        super().__init__()
        if width < 1:
            raise SpecError(f"width must be at least 1, got {width}")
        self.sample_rate = 16000
        self.out = FeatureSpec(width=width, layers=1, rate=self.sample_rate / HOP, heads=1)
        self.embed = nn.Linear(HOP, width)
        self.layer = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Return the states of audio (B, S) whose rows hold ``lengths`` (B,) true samples."""
        within = torch.arange(audio.shape[1], device=audio.device) < lengths[:, None]
        audio = torch.where(within, audio, 0)  # what lies past a row's end is never read
        counts = -(-lengths // HOP)
        most = int(counts.max())
        whole = nn.functional.pad(audio, (0, most * HOP))[:, : most * HOP]
        frames = whole.reshape(len(audio), most, HOP)
        first = self.embed(frames.to(self.embed.weight.dtype))
        inside = (torch.arange(most, device=audio.device) < counts[:, None])[..., None]
        states = tuple(torch.where(inside, state, 0) for state in (first, self.layer(first)))
        return Features(states, counts, counts)
