"""The learner of a listening stage: an encoder and throw-away heads that name what is heard."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffa.data.collate import Batch
from diffa.trainers.learner import Parts


class Hears(nn.Module):
    """Trains an encoder by the labels of composed speech (see ``diffa.trainers.listening``).

    Args:
        encoder: what learns; its heads are dropped after the stage.
        speakers: everyone whom the speaker head can name.
        ctc: weight of CTC on the words.
        local: start the encoder's heads at small fixed offsets in time.
    """

    def __init__(
        self, encoder: Any, speakers: list[str], *, ctc: float = 0.2, local: bool = False
    ) -> None:
        super().__init__()
        from diffa.trainers import listening

        self.encoder, self.speakers, self.ctc = encoder, speakers, ctc
        self.heads = listening.ListeningHeads(encoder.out.width, len(speakers))
        if local:
            listening.start_local(getattr(encoder, "encoder", encoder))

    def forward(self, batch: Batch) -> Parts:
        """Measure a batch; every row weighs the same."""
        from diffa.trainers import listening

        features = self.encoder(batch.audio, batch.lengths)
        states, lengths = features.states, features.lengths
        logits = self.heads(states, lengths)
        heard = listening.targets(list(batch.labels), states[-1].shape[1], self.speakers)
        device = states[-1].device
        heard = heard._replace(
            frames={name: wanted.to(device) for name, wanted in heard.frames.items()},
            clips={name: wanted.to(device) for name, wanted in heard.clips.items()},
        )
        losses = listening.listening_loss(logits, heard, lengths, self.ctc)
        rows = torch.tensor(float(len(lengths)), device=device)
        digits = heard.frames["digits"]
        spoken = digits > 0
        right = (logits["digits"].argmax(-1) == digits) & spoken
        total = torch.stack(list(losses.values())).sum()
        return Parts(total * rows, rows, right.sum(), spoken.sum())
