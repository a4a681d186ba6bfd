"""DIFFA's acoustic adapter: a Q-Former over several layers of the encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from diffa.adapters.cross_attention import check_sizes
from diffa.adapters.layer_mixing import frame_mask
from diffa.checkpoints import read as ckpt
from diffa.errors import CheckpointError, SpecError
from diffa.types import Embeds, Features, FeatureSpec


class QFormer(nn.Module):
    """A Q-Former over several encoder layers, mixed by a softmax for every query (DIFFA, DeSTA2).

    Each of the encoder layers that are read has queries of its own; all share one transformer.

    Args:
        num_queries: Queries, the number of embeddings of every recording.
        num_layers: Layers of the adapter.
        encoder_layers: Encoder states to read, as indices, or how many evenly spaced layers.
            Default: 8 of an encoder with 32 layers or more, else 4.
        intermediate_size: Width of the feed-forward network.
        dropout: Dropout probability.
        checkpoint: Folder or Hub id of a DIFFA model (keys ``acoustic_connector.*``).
        revision: Revision of the Hub repository. Default: the newest.
    """

    def __init__(
        self,
        source: FeatureSpec,
        width: int,
        *,
        num_queries: int = 64,
        num_layers: int = 2,
        encoder_layers: list[int] | int | None = None,
        intermediate_size: int = 3072,
        dropout: float = 0.1,
        checkpoint: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            source,
            dropout,
            num_queries=num_queries,
            num_layers=num_layers,
            intermediate_size=intermediate_size,
        )
        self.encoder_layers = select_encoder_layers(source.layers, encoder_layers)
        inner = source.width
        self.layer_prompts = nn.ParameterList(
            torch.randn(1, num_queries, inner) for _ in self.encoder_layers
        )
        self.layer_weights = nn.Parameter(torch.zeros(num_queries, len(self.encoder_layers)))
        layers = (_Layer(source, intermediate_size, dropout) for _ in range(num_layers))
        self.qformer = nn.ModuleDict({"layer": nn.ModuleList(layers)})  # the published names
        self.proj = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width))
        if checkpoint is not None and not ckpt.is_meta():
            folder = ckpt.find_checkpoint(checkpoint, revision)
            state = ckpt.read_weights(folder, "acoustic_connector.")
            _check_num_layers(state, len(self.encoder_layers), source=str(folder))
            ckpt.load_state(self, state, source=folder)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return the number of queries for every row, whatever its frames (B,)."""
        return torch.full_like(lengths, self.layer_weights.shape[0])

    def forward(self, features: Features) -> Embeds:
        """Embed the selected states.

        A row's whole window is read, its padding included, as the published weights expect.
        """
        rows, longest = len(features.lengths), int(features.extents.max())
        states = [features.states[layer][:, :longest] for layer in self.encoder_layers]
        frames = torch.cat(states).to(self.layer_weights.dtype)  # (layers * B, T, D), one pass
        hidden = repeat(torch.cat(list(self.layer_prompts)), "n q d -> (n b) q d", b=rows)
        attn_mask = self._attn_mask(features.extents, longest)
        for layer in self.qformer["layer"].children():
            hidden = layer(hidden, frames, attn_mask)
        # (layers * B, Q, D) -> a mixture of the layers with weights of its own for every query
        mixture = self.layer_weights.softmax(dim=-1)
        by_layer = rearrange(hidden, "(n b) q d -> n b q d", b=rows)
        values = self.proj(einsum(by_layer, mixture, "n b q d, q n -> b q d"))
        return Embeds(values, self.out_lengths(features.lengths))

    def _attn_mask(self, extents: Tensor, longest: int) -> Tensor | None:
        """Return which frames (layers * B, 1, 1, T) each row may read; None: all."""
        if int(extents.min()) == longest:
            return None
        inside = frame_mask(extents, longest)
        return repeat(inside, "b t -> (n b) 1 1 t", n=len(self.encoder_layers))


def select_encoder_layers(layers: int, encoder_layers: list[int] | int | None) -> list[int]:
    """Return the entries of the tuple of states to read; raises SpecError out of range.

    A count n gives (i + 1) * layers // n - 1, which is DIFFA's table for every Whisper size.
    """
    if encoder_layers is None:
        encoder_layers = min(8 if layers >= 32 else 4, layers)
    if isinstance(encoder_layers, int):
        if not 1 <= encoder_layers <= layers:
            raise SpecError(
                f"encoder_layers must lie between 1 and the encoder's {layers} layers, "
                f"got {encoder_layers}"
            )
        return [(i + 1) * layers // encoder_layers - 1 for i in range(encoder_layers)]
    if not encoder_layers or any(not 0 <= layer <= layers for layer in encoder_layers):
        raise SpecError(
            f"encoder_layers must list entries of the encoder's states, 0 to {layers}, "
            f"got {encoder_layers}"
        )
    return list(encoder_layers)


class _Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the frames, a feed-forward network;
    each is followed by its residual's norm (BERT). Names follow the published keys."""

    def __init__(self, source: FeatureSpec, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.attention = _Attention(source, dropout)
        self.crossattention = _Attention(source, dropout)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(source.width, intermediate_size)})
        self.output = _Output(intermediate_size, source.width, dropout)

    def forward(self, hidden: Tensor, frames: Tensor, attn_mask: Tensor | None) -> Tensor:
        hidden = self.attention(hidden, hidden, None)
        hidden = self.crossattention(hidden, frames, attn_mask)
        out: Tensor = self.output(F.gelu(self.intermediate["dense"](hidden)), hidden)
        return out


class _Attention(nn.Module):
    def __init__(self, source: FeatureSpec, dropout: float) -> None:
        super().__init__()
        names = ("query", "key", "value")
        maps = {name: nn.Linear(source.width, source.width) for name in names}
        self.self = nn.ModuleDict(maps)
        self.output = _Output(source.width, source.width, dropout)
        self.heads, self.dropout = source.heads, dropout

    def forward(self, hidden: Tensor, frames: Tensor, attn_mask: Tensor | None) -> Tensor:
        split = "b t (h d) -> b h t d"
        query = rearrange(self.self["query"](hidden), split, h=self.heads)
        key = rearrange(self.self["key"](frames), split, h=self.heads)
        value = rearrange(self.self["value"](frames), split, h=self.heads)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=self.dropout if self.training else 0.0
        )
        out: Tensor = self.output(rearrange(mixed, "b h t d -> b t (h d)"), hidden)
        return out


class _Output(nn.Module):
    """A linear map, dropout, and the norm of its sum with the residual."""

    def __init__(self, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(hidden)) + residual)
        return out


def _check_num_layers(state: dict[str, Tensor], num_layers: int, *, source: str) -> None:
    num_prompts = sum(key.startswith("layer_prompts.") for key in state)
    if num_prompts and num_prompts != num_layers:
        raise CheckpointError(
            f"{source} was trained on {num_prompts} encoder layers, but this qformer reads "
            f"{num_layers}: "
            f"set encoder_layers to {num_prompts} and use the encoder it was trained with"
        )
