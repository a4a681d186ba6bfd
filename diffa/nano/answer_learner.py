"""The learner ``nano-answers``: train small models by their objective and auxiliary losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffa.adapters.numbering import numbering_of
from diffa.canvas.batch import concat_embeds
from diffa.data.cache import FeatureCache
from diffa.data.collate import Batch
from diffa.data.rows import TrainingDataset
from diffa.errors import suggest
from diffa.nano.alignment import AlignmentLoss
from diffa.nano.auxiliary import (
    CTCLoss,
    TranscriptEmbedder,
    init_numbering,
    scale_to_embeddings,
    token_ids,
    word_numbers,
)
from diffa.nano.initialization import init_for_copying
from diffa.spec.schema import Report
from diffa.spec.spec import Spec
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.config import adapter_keys
from diffa.trainers.config_sections import (
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    StageConfig,
    check_range,
)
from diffa.trainers.learners.answers import AnswerLearner, audio_reader, batch_loss
from diffa.trainers.learners.base import BatchLoss, RowTransform
from diffa.trainers.packing import Packing
from diffa.types import Embeds

if TYPE_CHECKING:
    from diffa.model import Model

_RANGES = {
    "answer_padding": SHARE,
    "header_share": SHARE,
    "text_mixup": SHARE,
    "text_noise": NOT_NEGATIVE,
    "ctc": NOT_NEGATIVE,
    "ctc_logit_scale": POSITIVE,
    "embedding_match": NOT_NEGATIVE,
}


class NanoAnswerLearner(AnswerLearner):
    """Train a model by its objective, with what helps models of a few million parameters.

    Args:
        question_packing: Share of the batches whose questions about one recording share a row
            (``diffa.trainers.packing``).
        answer_padding: Share of the rows whose answer is padded to a random length that fits,
            not to the shortest.
        header_share: Share of the rows whose assistant header is part of the answer (DIFFA: 1).
        text_mixup: Share of the transcripts in place of audio that are mixed with the blank.
        text_noise: Largest noise on transcripts, relative to the embeddings' root mean square.
        blank_token: Token of an empty slot, in transcripts and as CTC's blank.
        ordinals: Words for "first", "second", ..., whose embeddings number the spoken words, in
            transcripts and at the start of adapters with ``word_numbers``.
        alignment: ``layer`` and ``weight`` of the alignment loss (``diffa.nano.alignment``).
        ctc: Weight of a CTC loss on each adapter, by key.
        ctc_readout: Read adapters by cosine with the embeddings, or by the frozen head.
        ctc_logit_scale: Factor of the cosine similarities.
        embedding_match: Weight of the distance of adapter outputs to their nearest embedding.
        match_scale: Adapters whose output is scaled to the embeddings before the first step.
        init_copying: Initialise the backbone's attention to copy (``diffa.nano.initialization``).
    """

    def __init__(
        self,
        model: Model,
        stage: StageConfig,
        cache: FeatureCache | None = None,
        *,
        question_packing: float = 0.0,
        answer_padding: float = 0.0,
        header_share: float = 1.0,
        text_mixup: float = 0.0,
        text_noise: float = 0.0,
        blank_token: str | None = None,
        ordinals: Sequence[str] = (),
        alignment: Mapping[str, float] | None = None,
        ctc: Mapping[str, float] | None = None,
        ctc_readout: Literal["embeddings", "head"] = "embeddings",
        ctc_logit_scale: float = 10.0,
        embedding_match: float = 0.0,
        match_scale: Sequence[str] = (),
        init_copying: bool = False,
    ) -> None:
        super().__init__(model, stage, cache, question_packing=question_packing)
        self.answer_padding, self.header_share = answer_padding, header_share
        self.match_scale, self.init_copying = match_scale, init_copying
        backbone = model.backbone
        self.blank = (
            None if blank_token is None else token_ids([blank_token], backbone.tokenizer)[0]
        )
        self.ordinals = token_ids(ordinals, backbone.tokenizer)
        self.transcripts = TranscriptEmbedder(
            backbone.embed,
            blank=self.blank,
            text_mixup=text_mixup,
            text_noise=text_noise,
            ordinals=self.ordinals,
        )
        self.ctc = None
        if ctc and self.blank is not None:
            self.ctc = CTCLoss(
                backbone.embed,
                ctc,
                blank=self.blank,
                logit_scale=ctc_logit_scale,
                embedding_match=embedding_match,
                head=backbone.head if ctc_readout == "head" else None,
            )
        self.alignment = None
        if alignment is not None:
            layer, weight = int(alignment["layer"]), float(alignment["weight"])
            self.alignment = AlignmentLoss(backbone, layer=layer, weight=weight)

    def row_transform(self, *, training: bool) -> RowTransform:
        """Return what makes rows of a prompt and its answer."""
        return self.answer_transform(
            audio_reader(self.model, self.stage, training=training),
            padding_share=self.answer_padding if training else 0.0,
            header_share=self.header_share,
        )

    def forward(self, batch: Batch) -> BatchLoss:
        """Measure the objective and the auxiliary losses on a batch."""
        outputs = self._embeds(batch)
        packing = self.packing(batch)
        embeds = concat_embeds(list(outputs.values())) if outputs else None
        loss = self.objective_loss(batch, embeds, packing)
        # The trainer divides sums by the weight: means are multiplied by it first.
        weight, auxiliary = loss.weight.detach(), loss.sum.new_zeros(())
        if self.ctc is not None and outputs.keys() & self.ctc.weights.keys():
            auxiliary = self.ctc(outputs, batch.ctc_targets, self._gates()) * weight
        if self.alignment is not None and packing is not None:
            auxiliary = auxiliary + self.alignment(batch, packing) * weight
        return batch_loss(loss, auxiliary)

    def _embeds(self, batch: Batch) -> dict[str, Embeds]:
        """Return what each adapter makes of the audio, or the embedded transcripts."""
        # Text alone: embedded transcripts stand where the adapters' embeddings would.
        if batch.audio_text is not None and batch.audio_text_lengths is not None:
            numbers = word_numbers(batch.audio_text, batch.speech_start, self.blank)
            return {
                "transcript": self.transcripts(batch.audio_text, batch.audio_text_lengths, numbers)
            }
        if batch.audio is None:
            return {}
        features = self.features(batch)
        return {key: adapter(features) for key, adapter in self.model.adapters.items()}

    def packing(self, batch: Batch) -> Packing | None:
        """Return how a batch is packed; the alignment loss also needs the slots of whole rows."""
        packing = super().packing(batch)
        if self.alignment is None:
            return packing
        # The alignment loss reads a layer's input, which only a Packing keeps.
        return Packing(None if packing is None else packing.owner, layer=self.alignment.layer)

    def _gates(self) -> dict[str, Any]:
        numberings = {key: numbering_of(part) for key, part in self.model.adapters.items()}
        return {key: part.gate for key, part in numberings.items() if part is not None}

    @torch.no_grad()
    def prepare(self, stream: TrainingDataset, *, seed: int) -> None:
        """Match scales, initialise numbers, then the backbone."""
        if self.match_scale:
            self._match_scales(stream)
        if self.ordinals and self.blank is not None:
            # Numbers begin as the words that they count: the backbone knows these already.
            blank, *words = self._embedded([self.blank, *self.ordinals])
            for adapter in self.model.adapters.values():
                if any(p.requires_grad for p in adapter.parameters()):
                    init_numbering(adapter, torch.stack(words), blank)
        if self.init_copying:
            transformer: Any = getattr(self.model.backbone, "transformer", None)
            if not hasattr(transformer, "blocks"):
                raise TrainingError("init_copying needs a backbone with a Transformer of diffa's")
            init_for_copying(transformer, seed)

    def _match_scales(self, stream: TrainingDataset) -> None:
        # Eight recordings are enough for a root mean square.
        rows = [stream[i] for i in range(min(8, len(stream)))]
        batch = self.collator()(rows).to(self.model.device)
        if batch.audio is None or batch.audio_lengths is None:
            raise TrainingError(f"stage {self.stage.name!r}: match_scale needs audio")
        features = self.model.encoder(batch.audio, batch.audio_lengths)
        table = self._embedded(range(self.model.backbone.vocab.size))
        for key in self.match_scale:
            scale_to_embeddings(self.model.adapters[key], features, table)

    def _embedded(self, tokens: Sequence[int]) -> Tensor:
        embeds: Tensor = self.model.backbone.embed(torch.tensor(tokens, device=self.model.device))
        return embeds

    @classmethod
    def check(
        cls, stage: StageConfig, path: str, spec: Spec, objective: type[Any], report: Report
    ) -> None:
        """Report options out of range, and those that would do harm or nothing."""
        super().check(stage, path, spec, objective, report)
        options, path = stage.learner.options, f"{path}.learner"
        for name, limits in _RANGES.items():
            check_range(options.get(name), limits, f"{path}.{name}", report)
        used = adapter_keys(spec) if stage.adapters is None else stage.adapters
        for name in ("ctc", "match_scale"):
            for key in options.get(name) or ():
                if key not in used:
                    text = f"the stage has no adapter {key!r}{suggest(key, used)}"
                    report(f"{path}.{name}", text)
        for key in options.get("match_scale", ()):
            if key in used and not {"adapters", f"adapters.{key}"} & set(stage.train):
                report(f"{path}.match_scale", f"rescales {key!r}, which the stage does not train")
        if options.get("init_copying") and "backbone" not in stage.train:
            text = "initialises the backbone, which the stage does not train"
            report(f"{path}.init_copying", text)
        if options.get("ctc_readout") == "head":
            for name in {"embedding_match", "ctc_logit_scale"} & options.keys():
                report(f"{path}.{name}", "is for ctc_readout: embeddings")
        if (options.get("alignment") or {"layer": 0, "weight": 0}).keys() != {"layer", "weight"}:
            report(f"{path}.alignment", "give layer and weight")
        needs = [name for name in ("ctc", "text_mixup", "ordinals") if options.get(name)]
        if needs and options.get("blank_token") is None:
            report(f"{path}.{needs[0]}", "needs blank_token")
