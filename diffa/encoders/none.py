"""The encoder of a text model: it refuses recordings."""

from __future__ import annotations

from torch import Tensor, nn

from diffa.errors import AudioError
from diffa.types import Features, FeatureSpec


class NoEncoder(nn.Module):
    """Stands in for the encoder of a spec without encoder and adapters."""

    sample_rate = 16_000
    out = FeatureSpec(width=1, layers=0, rate=1.0, heads=1)

    def forward(self, audio: Tensor, lengths: Tensor) -> Features:
        """Raise AudioError."""
        raise AudioError(
            "this model reads text alone: give its spec an encoder and adapters, or ask without a "
            "recording"
        )
