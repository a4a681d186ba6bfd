"""Bias and variance of every way to draw masks: python benchmarks/objectives.py.

Two models whose bound is known exactly. A table says what each of six answer tokens costs under
each of the 64 sets of masks; a small random LLaDA gives the gradient of the loss with respect to
the audio's embeddings, which is what trains an adapter. One estimate is a step of sixteen rows
with consecutive seeds. Without a floor under the level (eps) the variance of ``bernoulli`` has no
bound at all, so it is measured with LLaDA's 0.001, which biases the bound by about as much.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from reports import write_report
from torch import Tensor

from diffa.backbones.llada import LLaDA
from diffa.canvas.training import compute_loss
from diffa.objectives.masked import Masked
from diffa.types import Vocab

SIZE, ROWS = 6, 16
VOCAB = Vocab(size=12, eos=9, pad=9, mask=11)
# name, options, whether the expectation is the bound of the whole answer, backbone passes
SCHEMES: list[tuple[str, dict[str, Any], bool, int]] = [
    ("bernoulli", {}, True, 1),
    ("bernoulli, antithetic", {"time_sampling": "antithetic"}, True, 1),
    ("bernoulli, low discrepancy", {"time_sampling": "low_discrepancy"}, True, 1),
    ("count", {"masking": "count"}, True, 1),
    ("count, antithetic", {"masking": "count", "time_sampling": "antithetic"}, True, 1),
    ("count, low discrepancy", {"masking": "count", "time_sampling": "low_discrepancy"}, True, 1),
    ("complementary", {"masking": "count", "complementary_masking": True}, True, 2),
    (
        "complementary, low discrepancy",
        {"masking": "count", "complementary_masking": True, "time_sampling": "low_discrepancy"},
        True,
        2,
    ),
    *(
        (f"{form}, {name}", {"masking": form, "schedule": name}, True, 1)
        for form in ("bernoulli", "count")
        for name in ("cosine", "polynomial", "geometric")
    ),
    ("count, block 2", {"masking": "count", "block_length": 2}, False, 1),
    ("count, block 1", {"masking": "count", "block_length": 1}, False, 1),
    ("no weight", {"normalization": "masked"}, False, 1),
    ("cart 0.3", {"cart_p": 0.3}, False, 1),
    ("count, full 0.25", {"masking": "count", "full_mask_prob": 0.25}, False, 1),
]


def table() -> Tensor:
    """Return what token i costs under the set of masks s, (64, 6): more where more is hidden."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.tensor([bin(code).count("1") for code in range(2**SIZE)])
    own = torch.rand(SIZE, generator=generator) * 2
    noise = torch.rand(2**SIZE, SIZE, generator=generator)
    return (own + noise) * (0.5 + hidden[:, None] / SIZE)


def bound(costs: Tensor) -> float:
    """The bound per token, by enumeration: mean over sizes l of mean set cost over l."""
    total = 0.0
    for count in range(1, SIZE + 1):
        sets = list(itertools.combinations(range(SIZE), count))
        total += sum(float(costs[code(s), list(s)].sum()) for s in sets) / len(sets) / count
    return total / SIZE


def code(places: Any) -> int:
    """The row of the table for a set of masks."""
    return sum(1 << place for place in places)


def losses(options: dict[str, Any], costs: Tensor, steps: int) -> Tensor:
    """The loss of every step under the table, (steps,)."""
    objective = Masked(VOCAB, **options)
    rows = steps * ROWS
    seeds = torch.arange(rows) + 12_345
    tokens, answer = torch.zeros(rows, SIZE).long(), torch.ones(rows, SIZE).bool()
    first = objective.corrupt(tokens, answer, seeds)
    views = [first, objective.second(tokens, first, seeds)]
    total, weight = torch.zeros(steps), torch.zeros(steps)
    for view in (view for view in views if view is not None):
        sets = (view.masked.long() << torch.arange(SIZE)).sum(dim=1)
        total += (view.weights * costs[sets]).sum(dim=1).view(steps, ROWS).sum(dim=1)
        plain = objective.normalization == "masked"
        counted = view.masked if plain else view.answer
        weight += counted.sum(dim=1).view(steps, ROWS).sum(dim=1)
    return total / weight


def backbone() -> LLaDA:
    """A random LLaDA of unit scale, which tells slots apart."""
    config = {
        "d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 64, "vocab_size": 40,
        "mask_token_id": 39, "eos_token_id": 38, "max_sequence_length": 64,
    }  # fmt: skip
    model = LLaDA(config=config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            scale = 1.0 if "wte" in name else weight.shape[1] ** -0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model


def spread_of_gradient(options: dict[str, Any], model: LLaDA, steps: int) -> tuple[float, float]:
    """Squared norm of the mean gradient of the audio's embeddings, and its summed variance."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 30, (1, 4 + SIZE), generator=generator).expand(ROWS, -1)
    answer = torch.arange(4 + SIZE).expand(ROWS, -1) >= 4
    embeds = torch.randn(8, 32, generator=generator).requires_grad_()
    objective, values = Masked(model.vocab, **options), []
    for step in range(steps):
        seeds = torch.arange(ROWS) + 999 + step * ROWS
        loss = compute_loss(
            model, objective, tokens, answer, seeds,
            lengths=torch.full((ROWS,), 4 + SIZE), audio_embeds=[embeds] * ROWS,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum / loss.weight, embeds)
        values.append(gradient.flatten())
    stacked = torch.stack(values)
    return float(stacked.mean(0).square().sum()), float(stacked.var(0).sum())


def main() -> None:
    """Measure every scheme, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=20_000, help="Number of steps under the table of costs."
    )
    parser.add_argument(
        "--gradients", type=int, default=400, help="Number of gradient steps of the LLaDA."
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    begin, costs, model, rows = time.perf_counter(), table(), backbone(), []
    due = bound(costs)
    for name, options, unbiased, passes in SCHEMES:
        values = losses(options, costs, args.steps).double()
        error = float(values.std()) / args.steps**0.5
        norm, variance = spread_of_gradient(options, model, args.gradients)
        row = {
            "name": name,
            "options": options,
            "passes": passes,
            "bound": round(due, 6),
            "mean": round(float(values.mean()), 6),
            # blocks have a bound of their own, and the rest none: tests/test_learning.py
            "errors_off": round((float(values.mean()) - due) / error, 2) if unbiased else None,
            "unbiased": unbiased,
            "variance": float(values.var()),
            "gradient_norm": norm,
            "gradient_variance": variance,
        }
        base = rows[0] if rows else row
        for key in ("variance", "gradient_variance"):
            # at equal compute: twice the passes for one estimate count double
            row[f"{key}_against_bernoulli"] = round(row[key] * passes / base[key], 3)
        rows.append(row)
        print(
            f"{name:26s} mean {row['mean']:.4f} of {due:.4f} ({row['errors_off']} se)  "
            f"variance x{row['variance_against_bernoulli']:<6} "
            f"gradient's x{row['gradient_variance_against_bernoulli']}"
        )
    result = {"steps": args.steps, "gradient_steps": args.gradients, "rows_per_step": ROWS}
    result |= {"seconds": round(time.perf_counter() - begin, 1), "rows": rows}
    write_report(result, args.json)


if __name__ == "__main__":
    main()
