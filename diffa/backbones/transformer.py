"""The Transformer that LLaDA and Llama share: RMSNorm, RoPE, grouped queries, SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffa.backbones.attention import Kernel, Plan, attend, narrow, plan
from diffa.backbones.compile import compiled
from diffa.backbones.ragged import ragged
from diffa.checkpoints import read as weights
from diffa.runtime.cpu_linear import Linear

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext


class Shape(NamedTuple):
    """The size of a Transformer, and the numbers that its weights were trained with.

    Attributes:
        width: of the residual stream.
        layers: blocks.
        heads: query heads; ``groups`` key and value heads.
        hidden: width of the feed-forward.
        vocab: rows of the embedding and of the head.
        context: longest sequence the model was made for.
        theta: RoPE base; ``scaling`` Llama 3's frequency scaling, or None.
        eps: of RMSNorm.
        bias: whether queries, keys and values have a bias.
        tied: whether the head is the embedding.
        head_width: of one head; width / heads where None.
    """

    width: int
    layers: int
    heads: int
    groups: int
    hidden: int
    vocab: int
    context: int
    theta: float
    eps: float
    scaling: Mapping[str, Any] | None = None
    bias: bool = False
    tied: bool = False
    head_width: int | None = None

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """One layer: attention and a gated feed-forward, each behind a norm and a residual."""

    def __init__(self, shape: Shape, *, compiling: bool = False) -> None:
        super().__init__()
        width, head = shape.width, shape.head
        self.split = (-1, head)
        self.compiling = compiling
        self.attn_norm = RMSNorm(width, shape.eps)
        self.q_proj = Linear(width, shape.heads * head, bias=shape.bias)
        self.k_proj = Linear(width, shape.groups * head, bias=shape.bias)
        self.v_proj = Linear(width, shape.groups * head, bias=shape.bias)
        self.attn_out = Linear(shape.heads * head, width, bias=False)
        self.ff_norm = RMSNorm(width, shape.eps)
        self.ff_proj = Linear(width, shape.hidden, bias=False)
        self.up_proj = Linear(width, shape.hidden, bias=False)
        self.ff_out = Linear(shape.hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        context: AttentionContext,
        layer: int,
        how: Plan,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Map x (B, K, W) with RoPE turns (2, B, K, 1, D); ``layer`` is its place in the memory.

        Where only the places ``rows`` (B, R) are wanted, the result is (B, R, W).
        """
        window = self.compiling and context.query_slots is not None and rows is None
        parts = compiled(PARTS, x.device.type) if window else PARTS
        remembering, asking, closing = parts
        h, keys, values = remembering(self, x, turn)
        keys, values = context.update_cache(layer, keys, values)
        if rows is not None:
            wide = rows[:, :, None].expand(-1, -1, x.shape[2])
            x, h = x.gather(1, wide), h.gather(1, wide)
            spots = rows[None, :, :, None, None].expand(2, -1, -1, 1, turn.shape[-1])
            turn = turn.expand(-1, len(rows), -1, -1, -1).gather(2, spots)
        queries = asking(self, h, turn)
        return closing(self, x, attend(queries, keys, values, how))


def remembered(block: Block, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x (B, K, W); return it with its keys and values, (B, K, H, D) each."""
    h = block.attn_norm(x)
    keys = rotate(block.k_proj(h).unflatten(-1, block.split), turn)
    return h, keys, block.v_proj(h).unflatten(-1, block.split)


def asked(block: Block, h: Tensor, turn: Tensor) -> Tensor:
    """Queries (B, R, H, D) of normalised states (B, R, W)."""
    return rotate(block.q_proj(h).unflatten(-1, block.split), turn)


def closed(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    """What leaves a block: x (B, R, W) plus what was attended to, plus the feed-forward."""
    x = x + block.attn_out(mixed)
    h = block.ff_norm(x)
    out: Tensor = x + block.ff_out(gated(block.ff_proj(h), block.up_proj(h)))
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's silu(gate) * up. Without gradients it is made in the gate's memory: the widest
    tensors of a layer do not fit a CPU core's cache twice."""
    if torch.is_grad_enabled():
        return nn.functional.silu(gate) * up
    return nn.functional.silu(gate, inplace=True).mul_(up)


Parts = tuple[Callable[..., Any], Callable[..., Tensor], Callable[..., Tensor]]
PARTS: Parts = (remembered, asked, closed)


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head; the head is applied apart from the body."""

    def __init__(
        self,
        shape: Shape,
        *,
        causal: bool,
        kernel: Kernel,
        gradient_checkpointing: bool,
        compiling: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.causal = causal
        self.kernel: Kernel = kernel
        self.gradient_checkpointing = gradient_checkpointing
        self.wte = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape, compiling=compiling) for _ in range(shape.layers))
        self.ln_f = RMSNorm(shape.width, shape.eps)
        self.ff_out = Linear(shape.width, shape.vocab, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding where the weights are tied (again after loading)."""
        if self.shape.tied:
            self.ff_out.weight = self.wte.weight

    def initialise(self, seed: int) -> None:
        """Draw weights anew: normal .02, residual outputs scaled down by depth (GPT-2's rule)."""
        generator = torch.Generator().manual_seed(seed)
        deep = 0.02 / math.sqrt(2 * self.shape.layers)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                nn.init.zeros_(weight) if name.endswith("bias") else nn.init.ones_(weight)
            else:
                residual = name.startswith("blocks.") and "_out." in name
                nn.init.normal_(weight, std=deep if residual else 0.02, generator=generator)

    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Map embeddings (B, K, W) at positions (B, K) to normalised hidden states (B, K, W)."""
        packed = None if self.causal else ragged(context, embeds)
        if packed is not None:
            inner = packed.context(context)
            return packed.spread(self.forward(packed.pack(embeds), packed.pack(positions), inner))
        how = plan(context, positions, causal=self.causal, kernel=self.kernel)
        turn = turns(positions, self.shape).to(embeds.device)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        x, rows, narrowed = embeds, context.output_slots, how
        if rows is not None:
            fewer = narrow(how, rows) if rows.shape[1] < embeds.shape[1] else None
            rows, narrowed = (None, how) if fewer is None else (rows, fewer)
        for layer, block in enumerate(self.blocks):
            if rows is not None and layer == len(self.blocks) - 1:
                wide = rows[:, :, None].expand(-1, -1, x.shape[2])
                x = x.scatter(1, wide, block(x, turn, context, layer, narrowed, rows))
            elif again:
                x = checkpoint(block, x, turn, context, layer, how, use_reentrant=False)
            else:
                x = block(x, turn, context, layer, how)
        hidden: Tensor = self.ln_f(x)
        return hidden


def turns(positions: Tensor, shape: Shape) -> Tensor:
    """Cosines and sines of RoPE at positions (B, K) in float32, (2, B, K, 1, D); the sines of the
    first half of each head are negative, which is what ``rotate`` adds there."""
    even = torch.arange(0, shape.head, 2, device=positions.device, dtype=torch.float32)
    frequencies = shape.theta ** (-even / shape.head)
    if shape.scaling is not None:
        frequencies = scaled(frequencies, shape.scaling)
    angles = (positions[..., None].float() * frequencies)[:, :, None]
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)])


def scaled(frequencies: Tensor, rule: Mapping[str, Any]) -> Tensor:
    """Llama 3's RoPE scaling: long wavelengths slowed, short ones kept, a ramp between."""
    slow, high = float(rule["low_freq_factor"]), float(rule["high_freq_factor"])
    wavelengths = 2 * math.pi / frequencies
    ratio = float(rule["original_max_position_embeddings"]) / wavelengths
    ramp = ((ratio - slow) / (high - slow)).clamp(0, 1)
    return frequencies * (ramp + (1 - ramp) / float(rule["factor"]))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate queries or keys (B, K, H, D) by RoPE, halves paired, in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    other = wide.roll(wide.shape[-1] // 2, dims=-1)  # what each element is paired with
    return torch.addcmul(wide * turn[0], other, turn[1]).to(x.dtype)


def load(
    transformer: Transformer,
    folder: Path | None,
    seed: int,
    read: Callable[[Path], dict[str, Tensor]],
) -> None:
    """Give a Transformer its weights: what ``read`` finds in a folder, or draws where it is None.

    A checkpoint with tied embeddings may leave the head out. In a dry run nothing is read.
    """
    if weights.is_meta():
        return
    if folder is None:
        transformer.initialise(seed)
        return
    state = read(folder)
    if transformer.shape.tied:
        state = {"ff_out.weight": state["wte.weight"], **state}
    weights.load_state(transformer, state, source=folder)
    transformer.tie()
