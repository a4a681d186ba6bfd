"""Any autoregressive language model of transformers, driven by the canvas's slots."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diffa.backbones.lora import apply_lora, lora_module
from diffa.backbones.tokenizer import load_tokenizer
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError, SpecError
from diffa.types import Vocab

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from diffa.canvas.kv_cache import AttentionContext

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# Dynamic RoPE stores frequencies for the current input's length on the module, so threads that
# share such a model must not run it at the same time.
_DYNAMIC_ROPE_LOCK = threading.Lock()


class Causal(nn.Module):
    """Any autoregressive model of ``AutoModelForCausalLM``; no remote code is run.

    Keys and values are in diffa's KV cache; positions and masks are the canvas's, so rows of
    different lengths share a batch. Models with a recurrent state are refused. With sliding
    attention, sequences are limited to its window, within which it equals full attention.

    Args:
        checkpoint: Folder or Hub id of the model.
        revision: Revision of the Hub repository. Default: the newest.
        config: A ``config.json`` with its ``model_type`` as a mapping, instead of a checkpoint;
            weights are drawn from ``seed``.
        tokenizer: Folder or Hub id of the tokenizer. Default: the checkpoint's own.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        lora: LoRA options: checkpoint, revision, rank, alpha, dropout, target_modules, merge,
            seed. It adapts every linear layer but the head by default.
        seed: Seed of the weights without a checkpoint.

    Raises:
        CheckpointError: files are missing or do not fit, or the model keeps no keys and values.
        SpecError: neither or both of ``checkpoint`` and ``config``, or an unknown model type.
    """

    decoding: Literal["causal"] = "causal"

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        revision: str | None = None,
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        gradient_checkpointing: bool = False,
        lora: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        folder, fields = weights.resolve_config(checkpoint, revision, config)
        source = str(folder or "config")
        model_config = _text_config(fields, source)
        self.max_length = _max_length(model_config, source)
        self.model = _load_model(model_config, folder, seed)
        _check_supported(self.model, source)
        if gradient_checkpointing:
            # transformers 5.x has both names, 6 has only the new one
            name = "activation_checkpointing_enable"
            getattr(self.model, name, self.model.gradient_checkpointing_enable)()
        rows, self.width = self.model.get_input_embeddings().weight.shape
        self.vocab = _vocab(model_config, rows, source)
        self.tokenizer = load_tokenizer(tokenizer, folder)
        apply_lora(self.model, lora)
        self._logit_scale = _logit_scale(model_config)
        self._logit_cap = getattr(model_config, "final_logit_softcapping", None)
        rope = str(getattr(model_config, "rope_parameters", None))
        self._dynamic_rope = "dynamic" in rope or "longrope" in rope

    @property
    def lora(self) -> nn.Module:
        """The live LoRA pairs, by the model's names; empty where there are none."""
        return lora_module(self.model)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., W)."""
        embeds: Tensor = self.model.get_input_embeddings()(tokens)
        return embeds

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., W) -> logits (..., V), with the model's own scale and cap."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        cap = self._logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Embeddings (B, K, W) at positions (B, K) -> hidden states (B, K, W)."""
        mask = context.mask(positions, causal=True)
        assert mask is not None
        # transformers adds the mask to the scores: 0 where a query may attend
        lowest = torch.finfo(embeds.dtype).min
        bias = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device)
        lock: AbstractContextManager[Any] = (
            _DYNAMIC_ROPE_LOCK if self._dynamic_rope else nullcontext()
        )
        with lock:
            out = self.model.base_model(
                inputs_embeds=embeds,
                attention_mask=bias.masked_fill(~mask, lowest)[:, None],
                position_ids=positions,
                past_key_values=None if context.kv_cache is None else _CacheAdapter(context),
                use_cache=False,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Causal:
        """Move or cast, but keep RoPE's frequencies in float32; bfloat16 blurs far positions."""
        exact = {name: b for name, b in self.model.named_buffers() if b.dtype == torch.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, now in list(self.model.named_buffers()):
            if name in exact and now.dtype != torch.float32:
                parent, _, field = name.rpartition(".")
                setattr(self.model.get_submodule(parent), field, exact[name].to(now.device))
        return self


class _CacheAdapter:
    """diffa's KV cache as transformers' ``Cache``: (B, H, K, D) in, (B, H, S, D) out."""

    is_compileable = False

    def __init__(self, context: AttentionContext) -> None:
        self._context = context

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._context.update_cache(
            layer_idx, key_states.transpose(1, 2), value_states.transpose(1, 2)
        )
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # the caller always passes positions


def _text_config(fields: Mapping[str, Any], source: str) -> Any:
    from transformers import AutoConfig

    model_type = fields.get("model_type")
    # A checkpoint's own choice of attention can name code on the Hub.
    unused = ("model_type", "auto_map", "attn_implementation", "_attn_implementation")
    options = {key: value for key, value in fields.items() if key not in unused}
    try:
        return AutoConfig.for_model(model_type, **options).get_text_config()
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise SpecError(
            f"{source}: transformers knows no model_type {model_type!r}, or not with these fields "
            f"({reason}); diffa runs no remote code"
        ) from error


def _max_length(config: Any, source: str) -> int:
    """Return the longest sequence for which every layer's attention is fully causal."""
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unsupported := sorted(layer_types - _ATTENTION_LAYERS):
        raise CheckpointError(
            f"{source}: layers of {', '.join(unsupported)} keep a recurrent state; "
            "choose a model with attention alone"
        )
    lengths = [int(getattr(config, "max_position_embeddings", None) or 2048)]
    slides = getattr(config, "use_sliding_window", True) and layer_types != {"full_attention"}
    if slides and getattr(config, "sliding_window", None):
        lengths.append(int(config.sliding_window))
    if "chunked_attention" in layer_types and getattr(config, "attention_chunk_size", None):
        lengths.append(int(config.attention_chunk_size))
    return min(lengths)


def _load_model(config: Any, folder: Path | None, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        if folder is None or weights.is_meta():
            with torch.random.fork_rng(devices=[]):
                if not weights.is_meta():
                    torch.manual_seed(seed)
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:300]
        raise CheckpointError(f"{folder or 'config'}: no causal model here: {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder} lacks weights: {', '.join(missing[:6])}")
    weights.check_weights(dict(model.named_parameters()), source=str(folder))
    return model


def _check_supported(model: PreTrainedModel, source: str) -> None:
    """Refuse recurrent models, and those that take no positions or masks."""
    parameters = set(inspect.signature(model.base_model.forward).parameters)
    required = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values"}
    missing = sorted(required - parameters)
    if missing or getattr(model, "_is_stateful", False):
        reason = f"takes no {', '.join(missing)}" if missing else "keeps a recurrent state"
        raise CheckpointError(f"{source}: {type(model).__name__} {reason}; choose another model")


def _vocab(config: Any, rows: int, source: str) -> Vocab:
    # Llama 3 lists several ends; the last one closes a turn of its chat template.
    eos = getattr(config, "eos_token_id", None)
    eos = eos[-1] if isinstance(eos, list) else eos
    if eos is None:
        raise CheckpointError(f"{source}: the configuration lacks eos_token_id")
    pad = getattr(config, "pad_token_id", None)
    # -1 means none in some configurations
    return Vocab(rows, eos, pad if pad is not None and 0 <= pad < rows else eos, None)


def _logit_scale(config: Any) -> float:
    """Return the factor of the logits: Cohere's, or the inverse of Granite's."""
    factor = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    scale = float(factor or 1.0) / float(divisor or 1.0)
    return scale if math.isfinite(scale) else 1.0
