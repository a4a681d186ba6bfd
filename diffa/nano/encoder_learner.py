"""The learner ``nano-encoder``: pre-train an encoder with heads that are dropped afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffa.data.collate import Batch, Collate
from diffa.data.rows import EncoderTransform
from diffa.data.samples import Source, SpeakerSource
from diffa.encoders.mel import log_mel
from diffa.encoders.whisper_windows import WindowedWhisper
from diffa.nano import encoder_heads
from diffa.nano.encoder_heads import EncoderHeads, Targets, encoder_loss, targets
from diffa.spec.schema import Report
from diffa.spec.spec import Spec
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.config_sections import StageConfig
from diffa.trainers.learners.answers import audio_reader
from diffa.trainers.learners.base import BatchLoss, Learner, RowTransform, StageCost

if TYPE_CHECKING:
    from diffa.model import Model

_SILENCE = 0.2  # seconds behind the longest clip of a cropped batch


class EncoderLearner(Learner):
    """Train an encoder by the labels of composed speech (``diffa.nano.encoder_heads``).

    Args:
        ctc_weight: Weight of CTC on the words.
        init_local: Initialise the attention to small fixed offsets in time.
        full_window_share: Last share of the stage trained on whole windows. Before it, clips stand
            alone at a random position of the window, which is several times cheaper.
        band_mask_share: Share of the clips that lose a band of mel bins.
        band_mask_bins: Largest number of mel bins in such a band.
    """

    generates: ClassVar[bool] = False
    find_unused_parameters: ClassVar[bool] = True  # a batch without melodies leaves a head out

    def __init__(
        self,
        model: Model,
        stage: StageConfig,
        sources: Sequence[Source],
        *,
        ctc_weight: float = 0.2,
        init_local: bool = False,
        full_window_share: float = 1.0,
        band_mask_share: float = 0.0,
        band_mask_bins: int = 8,
    ) -> None:
        super().__init__()
        self.encoder: Any = model.encoder
        self._model, self._stage = (model,), stage  # in a tuple: only the encoder is trained
        names = [n for one in sources if isinstance(one, SpeakerSource) for n in one.speakers]
        self.speakers = list(dict.fromkeys(names))
        self.ctc_weight, self.full_window_share = ctc_weight, full_window_share
        self.band_mask_share, self.band_mask_bins = band_mask_share, band_mask_bins
        if (init_local or full_window_share < 1) and not isinstance(self.encoder, WindowedWhisper):
            name = type(self.encoder).__name__
            raise TrainingError(
                f"stage {stage.name!r}: init_local and full_window_share need an encoder of "
                f"Whisper's architecture, not {name}"
            )
        self.heads = EncoderHeads(self.encoder.out.width, len(self.speakers))
        if init_local:
            encoder_heads.init_local(self.encoder.encoder)

    def row_transform(self, *, training: bool) -> RowTransform:
        """Return what makes rows of audio and labels."""
        return EncoderTransform(audio_reader(self._model[0], self._stage, training=training))

    def collator(self) -> Collate:
        """Return what pads the audio."""
        return Collate(self._model[0].backbone.vocab)

    def forward(self, batch: Batch) -> BatchLoss:
        """Measure a batch; every row has the same weight."""
        assert batch.audio is not None and batch.audio_lengths is not None
        if self.training and batch.progress < 1 - self.full_window_share:
            states, lengths = self._encode_cropped(batch.audio, batch.audio_lengths)
        else:
            features = self.encoder(batch.audio, batch.audio_lengths)
            states, lengths = features.states, features.lengths
        labels = self._targets(batch, states[-1])
        logits = self.heads(states, lengths)
        losses = encoder_loss(logits, labels, lengths, self.ctc_weight)
        total = torch.stack(list(losses.values())).sum()
        rows = total.new_tensor(float(len(lengths)))
        digits = labels.frames["digits"]
        correct = (logits["digits"].argmax(-1) == digits) & (digits > 0)
        zero = total.new_zeros(())
        return BatchLoss(total * rows, rows, correct.sum(), (digits > 0).sum(), zero)

    def _targets(self, batch: Batch, last: Tensor) -> Targets:
        labels = targets(list(batch.labels), last.shape[1], self.speakers)
        return labels._replace(
            frames={name: value.to(last.device) for name, value in labels.frames.items()},
            clips={name: value.to(last.device) for name, value in labels.clips.items()},
        )

    def _encode_cropped(self, audio: Tensor, lengths: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Encode the clips without the rest of the window, at a random position of it."""
        mel, window = self.encoder.mel, self.encoder.window_frames
        hop = 2 * mel.hop_length  # samples of one frame: the second convolution has stride 2
        frames = min(window, -(-int(lengths.max() + _SILENCE * mel.sampling_rate) // hop))
        padded = F.pad(audio, (0, frames * hop - audio.shape[1]))
        mels = self._mask_bands(log_mel(padded, mel))
        offset = int(torch.randint(window - frames + 1, ()))
        states = self.encoder.encode_log_mel(mels, position_offset=offset)
        return states, (-(-lengths // hop)).clamp(max=frames)

    def _mask_bands(self, mels: Tensor) -> Tensor:
        """Put a band of some clips (M, bins, T) at the clip's mean (SpecAugment, 1904.08779)."""
        rows, bins, _ = mels.shape
        width = torch.randint(1, self.band_mask_bins + 1, (rows, 1))
        first = (torch.rand(rows, 1) * (bins - width)).long()
        index = torch.arange(bins)
        masked = (index >= first) & (index < first + width)
        masked = masked & (torch.rand(rows, 1) < self.band_mask_share)
        mean = mels.mean((1, 2), keepdim=True)
        return torch.where(masked[:, :, None].to(mels.device), mean, mels)

    @classmethod
    def check(
        cls, stage: StageConfig, path: str, spec: Spec, objective: type[Any], report: Report
    ) -> None:
        """Report a stage that trains anything else."""
        if stage.train != ["encoder"]:
            report(f"{path}.train", "the learner nano-encoder trains [encoder]")

    @classmethod
    def cost(cls, stage: StageConfig, model: Model) -> StageCost:
        """Return the cost of a clip: the backbone does not run."""
        return StageCost(runs_backbone=False)
