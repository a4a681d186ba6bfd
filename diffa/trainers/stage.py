"""Build everything that runs one stage of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from diffa.data.cache import FeatureCache, encoder_fingerprint, layers_used_by
from diffa.data.mixture import Mixture
from diffa.data.rows import TrainingDataset
from diffa.data.samples import Source
from diffa.model import Model
from diffa.spec.schema import read_schema
from diffa.trainers.checkpoints import TrainingError
from diffa.trainers.config_sections import StageConfig
from diffa.trainers.evaluate import BestWeights, Evaluator
from diffa.trainers.learners.base import Learner
from diffa.trainers.progress import JsonlLog, ProgressBar
from diffa.trainers.run_context import RunContext, num_steps, open_data, stage_mixture
from diffa.trainers.trainer import StageTrainer


def build_trainer(
    model: Model, stage: StageConfig, number: int, context: RunContext, *, resume: bool = False
) -> StageTrainer:
    """Return the trainer of a stage, ready to train.

    Args:
        model: The model with the stage's parts (``trainable.stage_model``).
        stage: The stage.
        number: Its number from 0; with the recipe's seed it determines every random draw.
        context: The run.
        resume: Whether the stage continues from a checkpoint.
    """
    mixture = stage_mixture(stage, context, number)
    rows_per_step = stage.batch_size * stage.gradient_accumulation_steps * context.num_devices
    steps = num_steps(stage, mixture.size, rows_per_step)
    seed = context.recipe.config.seed
    # The learner's own weights are drawn here; a prime keeps stages of nearby seeds apart.
    torch.manual_seed(seed * 1009 + number)
    learner = build_learner(model, stage, mixture.sources, context)
    make_row = learner.row_transform(training=True)
    stream = TrainingDataset(mixture, steps * rows_per_step, make_row, context.on_error)
    evaluator = build_evaluator(model, learner, stage, context)
    learner.prepare(stream, seed=seed)
    folder = context.stage_folder(number)
    best = None
    if evaluator is not None:
        best = BestWeights(evaluator, model, folder, evaluator.config.best_metric, resume=resume)
    trainer = StageTrainer(
        learner,
        stream,
        training_arguments(stage, learner, folder, steps, context),
        optimizer_config=stage.optimizer,
        schedule_config=stage.schedule,
        save_total_limit=context.recipe.config.save_total_limit,
        evaluator=best,
        progress_bar=ProgressBar(stage.name, context.console),
        callbacks=[JsonlLog(folder / "log.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_learner(
    model: Model, stage: StageConfig, sources: Sequence[Source], context: RunContext
) -> Learner:
    """Return the stage's learner, with the wires that its constructor asks for."""
    cls = stage.learner.load()
    wires = {
        "model": model,
        "stage": stage,
        "sources": sources,
        "cache": build_cache(model, stage, context),
    }
    wires = {name: wires[name] for name in read_schema(cls).wires}
    learner: Learner = cls(**wires, **stage.learner.options)
    return learner


def build_cache(model: Model, stage: StageConfig, context: RunContext) -> FeatureCache | None:
    """Return the cache of the frozen encoder's features, or None."""
    if stage.cache is None:
        return None
    shape = model.encoder.out
    return FeatureCache(
        context.out / stage.cache.folder,
        encoder_fingerprint(str(model.spec.parts()["encoder"].options), model.encoder),
        layers_used_by(model.adapters.values(), shape),
        shape.layers + 1,
        dtype=stage.cache.dtype,
        gigabytes=stage.cache.max_gigabytes,
    )


def build_evaluator(
    model: Model, learner: Learner, stage: StageConfig, context: RunContext
) -> Evaluator | None:
    """Return a stage's evaluation, or None.

    Raises:
        TrainingError: The recipe names a function that was not passed to ``train``.
    """
    config = stage.evaluate
    if config is None:
        return None
    for name in config.evaluators:
        if name not in context.evaluators:
            raise TrainingError(
                f"stage {stage.name!r}: no evaluator {name!r} was passed to "
                "diffa.trainers.train(evaluators={...})"
            )
    stream = None
    if config.data:
        sources, weights = open_data(config.data, context, paired=learner.paired)
        mixture = Mixture(sources, weights, batch=1, micro=1, seed=0)
        rows = min(config.max_samples, mixture.size)
        stream = TrainingDataset(
            mixture, rows, learner.row_transform(training=False), context.on_error
        )
    functions = {name: context.evaluators[name] for name in config.evaluators}
    return Evaluator(learner, model, stream, config, functions, context.device)


def training_arguments(
    stage: StageConfig, learner: Learner, folder: Path, steps: int, context: RunContext
) -> TrainingArguments:
    """Return the arguments of transformers' Trainer for a stage.

    Raises:
        TrainingError: A logger is not installed.
    """
    config = context.recipe.config
    for name in config.loggers:
        if find_spec(name) is None:
            raise TrainingError(f"loggers: {name} is not installed: pip install {name}")
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=context.device.type == "cpu",
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        max_steps=steps,
        max_grad_norm=stage.max_grad_norm,
        bf16=context.bf16,
        seed=config.seed,
        logging_steps=stage.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save_steps,
        eval_strategy="no" if stage.evaluate is None else "steps",
        eval_steps=None if stage.evaluate is None else stage.evaluate.eval_steps,
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=context.device.type == "cuda",
        ddp_find_unused_parameters=learner.find_unused_parameters,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(config.loggers),
        run_name=f"{context.out.name}-{stage.name}",
        label_names=[],  # batches are objects: Trainer must not look for labels in them
    )
    # One process trains on one device. Trainer would wrap the model in DataParallel, which splits
    # nothing of a batch that is one argument; several GPUs need torchrun.
    if arguments.n_gpu > 1:
        context.console.print(
            f"{arguments.n_gpu} GPUs are visible, one is used: for all, start with torchrun"
        )
        arguments._n_gpu = 1
    return arguments
