"""Writers that run here: a local model of transformers, and a spec's own diffusion backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from diffa.data.samples import DataError
from diffa.data.synthesis.writers import Conversation, Reply
from diffa.errors import SpecError, describe

if TYPE_CHECKING:
    from diffa.model import Model


class TransformersWriter:
    """A causal language model of transformers with a chat template, from a folder or the Hub.

    Args:
        checkpoint: folder, or id on the Hub.
        max_tokens: of a reply.
        batch: conversations at once.
        device: where it runs.
        dtype: of its weights; ``auto`` as saved.
        template: further variables of the chat template (Qwen3: ``enable_thinking``).
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        max_tokens: int = 512,
        batch: int = 8,
        device: str = "cpu",
        dtype: str = "auto",
        template: dict[str, Any] | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            # Without the option transformers asks whether to run the checkpoint's own code.
            self.tokenizer = AutoTokenizer.from_pretrained(
                checkpoint, padding_side="left", trust_remote_code=False
            )
            self.model = AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=dtype, trust_remote_code=False
            )
        except Exception as error:  # damaged files raise many types
            raise DataError(
                f"{checkpoint} is no language model that loads: {describe(error)}"
            ) from error
        if not self.tokenizer.chat_template:
            raise DataError(f"{checkpoint} has no chat template: take an instruction-tuned model")
        self.model.to(device).eval()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.name, self.batch, self.template = checkpoint, batch, dict(template or {})
        self.settings = {"max_tokens": max_tokens, "template": self.template}

    def write(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """Yield greedy replies, batch by batch."""
        for first in range(0, len(conversations), self.batch):
            for place, reply in enumerate(self._replies(conversations[first : first + self.batch])):
                yield first + place, reply

    def _prompt(self, turns: Conversation) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    tokenize=False,
                    add_generation_prompt=True,
                    **self.template,
                )
            )
        except Exception as error:  # templates raise errors of their own, and Jinja's
            raise DataError(f"the chat template of {self.name} fails: {describe(error)}") from error

    def _replies(self, conversations: Sequence[Conversation]) -> list[Reply]:
        import torch

        texts = [self._prompt(turns) for turns in conversations]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        batch = {k: batch[k].to(self.model.device) for k in ("input_ids", "attention_mask")}
        most = self.settings["max_tokens"]
        with torch.no_grad():
            output = self.model.generate(
                **batch,
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        tokens = output[:, batch["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Reply(text) if (text := one.strip()) else _nothing() for one in texts]


class DiffusionWriter:
    """The language model of a spec, asked in text alone: its own words train its adapters.

    DIFFA's self-distillation: answers that the frozen backbone has rewritten are answers it
    would give, so adapters need not teach it another style.

    Args:
        model: of ``diffa.build`` or ``diffa.load``.
        max_tokens: length of a reply's canvas.
        batch: conversations at once.
    """

    def __init__(self, model: Model, *, max_tokens: int = 128, batch: int = 8) -> None:
        from diffa.chat import Chat

        if model.backbone.tokenizer is None:
            raise SpecError("the backbone has no tokenizer: it cannot be asked in words")
        self.model, self.batch = model, batch
        self.chat = Chat(model.backbone.tokenizer, system="", user="{question}")
        self.name = model_name(model)
        self.settings = {"max_tokens": max_tokens}

    def write(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """Yield replies batch by batch, drawn (where the sampler draws) from seed 0."""
        for first in range(0, len(conversations), self.batch):
            prompts = [self._prompt(turns) for turns in conversations[first : first + self.batch]]
            generation = self.model.generate(prompts, max_tokens=self.settings["max_tokens"])
            for place, tokens in enumerate(generation.tokens):
                text = self.chat.decode(tokens)
                yield first + place, Reply(text) if text else _nothing()

    def _prompt(self, turns: Conversation) -> Any:
        texts = {turn["role"]: turn["content"] for turn in turns}
        if len(texts) != len(turns) or set(texts) - {"system", "user"}:
            raise DataError("a backbone is asked one question, with at most a system prompt before")
        return self.chat.encode(texts["user"], system=texts.get("system", ""), audio=False).tokens


def model_name(model: Model) -> str:
    """Return a name for a model's spec and its backbone's weights."""
    import hashlib

    digest = hashlib.blake2b(digest_size=4)
    for values in model.backbone.parameters():
        # The beginning of each weight is enough: training moves them all.
        digest.update(values.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return f"spec:{model.spec.digest()}-{digest.hexdigest()}"


def _nothing() -> Reply:
    return Reply(fault="the model said nothing")
