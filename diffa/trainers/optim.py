"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from diffa.trainers.config_sections import Optimizer, Schedule
from diffa.trainers.muon import Muon


def optimizer(learner: nn.Module, chosen: Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser of everything that learns; norms, biases and vectors do not decay."""
    named = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    matrices = _matrices(learner) if chosen.name == "muon" else set()
    turned = [p for _, p in named if id(p) in matrices]
    rest = [p for _, p in named if id(p) not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": chosen.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group | {"lr": chosen.lr} for group in groups if group["params"]]
    betas = (chosen.betas[0], chosen.betas[1])
    if chosen.name == "adamw":
        return torch.optim.AdamW(groups, lr=chosen.lr, betas=betas, eps=chosen.eps)
    wide = {
        "params": turned,
        "lr": chosen.matrix_lr,
        "matrices": True,
        "weight_decay": chosen.weight_decay,
    }
    groups = [wide, *groups] if turned else groups
    return Muon(groups, momentum=chosen.momentum, betas=betas, eps=chosen.eps)


def _matrices(learner: nn.Module) -> set[int]:
    """Find weights that map vectors to vectors; embeddings and the head stay with AdamW."""
    tables = [m for m in learner.modules() if isinstance(m, nn.Embedding)]
    shared, sizes = {id(m.weight) for m in tables}, {m.num_embeddings for m in tables}
    linears = [m for m in learner.modules() if isinstance(m, nn.Linear)]
    heads = {id(m.weight) for m in linears if m.out_features in sizes}
    return {id(m.weight) for m in linears} - shared - heads


def schedule(optimizer: torch.optim.Optimizer, chosen: Schedule, steps: int) -> LambdaLR:
    """Return the schedule over ``steps``: a linear rise, a plateau, the named way down."""
    warmup = chosen.warmup * steps if 0 < chosen.warmup < 1 else chosen.warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        top = warmup + chosen.hold * (steps - warmup)
        done = min(1.0, max(0.0, step - top) / max(1.0, steps - top))
        shapes = {
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "constant": 1.0,
        }
        return chosen.floor + (1 - chosen.floor) * shapes[chosen.name]

    return LambdaLR(optimizer, factor)


def learning(module: nn.Module) -> list[Tensor]:
    """Return the parameters that learn."""
    return [p for p in module.parameters() if p.requires_grad]
