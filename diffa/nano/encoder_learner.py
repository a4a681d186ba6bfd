"""The learner of a listening stage: an encoder and throw-away heads that name what is heard."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffa.data.collate import Batch
from diffa.encoders.mel import log_mel
from diffa.nano import encoder_heads as listening
from diffa.trainers.learners.answers import Parts

_SPARE = 0.2  # seconds of silence behind the longest clip of a cropped batch


class Hears(nn.Module):
    """Trains an encoder by the labels of composed speech (see ``diffa.nano.encoder_heads``).

    Args:
        encoder: what learns; its heads are dropped after the stage.
        speakers: everyone whom the speaker head can name.
        ctc: weight of CTC on the words.
        local: start the encoder's attention at small fixed offsets in time.
        whole: last share of the stage that sees whole windows; before it, clips stand alone at
            a random place of the window, which is several times cheaper.
        bands: share of the clips that lose a band of up to ``band`` mel bins.
    """

    def __init__(
        self,
        encoder: Any,
        speakers: list[str],
        *,
        ctc: float = 0.2,
        local: bool = False,
        whole: float = 1.0,
        bands: float = 0.0,
        band: int = 8,
    ) -> None:
        super().__init__()
        self.encoder, self.speakers, self.ctc = encoder, speakers, ctc
        self.whole, self.bands, self.band = whole, bands, band
        self.heads = listening.ListeningHeads(encoder.out.width, len(speakers))
        if local:
            listening.start_local(getattr(encoder, "encoder", encoder))

    def forward(self, batch: Batch) -> Parts:
        """Measure a batch; every row weighs the same."""
        assert batch.audio is not None and batch.audio_lengths is not None
        if self.training and batch.progress < 1 - self.whole:
            states, lengths = self._cropped(batch.audio, batch.audio_lengths)
        else:
            features = self.encoder(batch.audio, batch.audio_lengths)
            states, lengths = features.states, features.lengths
        heard = self._targets(batch, states[-1])
        logits = self.heads(states, lengths)
        losses = listening.listening_loss(logits, heard, lengths, self.ctc)
        total = torch.stack(list(losses.values())).sum()
        rows = total.new_tensor(float(len(lengths)))
        digits = heard.frames["digits"]
        right = (logits["digits"].argmax(-1) == digits) & (digits > 0)
        return Parts(total * rows, rows, right.sum(), (digits > 0).sum(), total.new_zeros(()))

    def _targets(self, batch: Batch, last: Tensor) -> listening.Heard:
        heard = listening.targets(list(batch.labels), last.shape[1], self.speakers)
        return heard._replace(
            frames={name: wanted.to(last.device) for name, wanted in heard.frames.items()},
            clips={name: wanted.to(last.device) for name, wanted in heard.clips.items()},
        )

    def _cropped(self, audio: Tensor, lengths: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run the encoder's layers over the clips alone, at a random place of its window."""
        mel, window = self.encoder.mel, self.encoder.window_frames
        hop = 2 * mel.hop_length  # samples of one frame
        frames = min(window, -(-int(lengths.max() + _SPARE * mel.sampling_rate) // hop))
        padded = F.pad(audio, (0, frames * hop - audio.shape[1]))
        mels = self._masked(log_mel(padded, mel))
        offset = int(torch.randint(window - frames + 1, ()))
        states = self.encoder.encode_log_mel(mels, position_offset=offset)
        return states, (-(-lengths // hop)).clamp(max=frames)

    def _masked(self, mels: Tensor) -> Tensor:
        """Put a band of some clips (M, bins, T) at the clip's mean (SpecAugment, 1904.08779)."""
        rows, bins, _ = mels.shape
        width = torch.randint(1, self.band + 1, (rows, 1))
        first = (torch.rand(rows, 1) * (bins - width)).long()
        place = torch.arange(bins)
        hit = (place >= first) & (place < first + width) & (torch.rand(rows, 1) < self.bands)
        return torch.where(hit[:, :, None].to(mels.device), mels.mean((1, 2), keepdim=True), mels)
