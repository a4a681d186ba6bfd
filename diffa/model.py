"""Model: an encoder, adapters, a backbone, a sampler and an objective that work as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffa.audio import as_batch, pad, prepare
from diffa.canvas.batch import (
    CanvasInputs,
    RowTensors,
    check_context_length,
    concat_embeds,
    forward_rows,
    make_canvas,
    unpad_embeds,
    validate_inputs,
)
from diffa.canvas.canvas import Canvas
from diffa.canvas.denoiser import Denoiser
from diffa.canvas.kv_cache import AttentionContext
from diffa.canvas.likelihood import ChoiceScores, score_choices
from diffa.canvas.training import compute_loss
from diffa.chat import Chat
from diffa.errors import SpecError
from diffa.spec.spec import Spec
from diffa.types import Answer, Embeds, Features, Generation, Loss, Step, max_length


class Model(nn.Module):
    """An encoder, adapters, a backbone, a sampler and an objective that work as one.

    Attributes:
        spec: the resolved spec that the model was built from.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        adapters: Mapping[str, nn.Module],
        backbone: nn.Module,
        sampler: Any,
        objective: Any,
        spec: Spec,
    ) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.adapters = nn.ModuleDict(adapters)
        self.backbone: Any = backbone
        self.sampler, self.objective, self.spec = sampler, objective, spec

    @property
    def device(self) -> torch.device:
        """Where the backbone's weights are."""
        place: torch.device = next(self.backbone.parameters()).device
        return place

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone's weights."""
        precise: torch.dtype = next(self.backbone.parameters()).dtype
        return precise

    def listen(self, audio: Tensor, lengths: Tensor | None = None) -> Embeds:
        """Turn audio (S,) or (B, S) at ``encoder.sample_rate`` into embeddings, in spec order.

        Args:
            audio: float waveforms; rows shorter than S say so in ``lengths`` (B,), in samples.
            lengths: true samples per row; S where None.

        Raises:
            AudioError: audio that is empty, not finite or not a float waveform.
        """
        waves, lengths = as_batch(audio, lengths, self.encoder.sample_rate)
        return self.adapt(self.encoder(waves.to(self.device), lengths.to(self.device)))

    def adapt(self, features: Features) -> Embeds:
        """Concatenate every adapter's embeddings of the features, in the spec's order."""
        return concat_embeds([adapter(features) for adapter in self.adapters.values()])

    def logits(self, embeds: Tensor) -> Tensor:
        """Logits (B, S, V) of one full pass over embeddings (B, S, W), positions from 0."""
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        logits: Tensor = self.backbone.head(self.backbone(embeds, positions, AttentionContext()))
        return logits

    def generate(
        self,
        prompt: Tensor | Sequence[Tensor],
        audio: RowTensors = None,
        *,
        audio_at: int | Sequence[int] | None = None,
        max_tokens: int = 128,
        seeds: int | Sequence[int] | None = None,
        draft: RowTensors = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Generation:
        """Answer prompts of token ids (L,), one or a list, with the spec's sampler.

        Args:
            prompt: token ids (L,), or a list of such.
            audio: a waveform (S,), a list with one waveform or None per prompt, or None.
            audio_at: index in the prompt before which the audio goes, one or one per row; 0 where
                None.
            max_tokens: length of every answer.
            seeds: one seed or one per row for samplers that draw; 0 where None.
            draft: token ids (up to ``max_tokens``) that the answer begins with, or a list with one
                such or None per prompt. Mask ids, and what lies behind, are to be decided; whether
                the others may be changed is up to the sampler (``revise``).
            on_step: called with every ``Step`` as the answers form.

        Raises:
            AudioError: unusable audio, or too much of it for the backbone's context.
            SpecError: arguments that do not fit together.
        """
        asked = validate_inputs(
            self.backbone.vocab, prompt, audio, audio_at, max_tokens, seeds, draft
        )
        canvas, denoise = self._open(asked)
        with torch.no_grad():
            for step in self.sampler(canvas, denoise):
                if on_step is not None:
                    on_step(step)
        return Generation([row.clone() for row in canvas.answer.cpu()], denoise.num_forwards)

    def stream(
        self,
        prompt: Tensor | Sequence[Tensor],
        audio: RowTensors = None,
        *,
        audio_at: int | Sequence[int] | None = None,
        max_tokens: int = 128,
        seeds: int | Sequence[int] | None = None,
        draft: RowTensors = None,
    ) -> Iterator[Step]:
        """Like ``generate``, yielding a ``Step`` after every forward as the answers form."""
        asked = validate_inputs(
            self.backbone.vocab, prompt, audio, audio_at, max_tokens, seeds, draft
        )
        canvas, denoise = self._open(asked)
        steps = self.sampler(canvas, denoise)
        while True:
            with torch.no_grad():  # not held while the caller works between two steps
                step = next(steps, None)
            if step is None:
                return
            yield step

    def answer(
        self,
        audio: Any,
        question: str | Sequence[str],
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Answer:
        """Answer a question about a recording, or a list of questions about a list of them.

        Args:
            audio: path, or waveform at ``encoder.sample_rate``; a list of these for a batch; None
                for a question without a recording.
            question: one question, or one per recording.
            system: instead of the spec's system turn.
            max_tokens: length of the answers; the spec's ``prompt.max_tokens`` where None.
            on_step: called with every ``Step`` as the answers form.

        Raises:
            AudioError: unusable audio, or too much of it for the backbone's context.
            SpecError: the backbone has no tokenizer, or the lists differ in length.
        """
        single = isinstance(question, str)
        questions = [question] if isinstance(question, str) else list(question)
        heard = [audio] if single else list(audio)
        if len(heard) != len(questions):
            raise SpecError(f"{len(heard)} recordings but {len(questions)} questions")
        waves = [None if a is None else prepare(a, self.encoder.sample_rate) for a in heard]
        chat = self.chat_format
        prompts = [
            chat.encode(q, system=system, audio=wave is not None)
            for q, wave in zip(questions, waves, strict=True)
        ]
        made = self.generate(
            [prompt.tokens for prompt in prompts],
            waves,
            audio_at=[prompt.audio_at or 0 for prompt in prompts],
            max_tokens=self.spec.data["prompt"]["max_tokens"] if max_tokens is None else max_tokens,
            on_step=on_step,
        )
        texts = [chat.decode(tokens) for tokens in made.tokens]
        if single:
            return Answer(texts[0], made.tokens[0], made.num_forwards)
        return Answer(texts, made.tokens, made.num_forwards)

    def score(
        self,
        audio: Any,
        question: str,
        choices: Sequence[str],
        *,
        system: str | None = None,
        samples: int = 128,
        seed: int = 0,
        batch: int = 16,
    ) -> ChoiceScores:
        """Measure how likely each of some answers is, without decoding: ``Score.best`` answers a
        multiple-choice question.

        Args:
            audio: path, waveform at ``encoder.sample_rate``, or None.
            question: about the recording.
            choices: answers to compare.
            system: instead of the spec's system turn.
            samples: draws per answer of more than one token, the same for all of them.
            seed: of the draws.
            batch: rows per forward.

        Raises:
            AudioError: unusable audio.
            SpecError: the backbone has no tokenizer, or there is nothing to score.
        """
        wave = None if audio is None else prepare(audio, self.encoder.sample_rate)
        prompt = self.chat_format.encode(question, system=system, audio=wave is not None)
        ids = [self.backbone.tokenizer(c, add_special_tokens=False)["input_ids"] for c in choices]
        with torch.no_grad():
            return score_choices(
                self.backbone,
                prompt.tokens.to(self.device),
                self._hear([wave])[0],
                prompt.audio_at or 0,
                [torch.tensor(choice, dtype=torch.long) for choice in ids],
                samples=samples,
                seed=seed,
                batch=batch,
            )

    @property
    def chat_format(self) -> Chat:
        """The chat prompts of this model's spec; raises SpecError without a tokenizer."""
        if self.backbone.tokenizer is None:
            raise SpecError(
                "the backbone has no tokenizer: give it one (backbone.tokenizer: FOLDER), "
                "or use model.generate with token ids"
            )
        turns = self.spec.data["prompt"]
        return Chat(self.backbone.tokenizer, system=turns["system"], user=turns["user"])

    def loss(
        self,
        tokens: Tensor,
        answer: Tensor,
        seeds: Tensor,
        *,
        lengths: Tensor,
        audio_at: Tensor | None = None,
        audio: tuple[Tensor, Tensor] | None = None,
        features: Features | None = None,
        owner: Tensor | None = None,
        reading: Callable[..., Tensor] = forward_rows,
    ) -> Loss:
        """Corrupt answers, run the model with gradients, and measure the objective.

        Args:
            tokens: prompts and answers (B, L), padded at the end.
            answer: which tokens belong to the answer, (B, L) bool.
            seeds: one per row, for the corruption, (B,).
            lengths: true tokens per row, (B,).
            audio_at: index before which each row's audio goes, (B,); 0 where None.
            audio: waveforms (B, S) with lengths (B,) in samples; or
            features: what the frozen encoder made of them; neither for text alone.
            owner: which recording each row is about, (B,), where several rows share one.
            reading: how the backbone reads the rows; see ``inputs.read``.
        """
        if features is None and audio is not None:
            features = self.encoder(*audio)
        heard = None if features is None else self.adapt(features)
        rows = None if heard is None else unpad_embeds(heard)
        if rows is not None and owner is not None:
            rows = [rows[i] for i in owner.tolist()]
        return compute_loss(
            self.backbone,
            self.objective,
            tokens,
            answer,
            seeds,
            lengths=lengths,
            heard=rows,
            audio_at=audio_at,
            reading=reading,
        )

    def _open(self, asked: CanvasInputs) -> tuple[Canvas, Denoiser]:
        """Listen, and lay out the canvas with the call that drives it."""
        rate, most = self.encoder.sample_rate, max_length(self.backbone)
        with torch.no_grad():
            heard = self._hear(asked.waves)
            for tokens, sound, wave in zip(asked.prompts, heard, asked.waves, strict=True):
                count = 0 if sound is None else len(sound)
                seconds = 0.0 if wave is None else len(wave) / rate
                check_context_length(len(tokens), count, asked.answer.shape[1], seconds, most)
            canvas = make_canvas(self.backbone, asked, heard)
        return canvas, Denoiser(self.backbone, canvas)

    def _hear(self, waves: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Embeddings (N, W) of each row's audio; None for a row without."""
        spoken = [prepare(wave, self.encoder.sample_rate) for wave in waves if wave is not None]
        heard = iter(unpad_embeds(self.listen(*pad(spoken))) if spoken else ())
        return [None if wave is None else next(heard) for wave in waves]
