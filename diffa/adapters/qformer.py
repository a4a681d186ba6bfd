"""DIFFA's acoustic adapter: queries that read several layers of the encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from diffa.checkpoints import read as ckpt
from diffa.errors import CheckpointError, SpecError
from diffa.types import Embeds, Features, FeatureSpec


class QFormer(nn.Module):
    """A Q-Former over several encoder layers, mixed by a softmax for every query (DIFFA, DeSTA2).

    Each tapped layer has queries of its own and all share one transformer. ``encoder_layers`` lists
    entries of the encoder's states, or counts layers evenly spread; None means 8 of 32 layers
    or more, else 4. ``checkpoint`` is a DIFFA folder or Hub id (``acoustic_connector.*``).
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
        _check(
            source,
            num_queries=num_queries,
            num_layers=num_layers,
            intermediate_size=intermediate_size,
            dropout=dropout,
        )
        self.taps = tapped(source.layers, encoder_layers)
        inner = source.width
        self.layer_prompts = nn.ParameterList(torch.randn(1, num_queries, inner) for _ in self.taps)
        self.layer_weights = nn.Parameter(torch.zeros(num_queries, len(self.taps)))
        self.qformer = nn.ModuleDict(
            {
                "layer": nn.ModuleList(
                    _Layer(source, intermediate_size, dropout) for _ in range(num_layers)
                )
            }
        )
        self.proj = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width))
        if checkpoint is not None and not ckpt.is_meta():
            folder = ckpt.find_checkpoint(checkpoint, revision)
            state = ckpt.read_weights(folder, "acoustic_connector.")
            _check_taps(state, len(self.taps), source=str(folder))
            ckpt.load_state(self, state, source=folder)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Return the number of queries for every row, whatever its frames (B,)."""
        return torch.full_like(lengths, self.layer_weights.shape[0])

    def forward(self, features: Features) -> Embeds:
        """Embed the tapped states; a row's whole window is read, as the published weights expect
        (its padding included), and nothing past it."""
        rows, most = len(features.lengths), int(features.extents.max())
        tapped = [features.states[tap][:, :most] for tap in self.taps]
        frames = torch.cat(tapped).to(self.layer_weights.dtype)  # (taps * B, T, D), one pass
        hidden = repeat(torch.cat(list(self.layer_prompts)), "n q d -> (n b) q d", b=rows)
        attn_mask = self._attn_mask(features.extents, most)
        for layer in self.qformer["layer"].children():
            hidden = layer(hidden, frames, attn_mask)
        mixture = self.layer_weights.softmax(dim=-1)
        by_tap = rearrange(hidden, "(n b) q d -> n b q d", b=rows)
        values = self.proj(einsum(by_tap, mixture, "n b q d, q n -> b q d"))
        return Embeds(values, self.out_lengths(features.lengths))

    def _attn_mask(self, extents: Tensor, most: int) -> Tensor | None:
        """Return which frames (taps * B, 1, 1, T) each row may read; None where all may be."""
        if int(extents.min()) == most:
            return None
        inside = torch.arange(most, device=extents.device) < extents[:, None]
        return repeat(inside, "b t -> (n b) 1 1 t", n=len(self.taps))


def tapped(layers: int, encoder_layers: list[int] | int | None) -> list[int]:
    """Return the entries of the tuple of states to read; raises SpecError out of range.

    A count n gives (i + 1) * layers // n - 1, which is DIFFA's table for every Whisper size.
    """
    if encoder_layers is None:
        encoder_layers = min(8 if layers >= 32 else 4, layers)
    if isinstance(encoder_layers, int):
        if not 1 <= encoder_layers <= layers:
            raise SpecError(
                f"encoder_layers must lie between 1 and the encoder's {layers} layers, got {encoder_layers}"
            )
        return [(i + 1) * layers // encoder_layers - 1 for i in range(encoder_layers)]
    if not encoder_layers or any(not 0 <= tap <= layers for tap in encoder_layers):
        raise SpecError(
            f"encoder_layers must list entries of the encoder's states, 0 to {layers}, got {encoder_layers}"
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


def _check(
    source: FeatureSpec,
    *,
    num_queries: int,
    num_layers: int,
    intermediate_size: int,
    dropout: float,
) -> None:
    for name, value in (
        ("num_queries", num_queries),
        ("num_layers", num_layers),
        ("intermediate_size", intermediate_size),
    ):
        if value < 1:
            raise SpecError(f"{name} must be at least 1, got {value}")
    if not 0 <= dropout < 1:
        raise SpecError(f"dropout must lie between 0 and 1 (1 excluded), got {dropout}")
    if source.width % source.heads:
        raise SpecError(
            f"qformer needs an encoder whose width is a multiple of its heads, "
            f"got {source.width} and {source.heads}"
        )


def _check_taps(state: dict[str, Tensor], taps: int, *, source: str) -> None:
    found = sum(key.startswith("layer_prompts.") for key in state)
    if found and found != taps:
        raise CheckpointError(
            f"{source} was trained on {found} tapped layers, but this qformer reads {taps}: "
            f"set encoder_layers to {found} and use the encoder it was trained with"
        )
