"""What the backbones of diffa's own Transformer share: options, weights, tokenizer, LoRA, head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffa.backbones.attention import AttnImplementation
from diffa.backbones.lora import DIFFA2_TARGET_MODULES, apply_lora, lora_module
from diffa.backbones.tokenizer import load_tokenizer
from diffa.backbones.transformer import Block, Transformer, TransformerConfig, load_weights
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError, SpecError, check_at_least
from diffa.types import Decoding, Vocab

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext


class TransformerBackbone(nn.Module):
    """A backbone that runs diffa's Transformer.

    A subclass says how its family's files are read: ``parse_config`` and ``read_state_dict``. Its
    attention is causal if its ``decoding`` is, and block-causal if it has a ``block_length``.

    Args:
        checkpoint: Folder or Hub id of published weights.
        revision: Revision of the Hub repository. Default: the newest.
        config: Published ``config.json`` as a mapping, instead of a checkpoint; weights are drawn
            from ``seed``.
        tokenizer: Folder or Hub id of the tokenizer. Default: the checkpoint's own.
        attn_implementation: Attention kernel. ``auto`` takes xformers on CUDA if it loads, else
            SDPA.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the window steps of cached decoding with torch, for GPUs.
        block_length: Attend only to the own block of so many slots and to earlier blocks
            (block-causal attention). Default: the checkpoint's own rule.
        mask_token_id: Id of the mask token. Default: the one that the configuration names.
        eos_token_id: Id of the token that ends an answer. Default: the configuration's.
        lora: LoRA options: checkpoint, revision, rank, alpha, dropout, target_modules, merge,
            seed. Default: no LoRA.
        seed: Seed of the weights without a checkpoint.

    Raises:
        CheckpointError: files are missing, do not fit, or describe another architecture.
        SpecError: neither or both of ``checkpoint`` and ``config`` are given.
    """

    decoding: Decoding
    block_class: ClassVar[type[Block]] = Block
    lora_target_modules: ClassVar[tuple[str, ...]] = DIFFA2_TARGET_MODULES
    compilable: ClassVar[bool] = True
    # Where blocks are counted from: position 0, or the end of the prompt, which is then one block.
    block_origin: ClassVar[Literal["sequence", "prompt"]] = "sequence"
    shifted: ClassVar[bool] = False  # whether a state predicts the token of the next slot

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        revision: str | None = None,
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        attn_implementation: AttnImplementation = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        block_length: int | None = None,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        lora: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if compile and not self.compilable:
            raise SpecError("compile: this backbone cannot be compiled; leave it out")
        folder, fields = weights.resolve_config(checkpoint, revision, config)
        own_ids = {"mask_token_id": mask_token_id, "eos_token_id": eos_token_id}
        fields = {**fields, **{name: own for name, own in own_ids.items() if own is not None}}
        source = folder or "config"
        try:
            parsed = self.parse_config(fields, source)
            self.tokenizer = load_tokenizer(tokenizer, folder)
            self.vocab = self._vocab(fields, parsed.vocab_size, source)
        except KeyError as error:
            raise CheckpointError(f"{source}: the configuration lacks {error}") from None
        _check_heads(parsed, source)
        check_at_least(1, block_length=block_length)
        if block_length is not None and self.decoding == "causal":
            raise SpecError("block_length: this backbone is causal; leave it out")
        self.block_length = block_length or self.parse_block_length(fields)
        self.width, self.max_length = parsed.hidden_size, parsed.max_position_embeddings
        # ``load_state`` allocates the weights of a checkpoint when it reads them.
        with torch.device("meta") if folder else torch.get_default_device():
            self.transformer = Transformer(
                parsed,
                attention_block=1 if self.decoding == "causal" else self.block_length,
                attn_implementation=attn_implementation,
                gradient_checkpointing=gradient_checkpointing,
                compile=compile,
                block_class=self.block_class,
            )
        load_weights(self.transformer, folder, seed, self.read_state_dict)
        apply_lora(self.transformer, lora, self.lora_target_modules)

    def parse_config(self, fields: Mapping[str, Any], source: str | Path) -> TransformerConfig:
        """Return the configuration in a published ``config.json``.

        Raises:
            KeyError: a field is missing.
            CheckpointError: the fields describe another architecture.
        """
        raise NotImplementedError

    def parse_block_length(self, fields: Mapping[str, Any]) -> int | None:
        """Return the block length in a ``config.json``; None: attention knows no blocks."""
        return None

    def read_state_dict(self, folder: Path) -> dict[str, Tensor]:
        """Return the weights in a folder under the names of ``Transformer``."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Linear:
        """Hidden states (..., W) -> logits (..., V)."""
        return self.transformer.ff_out

    @property
    def lora(self) -> nn.Module:
        """The live LoRA pairs, by the checkpoint's names; empty where there are none."""
        return lora_module(self.transformer)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., W)."""
        embeds: Tensor = self.transformer.wte(tokens)
        return embeds

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        context: AttentionContext,
        layer_inputs: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Embeddings (B, K, W) at positions (B, K) -> hidden states (B, K, W)."""
        hidden: Tensor = self.transformer(embeds, positions, context, layer_inputs)
        return hidden

    def _vocab(self, fields: Mapping[str, Any], size: int, source: str | Path) -> Vocab:
        eos = fields["eos_token_id"]
        # Llama 3 lists several ends; the last one closes a turn of its chat template.
        eos = eos[-1] if isinstance(eos, list) else eos
        pad = eos if fields.get("pad_token_id") is None else fields["pad_token_id"]
        if self.decoding == "causal":
            return Vocab(size, eos, pad, None)
        mask = fields.get("mask_token_id")
        mask = getattr(self.tokenizer, "mask_token_id", None) if mask is None else mask
        if mask is None:
            raise CheckpointError(
                f"{source}: neither the configuration nor the tokenizer names the mask token "
                "(mask_token_id)"
            )
        return Vocab(size, eos, pad, int(mask))


def check_fields(
    fields: Mapping[str, Any], required: Mapping[str, tuple[Any, ...]], source: str | Path
) -> None:
    """Raise CheckpointError unless every field has one of its required values, or is absent."""
    for name, values in required.items():
        if fields.get(name, values[0]) not in values:
            raise CheckpointError(
                f"{source}: {name} is {fields[name]!r}; this backbone computes {values[-1]!r}"
            )


def _check_heads(config: TransformerConfig, source: str | Path) -> None:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    split = config.hidden_size % heads and config.head_dim == config.hidden_size // heads
    if split or heads % kv_heads or config.head_dim % 2 or (config.rotary_dim or 0) % 2:
        raise CheckpointError(
            f"{source}: width {config.hidden_size}, {heads} heads and {kv_heads} key/value heads "
            "do not divide: the width must split into even heads, the heads into key/value heads"
        )
