"""One stage on transformers' Trainer: exact normalisation, whole checkpoints, own counting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from diffa.data.collate import Batch, Collate
from diffa.data.rows import TrainingDataset, TrainingRow
from diffa.trainers import distributed as shards
from diffa.trainers import optim as optimizers
from diffa.trainers.checkpoints import (
    WEIGHTS,
    TrainingError,
    draft_of,
    load_weights,
    prune,
    replacing,
    save_weights,
)
from diffa.trainers.config_sections import Optimizer, Schedule
from diffa.trainers.learners.answers import Parts
from diffa.trainers.progress import Bar
from diffa.trainers.trainable import learned

Evaluate = Callable[[int], dict[str, float]]


class Loop(Trainer):  # type: ignore[misc]
    """Runs a learner over a stream of rows.

    The loss of a step is the sum over all its rows, on every device and in every accumulated
    batch, divided by the sum of their weights: how rows are dealt out changes nothing.
    """

    def __init__(
        self,
        learner: nn.Module,
        stream: TrainingDataset,
        collate: Collate,
        arguments: TrainingArguments,
        *,
        optimizer: Optimizer,
        schedule: Schedule,
        bar: Bar,
        keep: int = 2,
        evaluate: Evaluate | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.bar = bar
        self.chosen, self.way, self.keep, self.held = optimizer, schedule, keep, evaluate
        self.tally = Tally()
        self.skipped: list[str] = []
        self._weight: torch.Tensor | None = None
        self._moments: dict[str, Any] | None = None
        super().__init__(
            model=learner,
            args=arguments,
            train_dataset=stream,
            eval_dataset=[] if evaluate else None,
            data_collator=Named(collate),
            callbacks=[bar, *callbacks],
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the recipe's optimiser."""
        if getattr(self, "optimizer", None) is None:
            self.optimizer = optimizers.optimizer(model or self.model, self.chosen)
        made: torch.optim.Optimizer = self.optimizer
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the recipe's schedule."""
        if getattr(self, "lr_scheduler", None) is None:
            chosen = optimizer or self.optimizer
            self.lr_scheduler = optimizers.schedule(chosen, self.way, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Add one batch's gradients; the step's last batch divides them by the whole weight."""
        model.train()
        batch: Batch = inputs["batch"]
        self.skipped.extend(batch.skipped)
        with self.compute_loss_context_manager():
            parts: Parts = model(batch=batch)
        self.accelerator.backward(parts.sum + parts.extra)
        self.tally.add(parts)
        weight = parts.weight.detach()
        self._weight = weight if self._weight is None else self._weight + weight
        if self.accelerator.sync_gradients:
            self._divide(self._weight)
            self._weight = None
        mean: torch.Tensor = parts.sum.detach() / parts.weight.detach().clamp(min=1e-8)
        return mean.float() / int(self.args.gradient_accumulation_steps)

    def _divide(self, weight: torch.Tensor) -> None:
        """Turn summed gradients into those of the mean; DDP has averaged them over devices."""
        total = self.accelerator.reduce(weight, reduction="sum").clamp(min=1e-8)
        factor = self.accelerator.num_processes / float(total)
        grads = [p.grad for p in optimizers.learning(self.model) if p.grad is not None]
        torch._foreach_mul_(grads, factor)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the exact mean loss and accuracy since the last report."""
        if "loss" in logs:
            logs = {**logs, **self.tally.take(self.accelerator)}
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Run the stage's evaluation without moving any random state."""
        if self.held is None:
            return {}
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            self.model.eval()
            found = self.held(self.state.global_step)
        self.model.train()
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The stream is in order already."""
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a whole checkpoint or none, then drop the oldest."""
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        state = learned(self.model)
        if shards.is_split(self.model):
            self._moments = shards.moments(self.model, self.optimizer)
        if not self.args.should_save:
            self.accelerator.wait_for_everyone()  # until the draft is there
            self._save_rng_state(str(draft_of(place)))
            self.accelerator.wait_for_everyone()
            return
        with replacing(place) as draft:
            self.accelerator.wait_for_everyone()
            save_weights(state, draft / WEIGHTS)
            self._save_optimizer_and_scheduler(str(draft))
            self._save_rng_state(str(draft))
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(str(draft / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
        prune(place.parent, self.keep)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write what was gathered where weights are split: Trainer would write the frozen too."""
        if self._moments is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        torch.save(self._moments, Path(output_dir) / shards.OPTIMIZER)
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / shards.SCHEDULER)
        self._moments = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the optimiser's state, whole, into split weights."""
        if checkpoint is None or not shards.is_split(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        shards.load_moments(self.model, self.optimizer, Path(checkpoint))
        held = torch.load(Path(checkpoint) / shards.SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(held)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read a checkpoint's weights into what learns."""
        state = load_weights(Path(resume_from_checkpoint) / WEIGHTS)
        restore(self.model, state, resume_from_checkpoint)


def restore(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load exactly what learns; raises TrainingError where names or shapes differ."""
    wanted = learned(module, gather=False)
    shapes = {key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape}
    wrong = sorted((wanted.keys() ^ state.keys()) | shapes)
    if wrong:
        raise TrainingError(
            f"{source} holds other weights than this stage trains: {', '.join(wrong[:5])}"
        )
    shards.put(module, state)


class Named:
    """Collates rows into what the Trainer passes on by name."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Batch]:
        """Return the rows as one batch."""
        return {"batch": self.collate(rows)}


class Tally:
    """Sums of what batches measured, on their device until they are asked for."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.names: tuple[str, ...] = ()

    def add(self, parts: Parts) -> None:
        """Add a batch."""
        notes = parts.notes or {}
        self.names = tuple(notes)
        now = torch.stack([p.detach().float() for p in (*parts[:5], *notes.values())])
        self.sums = now if self.sums is None else self.sums + now

    def take(self, accelerator: Any = None) -> dict[str, float]:
        """Return mean loss and accuracy over all devices, and begin anew."""
        if self.sums is None:
            return {}
        sums = self.sums if accelerator is None else accelerator.reduce(self.sums, "sum")
        total, weight, correct, asked, extra, *notes = sums.tolist()
        self.sums = None
        weight = max(weight, 1e-8)
        found = {"loss": total / weight}
        found |= {"accuracy": correct / asked} if asked else {}
        found |= {"auxiliary": extra / weight} if extra else {}
        return found | {k: v / weight for k, v in zip(self.names, notes, strict=True)}
