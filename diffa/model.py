"""Model: an encoder, adapters, a backbone, a sampler and an objective that work as one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffa.audio import as_batch, pad, prepare, probe
from diffa.canvas.batch import (
    CanvasInputs,
    RowTensors,
    check_context_length,
    concat_embeds,
    forward_rows,
    make_canvas,
    per_row_tensors,
    unpad_embeds,
    validate_inputs,
)
from diffa.canvas.canvas import Canvas
from diffa.canvas.denoiser import Denoiser
from diffa.canvas.kv_cache import AttentionContext
from diffa.canvas.likelihood import ChoiceScores, score_choices
from diffa.canvas.prefix_cache import PrefixCache
from diffa.canvas.streaming import Streamer, StreamerFeed
from diffa.canvas.training import compute_loss
from diffa.chat import Chat
from diffa.errors import SpecError, check_at_least
from diffa.runtime.files import expand
from diffa.spec.spec import Spec
from diffa.spec.validation import TRANSCRIBE
from diffa.transcripts import transcribe
from diffa.types import (
    Answer,
    Embeds,
    Features,
    Generation,
    Loss,
    Objective,
    Sampler,
    Step,
    max_length,
)

if TYPE_CHECKING:
    from diffa.types import BackboneModule, EncoderModule


log = logging.getLogger(__name__)
_CERTAIN = 0.9  # of an estimated number of embeddings, which can be wrong by a few


@functools.cache
def _warn_of_rate(rate: int) -> None:
    log.warning(
        "a waveform without a sample rate is taken to have %d samples per second: give "
        "sample_rate=, or (waveform, rate)",
        rate,
    )


class Model(nn.Module):
    """An encoder, adapters, a backbone, a sampler and an objective that work as one.

    Attributes:
        encoder: Turns audio into features.
        adapters: Turn features into embeddings, by name, in the spec's order.
        backbone: The language model.
        sampler: Decodes answers.
        objective: Defines the training loss.
        spec: The resolved spec that the model was built from.
    """

    encoder: EncoderModule
    backbone: BackboneModule

    def __init__(
        self,
        *,
        encoder: EncoderModule,
        adapters: Mapping[str, nn.Module],
        backbone: BackboneModule,
        sampler: Sampler,
        objective: Objective,
        spec: Spec,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapters = nn.ModuleDict(adapters)
        self.backbone = backbone
        self.sampler, self.objective, self.spec = sampler, objective, spec

    @property
    def device(self) -> torch.device:
        """Device of the backbone's weights."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone's weights."""
        return next(self.backbone.parameters()).dtype

    def listen(self, audio: Tensor, lengths: Tensor | None = None) -> Embeds:
        """Return the embeddings of audio (S,) or (B, S) at ``encoder.sample_rate``.

        Args:
            audio: Float waveforms, padded at the end.
            lengths: True samples per row, (B,). Default: S.

        Raises:
            AudioError: The audio is empty, not finite or not a float waveform.
        """
        waves, lengths = as_batch(audio, lengths, self.encoder.sample_rate)
        return self.adapt(self.encoder(waves.to(self.device), lengths.to(self.device)))

    def adapt(self, features: Features) -> Embeds:
        """Return every adapter's embeddings of the features, concatenated in the spec's order."""
        return concat_embeds([adapter(features) for adapter in self.adapters.values()])

    def logits(self, embeds: Tensor) -> Tensor:
        """Return the logits (B, S, V) of one pass over embeddings (B, S, W), positions from 0."""
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        return self.backbone.head(self.backbone(embeds, positions, AttentionContext()))

    def generate(
        self,
        prompt: Tensor | Sequence[Tensor],
        audio: RowTensors = None,
        *,
        audio_at: int | Sequence[int] | None = None,
        max_tokens: int = 128,
        seeds: int | Sequence[int] | None = None,
        draft: RowTensors = None,
        embeds: RowTensors = None,
        prefix_cache: PrefixCache | None = None,
        on_step: Callable[[Step], None] | None = None,
        streamer: Streamer | None = None,
    ) -> Generation:
        """Answer prompts of token ids with the spec's sampler.

        Args:
            prompt: Token ids (L,), or a list of such.
            audio: A waveform (S,), a list with one waveform or None per prompt, or None.
            audio_at: Index in the prompt before which the audio goes, one or one per row.
                Default: 0.
            max_tokens: Length of every answer, in tokens.
            seeds: One seed or one per row for samplers that draw. Default: 0.
            draft: Token ids (up to ``max_tokens``) that the answer begins with, or a list with one
                such or None per prompt. Mask ids and the rest of the answer are decoded; whether
                the sampler may change the others depends on it (``revise`` does).
            embeds: Vectors (N, W) of the backbone's width in place of a recording, or a list with
                one such or None per prompt.
            prefix_cache: Keeps what was computed for recordings and prompts for later questions.
            on_step: Called with every ``Step`` as the answers form.
            streamer: A streamer of transformers, for one prompt.

        Raises:
            AudioError: Unusable audio, or too much of it for the backbone's context.
            DecodingError: The logits are not finite, or the sampler does not end.
            SpecError: Arguments that do not fit together.
        """
        inputs = validate_inputs(
            self.backbone.vocab, prompt, audio, audio_at, max_tokens, seeds, draft
        )
        feed = None if streamer is None else StreamerFeed(streamer, len(inputs.prompts))
        canvas, denoise = self._prepare(inputs, embeds, prefix_cache)
        with torch.no_grad():
            for step in self.sampler(canvas, denoise):
                if on_step is not None:
                    on_step(step)
                if feed is not None:
                    feed.put(step)
        denoise.check_finite()
        if prefix_cache is not None:
            prefix_cache.store(canvas, denoise.kv_cache)
        if feed is not None:
            feed.end()
        tokens = [row.clone() for row in canvas.answer[:, : canvas.requested].cpu()]
        return Generation(tokens, denoise.num_forwards, canvas.mean_log_probs())

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
        """Yield a ``Step`` after every forward pass; the arguments are those of ``generate``."""
        inputs = validate_inputs(
            self.backbone.vocab, prompt, audio, audio_at, max_tokens, seeds, draft
        )
        canvas, denoise = self._prepare(inputs)
        steps = self.sampler(canvas, denoise)
        while True:
            with torch.no_grad():  # not held while the caller works between two steps
                step = next(steps, None)
            if step is None:
                denoise.check_finite()
                return
            yield step

    def answer(
        self,
        audio: Any,
        question: str | Sequence[str],
        *,
        sample_rate: int | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
        trim: bool = True,
        prefix_cache: PrefixCache | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Answer:
        """Answer a question about a recording, or questions about one or several of them.

        Args:
            audio: Path, bytes, binary file, waveform, ``(waveform, rate)``, or what ``datasets``
                hands out; a list of these for a batch. None: a question without a recording.
            question: One question, or several: about the same recording, or one per recording.
            sample_rate: Samples per second of waveforms without a rate of their own. Default: the
                encoder's, with a warning.
            system: Override the spec's system prompt.
            max_tokens: Length of the answers. Default: the spec's ``prompt.max_tokens``.
            trim: Let the chat template strip whitespace around the question.
            prefix_cache: Keeps what was computed for recordings and prompts: a second question
                about a recording does not encode it again, and a block-causal backbone does not
                read it again.
            on_step: Called with every ``Step`` as the answers form.

        Raises:
            AudioError: Unusable audio, or too much of it for the backbone's context.
            SpecError: The backbone has no tokenizer, or the lists differ in length.
        """
        single = isinstance(question, str)
        questions = [question] if isinstance(question, str) else list(question)
        several = isinstance(audio, list) or (isinstance(audio, Tensor) and audio.dim() == 2)
        recordings = [audio] * len(questions) if single or not several else list(audio)
        if len(recordings) != len(questions):
            raise SpecError(f"{len(recordings)} recordings but {len(questions)} questions")
        if max_tokens is None:
            max_tokens = int(self.spec.data["prompt"]["max_tokens"])
        for recording in recordings:
            if isinstance(recording, str | Path):  # an hour is refused before it is decoded
                self.check_duration(probe(expand(recording)).seconds, max_tokens)
        waves = [None if a is None else self._waveform(a, sample_rate) for a in recordings]
        chat = self.chat_format
        prompts = [
            chat.encode(q, system=system, audio=wave is not None, trim=trim)
            for q, wave in zip(questions, waves, strict=True)
        ]
        generation = self.generate(
            [prompt.tokens for prompt in prompts],
            waves,
            audio_at=[prompt.audio_at or 0 for prompt in prompts],
            max_tokens=max_tokens,
            prefix_cache=prefix_cache,
            on_step=on_step,
        )
        texts = [chat.decode(tokens) for tokens in generation.tokens]
        if single:
            return Answer(
                texts[0], generation.tokens[0], generation.num_forwards, generation.confidence[0]
            )
        return Answer(texts, *generation)

    def transcribe(
        self,
        audio: Any,
        *,
        sample_rate: int | None = None,
        instruction: str = TRANSCRIBE,
        max_seconds: float | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
    ) -> Any:
        """Return the transcript of a recording of any length, or those of a list of recordings.

        Recordings are cut at silences, and the parts are answered in batches.

        Args:
            audio: A recording in any form that ``answer`` takes, or a list of them.
            sample_rate: Samples per second of waveforms without a rate of their own.
            instruction: What the model is asked about each part.
            max_seconds: Longest part. Default: the encoder's window, at most 30 seconds.
            batch_size: Parts per batch.
            max_tokens: Length of each part's transcript. Default: the spec's.

        Returns:
            A ``Transcript`` with its segments; a list of them for a list.

        Raises:
            AudioError: Unusable audio.
            SpecError: The backbone has no tokenizer, or a number is out of its range.
        """
        check_at_least(1, batch_size=batch_size)
        limit = min(self.window_seconds or 30.0, 30.0) if max_seconds is None else max_seconds
        several = isinstance(audio, list) or (isinstance(audio, Tensor) and audio.dim() == 2)
        transcripts = [
            transcribe(
                self,
                self._waveform(recording, sample_rate),
                instruction,
                max_seconds=limit,
                batch_size=batch_size,
                max_tokens=max_tokens,
            )
            for recording in (audio if several else [audio])
        ]
        return transcripts if several else transcripts[0]

    @property
    def window_seconds(self) -> float:
        """Seconds that the encoder pads every recording to; 0 without a window."""
        config = getattr(getattr(self.encoder, "encoder", None), "config", None)
        return float(getattr(config, "max_source_positions", 0)) / float(self.encoder.out.rate)

    def score(
        self,
        audio: Any,
        question: str,
        choices: Sequence[str],
        *,
        sample_rate: int | None = None,
        system: str | None = None,
        trim: bool = True,
        samples: int = 128,
        seed: int = 0,
        batch: int = 16,
    ) -> ChoiceScores:
        """Return the log-likelihood of each of some answers, without decoding.

        Args:
            audio: Path, waveform at ``encoder.sample_rate``, or None.
            question: Question about the recording.
            choices: Answers to compare; ``best`` of the result is the likeliest.
            system: Override the spec's system prompt.
            trim: Let the chat template strip whitespace around the question.
            samples: Draws per answer of more than one token, the same for all of them.
            seed: Seed of the draws.
            batch: Rows per forward pass.

        Raises:
            AudioError: Unusable audio.
            SpecError: The backbone has no tokenizer, or there is nothing to score.
        """
        wave = None if audio is None else self._waveform(audio, sample_rate)
        prompt = self.chat_format.encode(question, system=system, audio=wave is not None, trim=trim)
        ids = [self.chat_format.ids(choice) for choice in choices]
        with torch.no_grad():
            return score_choices(
                self.backbone,
                prompt.tokens.to(self.device),
                self._encode_audio([wave])[0],
                prompt.audio_at or 0,
                [torch.tensor(choice, dtype=torch.long) for choice in ids],
                samples=samples,
                seed=seed,
                batch=batch,
            )

    @property
    def chat_format(self) -> Chat:
        """Format of this model's chat prompts; raises SpecError without a tokenizer."""
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
        embeds: Embeds | None = None,
        owner: Tensor | None = None,
        forward: Callable[..., Tensor] = forward_rows,
    ) -> Loss:
        """Corrupt answers, run the model with gradients, and return the objective's loss.

        Args:
            tokens: Prompts and answers (B, L), padded at the end.
            answer: Which tokens belong to the answer, (B, L) bool.
            seeds: Seeds of the corruption, (B,).
            lengths: True tokens per row, (B,).
            audio_at: Index before which each row's audio goes, (B,). Default: 0.
            audio: Waveforms (B, S) with lengths (B,) in samples.
            embeds: The adapters' embeddings, instead of ``audio``. Neither: text alone.
            owner: Which recording each row is about, (B,), where several rows share one.
            forward: Runs the backbone over the rows, with the arguments of ``forward_rows``.
        """
        if embeds is None and audio is not None:
            embeds = self.adapt(self.encoder(*audio))
        clips = None if embeds is None else unpad_embeds(embeds)
        if clips is not None and owner is not None:
            clips = [clips[i] for i in owner.tolist()]
        return compute_loss(
            self.backbone,
            self.objective,
            tokens,
            answer,
            seeds,
            lengths=lengths,
            audio_embeds=clips,
            audio_at=audio_at,
            forward=forward,
        )

    def _waveform(self, audio: Any, sample_rate: int | None) -> Tensor:
        """Return a user's recording at the encoder's rate; warn once of one without a rate."""
        rate: int = self.encoder.sample_rate
        if sample_rate is None and isinstance(audio, Tensor | np.ndarray):
            _warn_of_rate(rate)
        return prepare(audio, rate, sample_rate=sample_rate)

    def count_embeddings(self, seconds: float) -> int:
        """Return the number of audio embeddings of a recording of this duration, about."""
        if seconds <= 0:
            return 0
        frames = torch.tensor([max(1, round(seconds * self.encoder.out.rate))])
        adapters: Any = self.adapters
        return sum(int(adapter.out_lengths(frames)) for adapter in adapters.values())

    def check_duration(self, seconds: float, max_tokens: int) -> None:
        """Raise AudioError for a recording that is far too long for the context.

        Decoding and encoding an hour take minutes. What is too long by less is refused after
        encoding, by its true size. Encoders that cut recordings take any.
        """
        limit = max_length(self.backbone)
        cuts = any(getattr(part, "max_seconds", None) for part in self.encoder.modules())
        count = self.count_embeddings(seconds)
        if limit is not None and not cuts and _CERTAIN * count > limit:
            check_context_length(0, count, max_tokens, seconds, limit)

    def __repr__(self) -> str:
        """Show the parts with their parameters in millions, and how many of them are trained."""
        lines = [f"Model ({self.device}, spec {self.spec.digest()})"]
        for path, part in self.spec.parts().items():
            name = part.name if isinstance(part.name, str) else part.name.__name__
            weights = []
            if part.kind in ("encoder", "adapter", "backbone"):
                weights = list(self.get_submodule(path).parameters())
            total = sum(weight.numel() for weight in weights)
            trained = sum(weight.numel() for weight in weights if weight.requires_grad)
            count = f"{total / 1e6:10.2f} M  {trained / 1e6:8.2f} M trained" if weights else ""
            lines.append(f"  {path:20} {name:14}{count}".rstrip())
        return "\n".join(lines)

    def _prepare(
        self,
        inputs: CanvasInputs,
        embeds: RowTensors = None,
        prefix_cache: PrefixCache | None = None,
    ) -> tuple[Canvas, Denoiser]:
        """Encode the audio, and return the canvas with its ``denoise``."""
        limit = max_length(self.backbone)
        for wave in inputs.audio:
            if wave is not None:
                self.check_duration(len(wave) / self.encoder.sample_rate, inputs.answer.shape[1])
        with torch.no_grad():
            if prefix_cache is not None:
                prefix_cache.bind(self.backbone)
            audio_embeds = self._encode_audio(inputs.audio, prefix_cache)
            if embeds is not None:
                row_embeds = per_row_tensors(embeds, len(inputs.prompts), "embeds")
                audio_embeds = [
                    encoded if own is None else self._check_embeds(own, encoded)
                    for own, encoded in zip(row_embeds, audio_embeds, strict=True)
                ]
            for tokens, own, wave in zip(inputs.prompts, audio_embeds, inputs.audio, strict=True):
                count = 0 if own is None else len(own)
                seconds = 0.0 if wave is None else len(wave) / self.encoder.sample_rate
                check_context_length(len(tokens), count, inputs.answer.shape[1], seconds, limit)
            canvas = make_canvas(self.backbone, inputs, audio_embeds)
        denoise = Denoiser(self.backbone, canvas)
        if prefix_cache is not None and not getattr(self.sampler, "cfg_scale", 0):
            prefix_cache.load(canvas, denoise.kv_cache)
        return canvas, denoise

    def _check_embeds(self, embeds: Tensor, encoded: Tensor | None) -> Tensor:
        """Return a row's own vectors (N, W) in place of a recording."""
        if encoded is not None:
            raise SpecError("a row has both audio and embeds: give one of them")
        if embeds.dim() != 2 or embeds.shape[1] != self.backbone.width:
            shape, width = tuple(embeds.shape), self.backbone.width
            raise SpecError(f"embeds must be vectors (N, {width}), got the shape {shape}")
        return embeds.to(self.device, self.dtype)

    def _encode_audio(
        self, waves: Sequence[Tensor | None], prefix_cache: PrefixCache | None = None
    ) -> list[Tensor | None]:
        """Return embeddings (N, W) of each row's audio; None for a row without."""

        def encode(audio: list[Tensor]) -> list[Tensor]:
            return unpad_embeds(self.listen(*pad(audio))) if audio else []

        audio = [prepare(wave, self.encoder.sample_rate) for wave in waves if wave is not None]
        embeds = iter(encode(audio) if prefix_cache is None else prefix_cache.encode(audio, encode))
        return [None if wave is None else next(embeds) for wave in waves]
