"""Any autoregressive language model of transformers, through the slots that samplers drive."""

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

from diffa.backbones import lora as adaptation
from diffa.backbones.tokenizer import read_tokenizer
from diffa.checkpoints import read as weights
from diffa.errors import CheckpointError, SpecError
from diffa.types import Vocab

if TYPE_CHECKING:
    from diffa.canvas.kv_cache import AttentionContext

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")

# Transformers keeps RoPE's frequencies on the module and changes them with the length of the input
# where they depend on it: threads that share such a model take turns.
_TURN = threading.Lock()


class Causal(nn.Module):
    """An autoregressive model that ``AutoModelForCausalLM`` knows; no remote code is run.

    Keys and values live in diffa's memory, positions and masks are the canvas's, so rows of
    different lengths share a batch. Models with a recurrent state are refused; where attention
    slides, ``context`` is its window, within which it equals full attention.

    Args:
        checkpoint: a folder or Hub id.
        revision: of the Hub repository.
        config: instead of a checkpoint, a ``config.json`` as a mapping with its ``model_type``;
            weights are then drawn from ``seed``.
        tokenizer: folder or Hub id of the tokenizer; the checkpoint's own where None.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        lora: LoRA pairs, new or saved, live: see ``lora.Options``; on every linear layer but the
            head where it does not say.
        seed: of the weights where there is no checkpoint.

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
        folder, found = weights.resolve_config(checkpoint, revision, config)
        source = str(folder or "config")
        settings = _settings(found, source)
        self.max_length = _max_length(settings, source)
        self.model = _make(settings, folder, seed)
        _check(self.model, source)
        if gradient_checkpointing:
            # renamed in transformers 5.x; the old name goes in 6
            name = "activation_checkpointing_enable"
            getattr(self.model, name, self.model.gradient_checkpointing_enable)()
        rows, self.width = self.model.get_input_embeddings().weight.shape
        self.vocab = _vocab(settings, rows, source)
        self.tokenizer = read_tokenizer(tokenizer, folder)
        adaptation.adapt(self.model, lora)
        self._scale = _scale(settings)
        self._cap = getattr(settings, "final_logit_softcapping", None)
        rope = getattr(settings, "rope_parameters", None) or {}
        self._changes = "dynamic" in str(rope) or "longrope" in str(rope)

    @property
    def lora(self) -> nn.Module:
        """The live LoRA pairs, by the model's names; empty where there are none."""
        return adaptation.view(self.model)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> embeddings (..., W), as the model's body takes them."""
        embedded: Tensor = self.model.get_input_embeddings()(tokens)
        return embedded

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., W) -> logits (..., V), with the model's own scale and cap."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def forward(self, embeds: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Embeddings (B, K, W) at positions (B, K) -> hidden states (B, K, W)."""
        seen = context.mask(positions, causal=True)
        assert seen is not None
        lowest = torch.finfo(embeds.dtype).min
        bias = torch.zeros(seen.shape, dtype=embeds.dtype, device=embeds.device)
        turn: AbstractContextManager[Any] = _TURN if self._changes else nullcontext()
        with turn:
            out = self.model.base_model(
                inputs_embeds=embeds,
                attention_mask=bias.masked_fill(~seen, lowest)[:, None],
                position_ids=positions,
                past_key_values=None if context.kv_cache is None else _Slots(context),
                use_cache=False,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Causal:
        """Move or cast, but keep RoPE's frequencies in float32: bfloat16 blurs far positions."""
        exact = {name: b for name, b in self.model.named_buffers() if b.dtype == torch.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, now in list(self.model.named_buffers()):
            if name in exact and now.dtype != torch.float32:
                parent, _, field = name.rpartition(".")
                setattr(self.model.get_submodule(parent), field, exact[name].to(now.device))
        return self


class _Slots:
    """diffa's memory where transformers expects a cache: (B, H, K, D) in, all slots out."""

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
        return 0  # positions are always given


def _settings(found: Mapping[str, Any], source: str) -> Any:
    from transformers import AutoConfig

    kind = found.get("model_type")
    options = {key: value for key, value in found.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(kind, **options).get_text_config()
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise SpecError(
            f"{source}: transformers knows no model_type {kind!r}, or not with these fields "
            f"({reason}); diffa runs no remote code"
        ) from error


def _max_length(settings: Any, source: str) -> int:
    """Return the longest sequence for which every layer's attention is plainly causal."""
    kinds = set(getattr(settings, "layer_types", None) or ())
    if strange := sorted(kinds - set(_ATTENTION)):
        raise CheckpointError(
            f"{source}: layers of {', '.join(strange)} keep a state that slots cannot share; "
            "choose a model with attention alone"
        )
    most = int(getattr(settings, "max_position_embeddings", None) or 2048)
    sliding = getattr(settings, "sliding_window", None)
    if sliding and getattr(settings, "use_sliding_window", True) and kinds != {"full_attention"}:
        most = min(most, int(sliding))
    chunk = getattr(settings, "attention_chunk_size", None)
    return min(most, int(chunk)) if chunk and "chunked_attention" in kinds else most


def _make(settings: Any, folder: Path | None, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        if folder is None or weights.is_meta():
            with torch.random.fork_rng(devices=[]):
                if not weights.is_meta():
                    torch.manual_seed(seed)
                return AutoModelForCausalLM.from_config(settings).eval()
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:300]
        raise CheckpointError(f"{folder or 'config'}: no causal model here: {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder} lacks weights: {', '.join(missing[:6])}")
    return model


def _check(model: Any, source: str) -> None:
    """Refuse models that cannot be driven by slots: recurrent ones, or without positions."""
    takes = set(inspect.signature(model.base_model.forward).parameters)
    needed = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values"}
    lacks = sorted(needed - takes)
    if lacks or getattr(model, "_is_stateful", False):
        why = f"takes no {', '.join(lacks)}" if lacks else "keeps a recurrent state"
        raise CheckpointError(f"{source}: {type(model).__name__} {why}; choose another model")


def _vocab(settings: Any, rows: int, source: str) -> Vocab:
    # several ends are listed from the text's to the turn's, as Llama 3 does
    eos = getattr(settings, "eos_token_id", None)
    eos = eos[-1] if isinstance(eos, list) else eos
    if eos is None:
        raise CheckpointError(f"{source}: the configuration lacks eos_token_id")
    pad = getattr(settings, "pad_token_id", None)
    # some configurations say -1 for none
    return Vocab(rows, eos, pad if pad is not None and 0 <= pad < rows else eos, None)


def _scale(settings: Any) -> float:
    """Return what multiplies the logits: Cohere's factor, or one over Granite's."""
    scale = getattr(settings, "logit_scale", None)
    divisor = getattr(settings, "logits_scaling", None)
    chosen = float(scale or 1.0) / float(divisor or 1.0)
    return chosen if math.isfinite(chosen) else 1.0
