"""LLaDA-MoE: bidirectional attention with normalised heads, and experts for a feed-forward."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffa.backbones import llama
from diffa.backbones import lora as adaptation
from diffa.backbones.attention import Kernel, Plan, attend
from diffa.backbones.tokenizer import read_tokenizer
from diffa.backbones.transformer import Block, RMSNorm, Shape, Transformer, load, rotate
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError
from diffa.types import Vocab

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext

# What is computed here; a checkpoint that asks for anything else is refused.
_ASSUMED: dict[str, tuple[Any, ...]] = {
    "qk_layernorm": (True,),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_enable_expert_bias": (None, False),
    "shared_expert_intermediate_size": (None, 0),
    "routed_scaling_factor": (None, 1),
    "partial_rotary_factor": (None, 1),
    "clip_qkv": (None,),
}
_EXPERT = re.compile(r"blocks\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


class Sparse(NamedTuple):
    """Experts of a layer, how many each token visits, their width, and whether the shares of the
    visited ones are scaled to add up to one."""

    experts: int
    top: int
    hidden: int
    scaled: bool


class LLaDAMoE(nn.Module):
    """Masked-diffusion mixture of experts (LLaDA-MoE, arXiv 2509.24389: 7 B, 1.4 B active).

    Llama's layout with a norm on every head's queries and keys; every token visits the ``top``
    of its layer's experts, weighed by a softmax over all of them.

    Args:
        checkpoint: a folder or Hub id in the published layout.
        revision: of the Hub repository.
        config: instead of a checkpoint, such a ``config.json`` as a mapping; weights are then
            drawn from ``seed``.
        tokenizer: folder or Hub id of the tokenizer; the checkpoint's own where None. Its mask
            token is the vocabulary's where the configuration names none.
        attn_implementation: ``auto`` takes xformers on CUDA where it loads, SDPA elsewhere.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        lora: LoRA pairs on the attention's projections: see ``lora.Options``.
        seed: of the weights where there is no checkpoint.

    Raises:
        CheckpointError: files are missing, or do not fit, or describe another architecture.
        SpecError: neither or both of ``checkpoint`` and ``config`` are given.
    """

    decoding: Literal["masked"] = "masked"

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        revision: str | None = None,
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        attn_implementation: Kernel = "auto",
        gradient_checkpointing: bool = False,
        lora: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        folder, found = weights.resolve_config(checkpoint, revision, config)
        self.tokenizer = read_tokenizer(tokenizer, folder)
        source = folder or "config"
        shape, sparse, self.vocab = read(found, self.tokenizer, source=source)
        self.width, self.max_length = shape.width, shape.context
        with torch.device("meta") if folder else torch.get_default_device():
            self.transformer = Transformer(
                shape,
                causal=False,
                kernel=attn_implementation,
                gradient_checkpointing=gradient_checkpointing,
            )
            blocks = [SparseBlock(shape, sparse) for _ in range(shape.layers)]
            self.transformer.blocks = nn.ModuleList(blocks)
        load(
            self.transformer,
            folder,
            seed,
            lambda at: stacked(llama.rename(weights.read_weights(at)), sparse.experts, source),
        )
        adaptation.adapt(self.transformer, lora, ("q_proj", "k_proj", "v_proj", "attn_out"))

    @property
    def lora(self) -> nn.Module:
        """The live LoRA pairs, by the checkpoint's names; empty where there are none."""
        return adaptation.view(self.transformer)

    @property
    def head(self) -> nn.Linear:
        """Hidden states (..., W) -> logits (..., V)."""
        return self.transformer.ff_out

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., W)."""
        embedded: Tensor = self.transformer.wte(tokens)
        return embedded

    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Embeddings (B, K, W) at positions (B, K) -> hidden states (B, K, W)."""
        hidden: Tensor = self.transformer(embeds, positions, context)
        return hidden


class SparseBlock(Block):
    """One layer: attention with normalised heads, then experts, each behind a norm."""

    def __init__(self, shape: Shape, sparse: Sparse) -> None:
        super().__init__(shape._replace(hidden=1))
        del self.ff_proj, self.up_proj, self.ff_out
        self.q_norm, self.k_norm = RMSNorm(shape.head, shape.eps), RMSNorm(shape.head, shape.eps)
        self.experts = Experts(shape.width, sparse)

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        context: AttentionContext,
        layer: int,
        how: Plan,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Map x (B, K, W) with RoPE turns (2, B, K, 1, D); ``rows`` are never asked for."""
        h = self.attn_norm(x)
        queries = rotate(self.q_norm(self.q_proj(h).unflatten(-1, self.split)), turn)
        keys = rotate(self.k_norm(self.k_proj(h).unflatten(-1, self.split)), turn)
        values = self.v_proj(h).unflatten(-1, self.split)
        keys, values = context.update_cache(layer, keys, values)
        x = x + self.attn_out(attend(queries, keys, values, how))
        out: Tensor = x + self.experts(self.ff_norm(x))
        return out


class Experts(nn.Module):
    """Gated feed-forwards, of which every token visits a few; none has a capacity."""

    def __init__(self, width: int, sparse: Sparse) -> None:
        super().__init__()
        self.top, self.scaled = sparse.top, sparse.scaled
        self.gate = nn.Linear(width, sparse.experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(sparse.experts, sparse.hidden, width))
        self.up_proj = nn.Parameter(torch.empty(sparse.experts, sparse.hidden, width))
        self.down_proj = nn.Parameter(torch.empty(sparse.experts, width, sparse.hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., W), each token by its experts alone."""
        flat = x.flatten(0, -2)
        shares = self.gate(flat).float().softmax(dim=-1)
        best, chosen = shares.topk(self.top, dim=-1)
        if self.scaled:
            best = best / best.sum(dim=-1, keepdim=True)
        best = best.to(flat.dtype)
        out = torch.zeros_like(flat)
        for number in range(len(self.gate_proj)):
            row, place = (chosen == number).nonzero(as_tuple=True)
            inner = nn.functional.linear(flat[row], self.gate_proj[number])
            inner = nn.functional.silu(inner)
            inner = inner * nn.functional.linear(flat[row], self.up_proj[number])
            found = nn.functional.linear(inner, self.down_proj[number])
            out = out.index_add(0, row, found * best[row, place, None])
        return out.view_as(x)


def stacked(state: Mapping[str, Tensor], experts: int, source: str | Path) -> dict[str, Tensor]:
    """Give the published keys this module's names; each layer's experts become one tensor."""
    renamed: dict[str, Tensor] = {}
    split: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        name = key.replace("model.layers.", "blocks.").replace(".self_attn.", ".")
        found = _EXPERT.fullmatch(name)
        if found:
            whole = f"blocks.{found[1]}.experts.{found[3]}_proj"
            split.setdefault(whole, {})[int(found[2])] = value
        else:
            renamed[name.replace(".mlp.gate.", ".experts.gate.")] = value
    for whole, parts in split.items():
        missing = sorted(set(range(experts)) - parts.keys())
        if missing:
            raise CheckpointError(f"{source} lacks experts {missing[:6]} of {whole}")
        renamed[whole] = torch.stack([parts[number] for number in range(experts)])
    return renamed


def read(
    config: Mapping[str, Any], tokenizer: Any, *, source: str | Path
) -> tuple[Shape, Sparse, Vocab]:
    """Read sizes and special ids from a published ``config.json``.

    Raises:
        CheckpointError: a field is missing, or asks for another architecture.
    """
    for field, values in _ASSUMED.items():
        if config.get(field, values[0]) not in values:
            raise CheckpointError(f"{source}: {field} is {config[field]!r}, not {values[-1]!r}")
    if not all(config.get("moe_layer_freq") or [1]):
        raise CheckpointError(f"{source}: some layers have no experts (moe_layer_freq)")
    mask = config.get("mask_token_id", getattr(tokenizer, "mask_token_id", None))
    if mask is None:
        raise CheckpointError(f"{source}: neither config nor tokenizer names the mask token")
    try:
        sparse = Sparse(
            experts=config["num_experts"],
            top=config["num_experts_per_tok"],
            hidden=config["expert_intermediate_size"],
            scaled=bool(config.get("norm_topk_prob")),
        )
    except KeyError as error:
        raise CheckpointError(f"{source}: the configuration lacks {error}") from None
    plain = {"intermediate_size": sparse.hidden, "rms_norm_eps": 1e-5, **config}
    shape, vocab = llama.read(plain, source=source)
    return shape, sparse, vocab._replace(mask=int(mask))
