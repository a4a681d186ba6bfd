"""From a stage of a recipe to everything that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from diffa.data.augment import Augment
from diffa.data.cache import FeatureCache, encoder_fingerprint, layers_used_by
from diffa.data.collate import Collate
from diffa.data.mixture import Mixture
from diffa.data.rows import (
    AnswerTransform,
    AudioTransform,
    EncoderTransform,
    PreferenceTransform,
    TrainingDataset,
    TrainingRow,
)
from diffa.data.samples import Sample, SpeakerSource
from diffa.model import Model
from diffa.nano.alignment import Hinting, chosen
from diffa.nano.auxiliary import Saying, Script, match, number
from diffa.nano.initialization import start
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.config import stage_part
from diffa.trainers.config_sections import Aids, Cache, Evaluation, Optimizer, Schedule, Stage
from diffa.trainers.evaluate import Held
from diffa.trainers.learners.answers import Answers
from diffa.trainers.learners.preferences import Prefers
from diffa.trainers.progress import Bar, Log
from diffa.trainers.session import Setting, mixture, open_data, steps_of
from diffa.trainers.trainer import Loop


def row_maker(model: Model, stage: Stage, *, altered: bool) -> Callable[[Sample, int], TrainingRow]:
    """Return what turns a stage's samples into rows."""
    rate = model.encoder.sample_rate
    augment = Augment(rate, **stage.augment) if altered and stage.augment else None
    if stage.kind == "listening":
        return EncoderTransform(AudioTransform(rate, augment))
    aids: Aids = stage_part(Aids, stage.aids)
    pairs = stage.kind == "preferences"
    answering = AnswerTransform(
        model.chat_format,
        model.backbone.vocab,
        AudioTransform(rate, None if pairs else augment),
        answer_lengths=rooms(stage),
        padding_share=aids.roomy if altered else 0.0,
        header_share=aids.header,
        max_length=stage.longest,
    )
    return PreferenceTransform(answering, AudioTransform(rate, augment)) if pairs else answering


def rooms(stage: Stage) -> list[int]:
    """Return the lengths that answers may be padded to; none where the batch decides."""
    given = stage.answer_length
    return given if isinstance(given, list) else [given] if given else []


def collator(model: Model, stage: Stage) -> Collate:
    """Return what pads a stage's rows."""
    exact = stage.kind == "preferences" or bool(rooms(stage))
    return Collate(model.backbone.vocab, learn_padding=not exact)


def learner(model: Model, stage: Stage, mixed: Mixture, setting: Setting) -> nn.Module:
    """Return what a stage optimises."""
    if stage.kind == "listening":
        from diffa.nano.encoder_learner import Hears

        names = [
            name
            for source in mixed.sources
            if isinstance(source, SpeakerSource)
            for name in source.speakers
        ]
        try:
            return Hears(model.encoder, list(dict.fromkeys(names)), **stage.options)
        except TypeError as error:
            raise TrainingError(f"stage {stage.name!r}, options: {error}") from error
    if stage.kind == "preferences":
        return Prefers(model, feature_cache(model, stage, setting))
    aids: Aids = stage_part(Aids, stage.aids)
    blank = _blank(model, aids, stage)
    embed = model.backbone.embed
    saying = None
    if aids.say and blank is not None:
        head = model.backbone.head if aids.through == "head" else None
        saying = Saying(
            embed, aids.say, blank=blank, sharpness=aids.sharpness, pull=aids.pull, head=head
        )
    numbers = chosen(aids.numbers, model.backbone.tokenizer)
    script = Script(embed, blank=blank, blur=aids.blur, noise=aids.noise, numbers=numbers)
    cache = feature_cache(model, stage, setting)
    return Answers(
        model, cache, script, saying, packed=aids.packed, hinting=_hinting(model, aids, stage)
    )


def _hinting(model: Model, aids: Aids, stage: Stage) -> Hinting | None:
    """Return what teaches the backbone by labels; TrainingError for options that do not fit."""
    if aids.hints is None:
        return None
    if set(aids.hints) != {"layer", "weight"}:
        raise TrainingError(f"stage {stage.name!r}: aids.hints needs layer and weight")
    return Hinting(
        model.backbone, layer=int(aids.hints["layer"]), weight=float(aids.hints["weight"])
    )


def _blank(model: Model, aids: Aids, stage: Stage) -> int | None:
    """Return the id of the token that stands for nothing; TrainingError where one is needed."""
    if aids.blank is None:
        if aids.say or aids.blur:
            raise TrainingError(f"stage {stage.name!r}: aids.say and aids.blur need aids.blank")
        return None
    found = model.backbone.tokenizer.convert_tokens_to_ids(aids.blank)
    if found is None or found == model.backbone.tokenizer.unk_token_id:
        raise TrainingError(f"stage {stage.name!r}: the tokenizer has no token {aids.blank!r}")
    return int(found)


@torch.no_grad()
def match_adapters(
    model: Model, stage: Stage, stream: TrainingDataset, device: torch.device
) -> None:
    """Let the adapters that ``aids.match`` names begin as loud as the backbone's embeddings."""
    aids: Aids = stage_part(Aids, stage.aids)
    if not aids.match:
        return
    rows = [stream[i] for i in range(min(8, len(stream)))]
    batch = collator(model, stage)(rows).to(device)
    if batch.audio is None or batch.audio_lengths is None:
        raise TrainingError(f"stage {stage.name!r}: aids.match needs audio")
    features = model.encoder(batch.audio, batch.audio_lengths)
    tokens = torch.arange(model.backbone.vocab.size, device=device)
    for key in aids.match:
        match(model.adapters[key], features, model.backbone.embed(tokens))


def number_adapters(model: Model, stage: Stage) -> None:
    """Let adapters that number, and learn, begin with the words that ``aids.numbers`` names."""
    aids: Aids = stage_part(Aids, stage.aids)
    if not aids.numbers:
        return
    blank = _blank(model, aids, stage)
    if blank is None:
        raise TrainingError(f"stage {stage.name!r}: aids.numbers needs aids.blank")
    ids = [blank, *chosen(aids.numbers, model.backbone.tokenizer)]
    device = next(model.backbone.parameters()).device
    first, *rest = model.backbone.embed(torch.tensor(ids, device=device))
    for adapter in model.adapters.values():
        if any(p.requires_grad for p in adapter.parameters()):
            number(adapter, torch.stack(rest), first)


def start_backbone(model: Model, stage: Stage, seed: int) -> None:
    """Let the backbone begin by copying where ``aids.start`` says so."""
    aids: Aids = stage_part(Aids, stage.aids)
    if not aids.start:
        return
    inner = getattr(model.backbone, "transformer", None)
    if not hasattr(inner, "blocks"):
        raise TrainingError(f"stage {stage.name!r}: aids.start needs a Transformer of diffa's own")
    start(inner, seed)


def feature_cache(model: Model, stage: Stage, setting: Setting) -> FeatureCache | None:
    """Return the cache of the frozen encoder's features, if the stage keeps any."""
    if stage.cache is None:
        return None
    chosen: Cache = stage_part(Cache, stage.cache)
    source = model.encoder.out
    return FeatureCache(
        setting.out / chosen.folder,
        encoder_fingerprint(str(model.spec.parts()["encoder"].options), model.encoder),
        layers_used_by(model.adapters.values(), source),
        source.layers + 1,
        dtype=chosen.dtype,
        gigabytes=chosen.gigabytes,
    )


def held_out(
    model: Model, optimised: nn.Module, stage: Stage, setting: Setting
) -> tuple[Held, Evaluation] | None:
    """Return a stage's evaluation, or None."""
    if stage.evaluate is None:
        return None
    chosen: Evaluation = stage_part(Evaluation, stage.evaluate)
    missing = [name for name in chosen.by if name not in setting.evaluators]
    if missing:
        raise TrainingError(
            f"stage {stage.name!r}: no evaluator {missing[0]!r} was passed to "
            "diffa.trainers.train(evaluators={...})"
        )
    stream = None
    if chosen.data:
        sources, weights = open_data(chosen.data, setting, pairs=stage.kind == "preferences")
        mixed = Mixture(sources, weights, batch=1, micro=1, seed=0)
        rows = min(chosen.rows, mixed.size)
        stream = TrainingDataset(
            mixed, rows, row_maker(model, stage, altered=False), setting.on_error
        )
    if stage.kind == "listening":
        chosen = stage_part(Evaluation, {**stage.evaluate, "generate": False})
    held = Held(
        optimised,
        model,
        stream,
        collator(model, stage),
        chosen,
        setting.evaluators,
        setting.device,
    )
    return held, chosen


def arguments(stage: Stage, folder: Path, steps: int, setting: Setting) -> TrainingArguments:
    """Translate a stage into what transformers' Trainer asks for."""
    head = setting.recipe.head
    _check_loggers(head.loggers)
    cuda = setting.device.type == "cuda"
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=setting.device.type == "cpu",
        per_device_train_batch_size=stage.batch,
        gradient_accumulation_steps=stage.accumulate,
        max_steps=steps,
        max_grad_norm=stage.clip,
        bf16=setting.bf16,
        seed=head.seed,
        logging_steps=stage.log,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save,
        eval_strategy="steps" if stage.evaluate is not None else "no",
        eval_steps=_every(stage),
        dataloader_num_workers=head.workers,
        dataloader_pin_memory=cuda,
        # a listening batch without a melody, say, leaves a head out
        ddp_find_unused_parameters=stage.kind == "listening",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(head.loggers),
        run_name=f"{setting.out.name}-{stage.name}",
        label_names=[],
    )


def _every(stage: Stage) -> int | None:
    if stage.evaluate is None:
        return None
    return int(stage_part(Evaluation, stage.evaluate).every)


def _check_loggers(names: Sequence[str]) -> None:
    from importlib.util import find_spec

    for name in names:
        if find_spec(name) is None:
            raise TrainingError(f"loggers: {name} is not installed: pip install {name}")


def loop(
    model: Model, stage: Stage, number: int, folder: Path, setting: Setting
) -> tuple[Loop, Held | None, Evaluation | None]:
    """Return everything that runs a stage, ready to train."""
    mixed = mixture(stage, setting, number)
    per_step = stage.batch * stage.accumulate * setting.processes
    steps = steps_of(stage, mixed.size, per_step)
    torch.manual_seed(setting.recipe.head.seed * 1009 + number)  # heads are drawn here
    optimised = learner(model, stage, mixed, setting)
    make = row_maker(model, stage, altered=True)
    found = held_out(model, optimised, stage, setting)
    held, chosen = found if found else (None, None)
    stream = TrainingDataset(mixed, steps * per_step, make, setting.on_error)
    match_adapters(model, stage, stream, setting.device)
    number_adapters(model, stage)
    start_backbone(model, stage, setting.recipe.head.seed)
    made = Loop(
        optimised,
        stream,
        collator(model, stage),
        arguments(stage, folder, steps, setting),
        optimizer=stage_part(Optimizer, stage.optimizer),
        schedule=stage_part(Schedule, stage.schedule),
        keep=setting.recipe.head.keep,
        evaluate=held,
        bar=Bar(stage.name, setting.console),
        callbacks=[Log(folder / "log.jsonl")],
    )
    made.remove_callback(PrinterCallback)
    return made, held, chosen
