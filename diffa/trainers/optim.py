"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from diffa.trainers.config_sections import OptimizerConfig, ScheduleConfig
from diffa.trainers.muon import Muon


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a module's trained parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    hidden = _hidden_matrices(module) if config.name == "muon" else set()
    matrices = [p for p in trained if id(p) in hidden]
    rest = [p for p in trained if id(p) not in hidden]
    vector_decay = config.weight_decay if config.decay_norms_and_biases else 0.0
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": vector_decay},
    ]
    groups = [group | {"lr": config.lr} for group in groups if group["params"]]
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps)
    muon_group = {
        "params": matrices,
        "lr": config.matrix_lr,
        "matrices": True,
        "weight_decay": config.weight_decay,
    }
    groups = [muon_group, *groups] if matrices else groups
    return Muon(groups, momentum=config.momentum, betas=betas, eps=config.eps)


def _hidden_matrices(module: nn.Module) -> set[int]:
    """Return the ids of linear weights for Muon; embeddings and the head stay with AdamW."""
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    shared, sizes = {id(m.weight) for m in tables}, {m.num_embeddings for m in tables}
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    heads = {id(m.weight) for m in linears if m.out_features in sizes}
    return {id(m.weight) for m in linears} - shared - heads


def build_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int
) -> LambdaLR:
    """Return the learning-rate schedule of a stage of ``steps`` steps."""
    warmup = config.warmup_steps * steps if 0 < config.warmup_steps < 1 else config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup and config.warmup_type == "log":
            return min(1.0, math.log(step + 1) / math.log(max(2.0, warmup)))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        decay_start = warmup + config.stable_ratio * (steps - warmup)
        progress = min(1.0, max(0.0, step - decay_start) / max(1.0, steps - decay_start))
        shapes = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "constant": 1.0,
        }
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * shapes[config.name]

    return LambdaLR(optimizer, factor)
