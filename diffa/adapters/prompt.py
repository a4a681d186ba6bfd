"""DIFFA's learned prefix of stage 1."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn

from diffa.checkpoints import read as ckpt
from diffa.errors import check_at_least
from diffa.types import Embeds, Features


class Prompt(nn.Module):
    """Learned embeddings, the same for every recording (DIFFA's soft prompt).

    Args:
        num_embeddings: Embeddings of the prompt.
        checkpoint: Folder or Hub id of a DIFFA model (key ``trainable_prompts.weight``).
        revision: Revision of the Hub repository. Default: the newest.
    """

    def __init__(
        self,
        width: int,
        *,
        num_embeddings: int = 20,
        checkpoint: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, num_embeddings=num_embeddings)
        self.prompts = nn.Embedding(num_embeddings, width)
        if checkpoint is not None and not ckpt.is_meta():
            folder = ckpt.find_checkpoint(checkpoint, revision)
            state = ckpt.read_weights(folder, "trainable_prompts.")
            ckpt.load_state(self.prompts, state, source=folder)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return ``num_embeddings`` for every row, whatever its frames (B,)."""
        return torch.full_like(lengths, self.prompts.num_embeddings)

    def forward(self, features: Features) -> Embeds:
        """Return the prompt once for every row; the features are not read."""
        rows = len(features.lengths)
        values = repeat(self.prompts.weight, "n w -> b n w", b=rows)
        return Embeds(values, self.out_lengths(features.lengths))
