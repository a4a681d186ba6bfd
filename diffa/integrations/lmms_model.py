"""Any spec as a model of lmms-eval: ``lmms-eval --model diffa --model_args spec=nano``."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from diffa.errors import AudioError, DiffaError, SpecError
from diffa.integrations.lmms_audio import concatenate_recordings, load_recording

if TYPE_CHECKING:
    lmms: Any = object
else:
    from lmms_eval.api.model import lmms

LOG = logging.getLogger("diffa.lmms")
_IGNORED = ("temperature", "top_p", "top_k", "num_beams", "do_sample")


class Diffa(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """A model of ``diffa.build`` behind lmms-eval's interface (its simple path, 0.7).

    Everything comes from ``--model_args``: ``spec=diffa-2,sampler_preset=fast,max_tokens=16``.

    Args:
        spec: preset, file or saved model's folder.
        sampler_preset: named sampler preset of the spec.
        changes: ``PATH=VALUE`` pairs joined by ``;``: ``sampler.block_length=4;sampler.steps=4``.
        max_tokens: length of every answer, whatever the task asks for; the papers' tables use 4
            for MMSU and 16 for MMAU, where lmms-eval's tasks ask for 256 and more.
        system: System prompt that overrides the spec's.
        samples: draws per choice where a task compares likelihoods.
        device: where it runs; the process' own GPU where there is one, else the CPU.
        dtype: of the backbone.
        batch_size: questions at once.
        max_batch_size: not used; lmms-eval passes it.
    """

    is_simple = True

    def __init__(
        self,
        spec: str = "",
        sampler_preset: str = "",
        changes: str = "",
        max_tokens: int | None = None,
        system: str | None = None,
        samples: int = 128,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        from diffa.cli.models import load_model

        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise SpecError(f"batch_size must be a number of at least 1, got {batch_size!r}")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        own = self._world_size > 1 or device in (None, "", "cuda")  # every process its own GPU
        place = str(self.accelerator.device) if own else str(device)
        overrides = [one.strip() for one in changes.split(";") if one.strip()]
        self.model, name = load_model(spec, overrides, sampler_preset, place, dtype)
        self.model.eval()
        self.batch_size, self.max_tokens = int(batch_size), max_tokens
        self.system, self.samples = system, samples
        self.num_unreadable = 0
        LOG.info("%s, digest %s, on %s", name, self.model.spec.digest(), place)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        place: torch.device = self.model.device
        return place

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests ``(context, gen_kwargs, doc_to_visual, doc_id, task, split)``, in order.

        Questions that ask for the same length share batches. A recording that cannot be read is
        answered with nothing, logged, and counted in ``num_unreadable``: no item disappears.
        """
        tqdm = import_module("tqdm").tqdm
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(index)
        texts, self.num_unreadable = [""] * len(requests), 0
        with tqdm(total=len(requests), disable=self.rank != 0, desc="diffa") as bar:
            for members in groups.values():
                for first in range(0, len(members), self.batch_size):
                    indices = members[first : first + self.batch_size]
                    answers = self._answer([requests[index].args for index in indices])
                    for index, text in zip(indices, answers, strict=True):
                        texts[index] = text
                        context, wishes = requests[index].args[:2]
                        self.cache_hook.add_partial("generate_until", (context, wishes), text)
                    bar.update(len(indices))
        if self.num_unreadable:
            LOG.warning(
                "%d recordings could not be read; their answers are empty", self.num_unreadable
            )
        if requests and self.num_unreadable == len(requests):
            raise DiffaError(f"none of {len(requests)} recordings can be read; see the log above")
        return texts

    def _answer(self, batch: Sequence[tuple[Any, ...]]) -> list[str]:
        """Answer one batch whose wishes agree."""
        length, stops = self._wishes(batch[0][1])
        texts = [""] * len(batch)
        audio: dict[int, Any] = {}
        for index, (_, _, doc_to_visual, doc_id, task, split) in enumerate(batch):
            try:
                audio[index] = self._audio(doc_to_visual, doc_id, task, split)
            except AudioError as error:
                self.num_unreadable += 1
                LOG.warning("%s, document %s: %s", task, doc_id, error)
        if not audio:
            return texts
        answer = self.model.answer(
            list(audio.values()),
            [batch[index][0] for index in audio],
            system=self.system,
            max_tokens=length,
        )
        for index, text in zip(audio, answer.text, strict=True):
            texts[index] = cut(text, stops)
        return texts

    def _wishes(self, wishes: Mapping[str, Any]) -> tuple[int | None, list[str]]:
        """Read how long an answer may be and what ends it; what a sampler cannot obey is logged."""
        ignored = [
            name for name in _IGNORED if wishes.get(name) not in (None, False, 0, 0.0, 1, 1.0)
        ]
        if ignored:
            LOG.warning("the spec's sampler decodes: %s of the task is ignored", ", ".join(ignored))
        until = wishes.get("until") or []
        if not isinstance(until, str | list | tuple):
            raise SpecError(f"until must be a text or a list of texts, got {until!r}")
        stops = [until] if isinstance(until, str) else [str(stop) for stop in until]
        length = self.max_tokens or wishes.get("max_new_tokens")
        return int(length) if length else None, stops

    def _audio(self, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> Any:
        """Read a document's recordings as one waveform (S,), or None where it has none."""
        recordings = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        rate = self.model.encoder.sample_rate
        waves = [load_recording(one, rate) for one in recordings if one is not None]
        if len(waves) > 1:
            LOG.warning("%s, document %s: %d recordings joined into one", task, doc_id, len(waves))
        return concatenate_recordings(waves, rate)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Score requests ``(context, answer, doc_to_visual, doc_id, task, split)``, in order.

        Every item is (loss, whether the model writes that very answer). It is the loss, nats per
        token, as of lmms-eval's own models: its tasks take the smallest (its issue 370). The loss
        is a masked model's bound (``Model.score``), with the same draws for all choices.
        """
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[(request.args[0], *request.args[3:6])].append(index)
        results: list[Any] = [None] * len(requests)
        for members in groups.values():
            scored = self._score([requests[index].args for index in members])
            for index, one in zip(members, scored, strict=True):
                results[index] = _kept_whole(one)
        return results

    def _score(self, batch: Sequence[tuple[Any, ...]]) -> list[tuple[float, bool]]:
        context, _, *where = batch[0]
        if len(where) != 4:
            raise SpecError("likelihoods without a document are not offered (acc_mutual_info)")
        doc_to_visual, doc_id, task, split = where
        document = self.task_dict[task][split][doc_id]
        texts = [one[1](document) if callable(one[1]) else one[1] for one in batch]
        choices = [str(choice).strip() for choice in texts]
        audio = self._audio(doc_to_visual, doc_id, task, split)
        scored = self.model.score(audio, context, choices, samples=self.samples, system=self.system)
        longest = int(scored.lengths.max()) + 1  # room to end the turn
        answer = self.model.answer(audio, context, max_tokens=longest, system=self.system)
        losses = (-scored.values.cpu() / scored.lengths.cpu()).tolist()
        return [(loss, answer.text == choice) for loss, choice in zip(losses, choices, strict=True)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: the models answer one question at a time."""
        raise DiffaError("diffa answers one question at a time: tasks of several rounds cannot run")


def _kept_whole(scored: tuple[float, bool]) -> Any:
    """Wrap a pair so that lmms-eval 0.7 does not turn it into a text."""
    wrap = getattr(import_module("lmms_eval.api.instance"), "GenerationResult", None)
    return scored if wrap is None else wrap(scored)


def cut(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of its stops."""
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text
