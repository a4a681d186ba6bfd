"""Trainer of transformers for one stage: exact normalisation, atomic checkpoints, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from diffa.data.collate import Batch
from diffa.data.rows import TrainingDataset, TrainingRow
from diffa.trainers.checkpoints import (
    WEIGHTS,
    TrainingError,
    draft_of,
    load_weights,
    prune,
    replacing,
    save_weights,
)
from diffa.trainers.config_sections import OptimizerConfig, ScheduleConfig
from diffa.trainers.distributed import (
    OPTIMIZER,
    SCHEDULER,
    is_sharded,
    load_full_tensors,
    load_optimizer_state,
    optimizer_state,
)
from diffa.trainers.learners.base import BatchLoss, Collator, Learner
from diffa.trainers.optim import build_optimizer, build_schedule
from diffa.trainers.progress import ProgressBar
from diffa.trainers.trainable import trained_state


class StageTrainer(Trainer):  # type: ignore[misc]
    """Train a learner on a stream of rows.

    The loss of a step is the sum over all its rows, on every device and in every accumulated
    batch, divided by the sum of their weights: the split into batches changes nothing.

    Args:
        learner: What is optimized.
        stream: Rows in order.
        arguments: Arguments of transformers' Trainer.
        optimizer_config: Optimizer of the stage.
        schedule_config: Learning-rate schedule of the stage.
        progress_bar: Shows the progress.
        save_total_limit: Checkpoints that are kept.
        evaluator: Takes a step and returns metrics by name.
        callbacks: Further callbacks.
    """

    def __init__(
        self,
        learner: Learner,
        stream: TrainingDataset,
        arguments: TrainingArguments,
        *,
        optimizer_config: OptimizerConfig,
        schedule_config: ScheduleConfig,
        progress_bar: ProgressBar,
        save_total_limit: int = 2,
        evaluator: Callable[[int], dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.progress_bar, self.save_total_limit = progress_bar, save_total_limit
        self.optimizer_config, self.schedule_config = optimizer_config, schedule_config
        self.evaluator = evaluator
        self.meter = LossMeter()
        self.skipped: list[str] = []
        self._weight: torch.Tensor | None = None
        self._warned = False  # of weights without a gradient
        self._optimizer_state: dict[str, Any] | None = None
        super().__init__(
            model=learner,
            args=arguments,
            train_dataset=stream,
            eval_dataset=[] if evaluator else None,
            data_collator=NamedCollator(learner.collator()),
            callbacks=[progress_bar, *callbacks],
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the recipe's optimizer."""
        if getattr(self, "optimizer", None) is None:
            self.optimizer = build_optimizer(model or self.model, self.optimizer_config)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the recipe's learning-rate schedule."""
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = build_schedule(
                optimizer or self.optimizer, self.schedule_config, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Add one batch's gradients; the last batch of a step divides by the total weight."""
        model.train()
        batch: Batch = inputs["batch"]
        self.skipped.extend(batch.skipped)
        with self.compute_loss_context_manager():
            loss: BatchLoss = model(batch=batch)
        total = loss.sum + loss.auxiliary
        if not total.requires_grad:
            raise TrainingError("no trained weight has a gradient: nothing would be learned")
        self.accelerator.backward(total)
        self.meter.add(loss)
        weight = loss.weight.detach()
        self._weight = weight if self._weight is None else self._weight + weight
        if self.accelerator.sync_gradients:
            self._normalize_gradients(self._weight)
            self._weight = None
        mean: torch.Tensor = loss.sum.detach() / weight.clamp(min=1e-8)
        return mean.float() / int(self.args.gradient_accumulation_steps)

    def _normalize_gradients(self, weight: torch.Tensor) -> None:
        """Divide summed gradients by the weight of all devices; DDP has already averaged them."""
        total = self.accelerator.reduce(weight, reduction="sum").clamp(min=1e-8)
        factor = self.accelerator.num_processes / float(total)
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        grads = [p.grad for _, p in trained if p.grad is not None]
        self._check_gradients([name for name, p in trained if p.grad is None], len(trained))
        torch._foreach_mul_(grads, factor)

    def _check_gradients(self, missing: list[str], count: int) -> None:
        """Warn once of trained weights without a gradient in a whole step."""
        if missing and not self._warned and not is_sharded(self.model):
            self._warned = True
            names = ", ".join(missing[:4])
            self.progress_bar.console.print(
                f"{len(missing)} of {count} trained weights had no gradient in step "
                f"{self.state.global_step + 1}: {names}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the exact mean loss and accuracy since the last report."""
        if "loss" in logs:
            logs = {**logs, **self.meter.pop(self.accelerator)}
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Run the stage's evaluation; the random state is restored afterwards."""
        if self.evaluator is None:
            return {}
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            self.model.eval()
            values = self.evaluator(self.state.global_step)
        self.model.train()
        metrics = {f"eval_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the stream's own order."""
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a complete checkpoint or none, then remove the oldest."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        state = trained_state(self.model)
        if is_sharded(self.model):
            self._optimizer_state = optimizer_state(self.model, self.optimizer)
        if not self.args.should_save:
            self.accelerator.wait_for_everyone()  # until the draft is there
            self._save_rng_state(str(draft_of(folder)))
            self.accelerator.wait_for_everyone()
            return
        with replacing(folder) as draft:
            self.accelerator.wait_for_everyone()
            save_weights(state, draft / WEIGHTS)
            self._save_optimizer_and_scheduler(str(draft))
            self._save_rng_state(str(draft))
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(str(draft / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
        prune(folder.parent, self.save_total_limit)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the gathered state of sharded weights; Trainer would write frozen weights too."""
        if self._optimizer_state is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        torch.save(self._optimizer_state, Path(output_dir) / OPTIMIZER)
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)
        self._optimizer_state = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's gathered state into sharded weights."""
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_state(self.model, self.optimizer, Path(checkpoint))
        state = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load a checkpoint's weights into what is trained."""
        state = load_weights(Path(resume_from_checkpoint) / WEIGHTS)
        restore(self.model, state, resume_from_checkpoint)


def restore(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load the weights of what is trained.

    Args:
        module: The module; exactly what requires gradients is loaded.
        state: Tensors by name, not sharded.
        source: Where they come from, for messages.

    Raises:
        TrainingError: Names or shapes differ.
    """
    own = trained_state(module, gather=False)
    shapes = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    wrong = sorted((own.keys() ^ state.keys()) | shapes)
    if wrong:
        raise TrainingError(
            f"{source} holds other weights than this stage trains: {', '.join(wrong[:5])}"
        )
    load_full_tensors(module, state)


class NamedCollator:
    """Collate rows into the keyword arguments of ``Learner.forward``."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Batch]:
        """Return the rows as one batch."""
        return {"batch": self.collate(rows)}


class LossMeter:
    """Sum up batch losses on their device until they are reported."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.names: tuple[str, ...] = ()

    def add(self, loss: BatchLoss) -> None:
        """Add a batch."""
        metrics = loss.metrics or {}
        self.names = tuple(metrics)
        values = torch.stack([p.detach().float() for p in (*loss[:5], *metrics.values())])
        self.sums = values if self.sums is None else self.sums + values

    def pop(self, accelerator: Any = None) -> dict[str, float]:
        """Return mean loss, accuracy and metrics over all devices, and reset."""
        if self.sums is None:
            return {}
        sums = self.sums if accelerator is None else accelerator.reduce(self.sums, "sum")
        total, weight, correct, count, auxiliary, *metrics = sums.tolist()
        self.sums = None
        weight = max(weight, 1e-8)
        means = {"loss": total / weight}
        means |= {"accuracy": correct / count} if count else {}
        means |= {"auxiliary": auxiliary / weight} if auxiliary else {}
        return means | {k: v / weight for k, v in zip(self.names, metrics, strict=True)}
