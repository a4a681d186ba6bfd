"""The Transformer that most backbones share: RMSNorm, RoPE, grouped queries, SwiGLU.

Shapes: B rows, K queries (the slots computed in this pass), S slots of the canvas, R queries whose
states are read, W hidden size, H query heads, G key/value heads, D width of a head.

    x (B, K, W) --attn_norm--> h --q_proj--> (B, K, H, D) --rotate--> queries -+
                                --k_proj--> (B, K, G, D) --rotate--> keys   --cache--> (B, S, G, D)
                                --v_proj--> (B, K, G, D)             values --cache--> (B, S, G, D)
    x + attn_out(attention) --ff_norm--> SwiGLU --> + residual --> next layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffa.backbones.attention import (
    AttentionPlan,
    AttnImplementation,
    compute_attention,
    plan_attention,
    select_queries,
)
from diffa.backbones.compile import compile_parts
from diffa.backbones.ragged import pack_rows
from diffa.checkpoints import read as weights
from diffa.runtime.cpu_linear import Linear

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext


class MoEConfig(NamedTuple):
    """Mixture-of-experts feed-forward.

    Attributes:
        num_experts: experts of a layer.
        num_experts_per_tok: experts that process each token.
        intermediate_size: width of one expert.
        norm_topk_prob: whether the weights of a token's experts are scaled to sum to one.
        dense_layers: number of first layers with a dense feed-forward instead.
        shared_size: width of the feed-forward that every token passes besides. 0: none.
        num_groups: groups of experts; a token's experts come from the best ones.
        topk_groups: groups that a token's experts come from.
        scale: factor of the experts' weights.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    dense_layers: int = 0
    shared_size: int = 0
    num_groups: int = 1
    topk_groups: int = 1
    scale: float = 1.0


class TransformerConfig(NamedTuple):
    """Sizes of a Transformer and the constants that its weights were trained with.

    Attributes:
        hidden_size: width of the residual stream.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides ``num_heads``.
        head_dim: width of one head.
        intermediate_size: width of the feed-forward network.
        vocab_size: rows of the embedding and of the head.
        max_position_embeddings: longest sequence.
        rope_theta: base of RoPE.
        rms_norm_eps: epsilon of RMSNorm.
        rope_scaling: Llama 3's frequency scaling. None: no scaling.
        attention_bias: whether queries, keys and values have a bias.
        tie_word_embeddings: whether the head shares the embedding's weights.
        moe: experts instead of a dense feed-forward. None: dense.
        qk_norm: whether every head's queries and keys are normalised before RoPE (Qwen3).
        rotary_dim: dimensions of a head that RoPE turns, the first ones. None: all.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    rope_scaling: Mapping[str, Any] | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    moe: MoEConfig | None = None
    qk_norm: bool = False
    rotary_dim: int | None = None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x."""
        if is_gpu_inference(x) and x.dtype == self.weight.dtype:  # one kernel
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        normed = wide.to(x.dtype)
        if torch.is_grad_enabled() or normed.dtype != self.weight.dtype:
            return self.weight * normed
        return normed.mul_(self.weight)  # in place: a tensor less to write to memory


class Block(nn.Module):
    """One layer: attention and a gated feed-forward, each with a pre-norm and a residual.

    The submodules have the names of LLaDA's published weights.
    """

    def __init__(self, config: TransformerConfig, layer: int = 0, *, compile: bool = False) -> None:
        super().__init__()
        width, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.split = (-1, head_dim)
        self.compile_parts = compile
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = Linear(width, config.num_heads * head_dim, bias=bias)
        self.k_proj = Linear(width, config.num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(width, config.num_kv_heads * head_dim, bias=bias)
        self.attn_out = Linear(config.num_heads * head_dim, width, bias=False)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.init_feed_forward(config, layer)

    def init_feed_forward(self, config: TransformerConfig, layer: int) -> None:
        """Create the modules of ``feed_forward`` of a layer."""
        width, intermediate = config.hidden_size, config.intermediate_size
        self.ff_proj = Linear(width, intermediate, bias=False)
        self.up_proj = Linear(width, intermediate, bias=False)
        self.ff_out = Linear(intermediate, width, bias=False)

    def queries(self, h: Tensor) -> Tensor:
        """Return queries (B, R, H, D) of normalised states (B, R, W), before RoPE."""
        heads: Tensor = self.q_proj(h).unflatten(-1, self.split)
        return self.q_norm(heads) if hasattr(self, "q_norm") else heads

    def keys(self, h: Tensor) -> Tensor:
        """Return keys (B, K, G, D) of normalised states (B, K, W), before RoPE."""
        heads: Tensor = self.k_proj(h).unflatten(-1, self.split)
        return self.k_norm(heads) if hasattr(self, "k_norm") else heads

    def feed_forward(self, h: Tensor) -> Tensor:
        """Map normalised states (B, R, W)."""
        out: Tensor = self.ff_out(swiglu(self.ff_proj(h), self.up_proj(h)))
        return out

    def add_feed_forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return x plus the feed-forward of h, both (B, R, W)."""
        if type(self).feed_forward is not Block.feed_forward:
            return x + self.feed_forward(h)
        return add_linear(x, swiglu(self.ff_proj(h), self.up_proj(h)), self.ff_out)

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor,
        context: AttentionContext,
        layer: int,
        plan: AttentionPlan,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """Map states x (B, K, W).

        Args:
            x: states of the queries.
            cos_sin: RoPE's cosines and sines, (2, B, K, 1, D).
            context: the KV cache, among others.
            layer: index of this layer in the KV cache.
            plan: how to attend.
            query_index: (B, R) queries to compute; all K still give keys and values. None: all.

        Returns:
            (B, K, W), or (B, R, W) with a ``query_index``.
        """
        is_window = context.query_slots is not None and query_index is None
        parts = PARTS
        if self.compile_parts and is_window:
            parts = compile_parts(PARTS, x.device.type)
        keys_and_values, rotated_queries, add_residuals = parts
        if parts is PARTS and query_index is None and is_gpu_inference(x):
            # Queries and keys are rotated together: a window's time is that of its launches.
            h = self.attn_norm(x)
            both = torch.cat([self.queries(h), self.keys(h)], dim=2)
            heads = both.shape[2] - (values := self.v_proj(h).unflatten(-1, self.split)).shape[2]
            queries, keys = rotate(both, cos_sin).tensor_split([heads], dim=2)
            keys, values = context.update_cache(layer, keys, values)
            return add_residuals(self, x, compute_attention(queries, keys, values, plan))
        h, keys, values = keys_and_values(self, x, cos_sin)
        keys, values = context.update_cache(layer, keys, values)
        if query_index is not None:
            wide = query_index[:, :, None].expand(-1, -1, x.shape[2])
            x, h = x.gather(1, wide), h.gather(1, wide)
            index = query_index[None, :, :, None, None]
            index = index.expand(2, -1, -1, 1, cos_sin.shape[-1])
            cos_sin = cos_sin.expand(-1, len(query_index), -1, -1, -1).gather(2, index)
        queries = rotated_queries(self, h, cos_sin)
        return add_residuals(self, x, compute_attention(queries, keys, values, plan))


# The parts of a block around attention. They are functions, not methods, so that torch compiles
# each of them once for all layers.


def _keys_and_values(block: Block, x: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised x (B, K, W) and its keys and values, (B, K, G, D) each."""
    h = block.attn_norm(x)
    return h, rotate(block.keys(h), cos_sin), block.v_proj(h).unflatten(-1, block.split)


def _rotated_queries(block: Block, h: Tensor, cos_sin: Tensor) -> Tensor:
    return rotate(block.queries(h), cos_sin)


def _add_residuals(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    """Return x (B, R, W) plus the attention's output plus the feed-forward's."""
    x = add_linear(x, mixed, block.attn_out)
    return block.add_feed_forward(x, block.ff_norm(x))


BlockParts = tuple[Callable[..., Any], Callable[..., Tensor], Callable[..., Tensor]]
PARTS: BlockParts = (_keys_and_values, _rotated_queries, _add_residuals)


def add_linear(x: Tensor, h: Tensor, linear: nn.Module) -> Tensor:
    """Return x + linear(h), on a GPU in one kernel where ``linear`` is a plain matrix."""
    plain = type(linear) is Linear and linear.bias is None and x.dtype == h.dtype
    if plain and is_gpu_inference(x) and not torch.is_autocast_enabled("cuda"):
        weight = linear.get_parameter("weight").T
        return torch.addmm(x.flatten(0, 1), h.flatten(0, 1), weight).view(x.shape)
    out: Tensor = x + linear(h)
    return out


def is_gpu_inference(x: Tensor) -> bool:
    """Return whether x is on a GPU and needs no gradient."""
    return x.is_cuda and not torch.is_grad_enabled()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (SwiGLU, Shazeer 2020); overwrites ``gate`` without gradients."""
    if torch.is_grad_enabled():
        return nn.functional.silu(gate) * up
    # In place: the widest tensors of a layer do not fit a CPU core's cache twice.
    return nn.functional.silu(gate, inplace=True).mul_(up)


class Transformer(nn.Module):
    """Embedding, layers, final norm and head. ``forward`` ends before the head.

    Args:
        config: Sizes and constants.
        attention_block: None: every slot attends to every slot. Else a slot attends to its own
            block of so many positions and to the blocks before; 1 is causal attention.
        attn_implementation: Attention kernel.
        gradient_checkpointing: Recompute activations in the backward pass.
        compile: Compile the window steps of cached decoding.
        block_class: Class of a layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention_block: int | None,
        attn_implementation: AttnImplementation,
        gradient_checkpointing: bool,
        compile: bool = False,
        block_class: type[Block] = Block,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_block = attention_block
        self.attn_implementation: AttnImplementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            block_class(config, layer, compile=compile) for layer in range(config.num_layers)
        )
        self.ln_f = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ff_out = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding's weights with the head if the configuration ties them."""
        if self.config.tie_word_embeddings:
            self.ff_out.weight = self.wte.weight

    def init_weights(self, seed: int) -> None:
        """Draw all weights from N(0, 0.02); residual outputs are scaled by depth (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                nn.init.zeros_(weight) if name.endswith("bias") else nn.init.ones_(weight)
            else:
                residual = name.startswith("blocks.") and "_out." in name
                std = residual_std if residual else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        context: AttentionContext,
        layer_inputs: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Map embeddings (B, K, W) at positions (B, K) to normalised hidden states (B, K, W).

        Where the context names ``output_slots``, the other states lack the last layer.

        ``layer_inputs``: for each layer that is a key, the layer's input (B, K, W) is put there.
        """
        causal = self.attention_block is not None
        rows = None if causal else pack_rows(context, embeds)
        if rows is not None:
            hidden = self.forward(
                rows.pack(embeds), rows.pack(positions), rows.pack_context(context)
            )
            return rows.unpack(hidden)
        half = embeds.is_cuda and torch.is_autocast_enabled("cuda")
        plan: AttentionPlan = context.once(
            "plan",
            lambda: plan_attention(
                context,
                positions,
                causal=causal,
                block_length=self.attention_block or 1,
                implementation=self.attn_implementation,
                dtype=torch.get_autocast_dtype("cuda") if half else embeds.dtype,
                head_dim=self.config.head_dim,
            ),
        )
        cos_sin: Tensor = context.once(
            "cos_sin", lambda: rotary_embedding(positions, self.config).to(embeds.device)
        )
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        # Keys and values of the last layer are needed for all queries, its outputs for R of them.
        index, last_plan = context.output_slots, None
        if index is not None and index.shape[1] < embeds.shape[1]:
            last_plan = select_queries(plan, index)
        x = embeds
        for layer, block in enumerate(self.blocks):
            if layer_inputs is not None and layer in layer_inputs:
                layer_inputs[layer] = x
            if index is not None and last_plan is not None and layer == len(self.blocks) - 1:
                wide = index[:, :, None].expand(-1, -1, x.shape[2])
                x = x.scatter(1, wide, block(x, cos_sin, context, layer, last_plan, index))
            elif recompute:
                x = checkpoint(block, x, cos_sin, context, layer, plan, use_reentrant=False)
            else:
                x = block(x, cos_sin, context, layer, plan)
        normalised: Tensor = self.ln_f(x)
        return normalised


def rotary_embedding(positions: Tensor, config: TransformerConfig) -> Tensor:
    """Return cosines and sines of RoPE at positions (B, K) in float32, (2, B, K, 1, D).

    The sines of the first half of each head are negated, as ``rotate`` needs them. Where RoPE
    turns only the first dimensions of a head, D is their number.
    """
    dim = config.rotary_dim or config.head_dim
    even = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-even / dim)
    if config.rope_scaling is not None:
        frequencies = scale_rope_frequencies(frequencies, config.rope_scaling)
    angles = (positions[..., None].float() * frequencies)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def scale_rope_frequencies(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Apply Llama 3's RoPE scaling: slow long wavelengths, keep short ones, a ramp between."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelengths = 2 * math.pi / frequencies
    ratio = float(scaling["original_max_position_embeddings"]) / wavelengths
    ramp = ((ratio - low) / (high - low)).clamp(0, 1)
    return frequencies * (ramp + (1 - ramp) / float(scaling["factor"]))


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Apply RoPE to queries or keys (B, K, H, D) in float32; element i is paired with i + D/2."""
    dim = cos_sin.shape[-1]
    if dim < x.shape[-1]:  # partial RoPE: the other dimensions stay
        return torch.cat([rotate(x[..., :dim], cos_sin), x[..., dim:]], -1)
    # (a, b) -> (a cos - b sin, b cos + a sin); rolling by D/2 brings each element its partner
    partner = x.roll(dim // 2, dims=-1)
    if is_gpu_inference(x):  # the sum is rounded where it is written
        return torch.addcmul(x * cos_sin[0], partner, cos_sin[1], out=torch.empty_like(partner))
    return torch.addcmul(x * cos_sin[0], partner, cos_sin[1]).to(x.dtype)


def load_weights(
    transformer: Transformer,
    folder: Path | None,
    seed: int,
    read_state_dict: Callable[[Path], dict[str, Tensor]],
) -> None:
    """Fill a Transformer from ``folder``, or draw its weights where ``folder`` is None.

    A checkpoint with tied embeddings may lack the head. A dry run reads nothing.
    """
    if weights.is_meta():
        return
    if folder is None:
        transformer.init_weights(seed)
        return
    state = read_state_dict(folder)
    if transformer.config.tie_word_embeddings:
        state = {"ff_out.weight": state["wte.weight"], **state}
    weights.load_state(transformer, state, source=folder)
    transformer.tie_weights()
