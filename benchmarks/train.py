"""Measure a training step against the plain one: all logits, a padded batch, the encoder each time.

Both take the same rows with the same corruption through the same weights, a step of each in turn in
one process, and their losses and gradients are compared. Peak memory is measured in a process of
its own for each, above what the process holds with its weights.

The plain step is what DIFFA's released trainer does: every recording through the frozen encoder,
all rows padded to the longest one, logits for every position, cross-entropy over all of them.
Ours reads the encoder's features from disk, passes rows of like length together, and meets the
vocabulary where answers are masked, in chunks, with the frozen head's gradient made on the way.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reports import RESULTS, process_memory, synchronize, write_report
from torch import Tensor

import diffa
from diffa.canvas.batch import unpad_embeds
from diffa.canvas.canvas import insert_audio
from diffa.canvas.kv_cache import AttentionContext
from diffa.data.cache import FeatureCache, encoder_fingerprint, layers_used_by
from diffa.data.collate import Batch, Collate
from diffa.data.rows import TrainingRow
from diffa.spec.spec import Spec
from diffa.trainers.config_sections import StageConfig
from diffa.trainers.learners import AnswerLearner

VOCABULARY, PROMPT, AT = 126464, 64, 16
SIZES = {
    "default": {"d_model": 512, "n_layers": 8, "n_heads": 8, "mlp_hidden_size": 1536},
    "8b": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288},
}
ENCODERS = {
    "default": {"name": "tiny", "width": 512, "layers": 6, "heads": 8},
    "8b": {"name": "tiny", "width": 1280, "layers": 32, "heads": 20, "num_mel_bins": 128},
}
ADAPTERS = {
    "semantic": {"prompt": "prompt", "semantic": "conv"},  # DIFFA's stage 1
    "both": {"acoustic": {"name": "qformer", "dropout": 0.0}, "semantic": "conv"},  # stage 2
}
# seconds of audio and tokens of the answer
ROWS = [
    (4.0, 24),
    (6.0, 32),
    (8.0, 40),
    (10.0, 48),
    (12.0, 56),
    (15.0, 72),
    (20.0, 96),
    (28.0, 128),
]


def spec(size: str, adapters: str) -> dict[str, Any]:
    """A model of the stated shape with random weights; adapters learn, all else is frozen."""
    config = {
        **SIZES[size],
        "vocab_size": VOCABULARY,
        "embedding_size": VOCABULARY,
        "max_sequence_length": 4096,
        "rope_theta": 500000.0,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
    }
    return {
        "encoder": ENCODERS[size],
        "adapters": ADAPTERS[adapters],
        "backbone": {"name": "llada", "config": config, "gradient_checkpointing": size == "8b"},
        "train": ["adapters"],
    }


def lengths_of(count: int) -> list[tuple[float, int]]:
    """Lengths of that many rows, short and long ones alike."""
    step = max(1, len(ROWS) // count)
    return ROWS[step - 1 :: step][-count:]


def rows_of(count: int) -> list[TrainingRow]:
    """Rows of different lengths: drawn tokens, noise for audio, corrupted by fixed seeds."""
    drawn = torch.Generator().manual_seed(1)
    rows = []
    for number, (seconds, answer) in enumerate(lengths_of(count)):
        tokens = torch.randint(0, 126000, (PROMPT + answer,), generator=drawn)
        wave = 0.1 * torch.randn(int(16000 * seconds), generator=drawn)
        rows.append(
            TrainingRow(tokens, torch.arange(len(tokens)) >= PROMPT, 100 + number, AT, wave)
        )
    return rows


def plain(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The reference step: its summed loss and what to divide that by."""
    noised = model.objective.corrupt(batch.tokens, batch.answer, batch.seeds)
    with torch.no_grad():
        features = model.encoder(batch.audio, batch.audio_lengths)
    sizes, at = batch.row_lengths.tolist(), [AT] * len(batch.row_lengths)
    texts = [row[:size] for row, size in zip(noised.tokens, sizes, strict=True)]
    embeds, ids = insert_audio(texts, unpad_embeds(model.adapt(features)), at, model.backbone.embed)
    positions = torch.arange(ids.shape[1], device=ids.device)
    valid = positions < embeds.lengths[:, None]
    hidden = model.backbone(
        embeds.values, positions.expand(ids.shape), AttentionContext(valid=valid)
    )
    logits = model.backbone.head(hidden).float()  # (B, S, V), audio and padding included
    labels, weights = torch.full_like(ids, -100), torch.zeros(ids.shape, device=ids.device)
    hidden_ids = ids == model.backbone.vocab.mask  # row by row, left to right, as in the text
    labels[hidden_ids] = batch.tokens[noised.masked]
    weights[hidden_ids] = noised.weights[noised.masked]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (nll.view(ids.shape) * weights).sum(), noised.answer.sum()


class Step:
    """One way of making the gradients of a step from the same rows."""

    def __init__(
        self, model: Any, rows: list[TrainingRow], name: str, cache: Path, micro: int
    ) -> None:
        self.model, self.name, device = model, name, model.device
        collate = Collate(model.backbone.vocab, learn_padding=False)
        if name == "baseline":
            groups = [rows]
            self.run: Callable[[Batch], Any] = lambda batch: plain(model, batch)
        else:
            ordered = sorted(rows, key=lambda row: len(row.audio) if row.audio is not None else 0)
            groups = [ordered[i : i + micro] for i in range(0, len(ordered), micro)]
            features = FeatureCache(
                cache,
                encoder_fingerprint("benchmark", model.encoder),
                layers_used_by(model.adapters.values(), model.encoder.out),
                model.encoder.out.layers + 1,
                dtype="float32",
            )
            self.run = AnswerLearner(model, StageConfig(), features).train()
        self.batches = [collate(group).to(device) for group in groups]
        self.times: list[float] = []
        self.work: list[float] = []
        self.loss = 0.0
        self.gradients: list[Tensor] = []

    def __call__(self) -> None:
        """Make the gradients of the mean loss, timed."""
        self.model.zero_grad(set_to_none=True)
        synchronize(self.model.device)
        start, busy = time.perf_counter(), time.process_time()
        total = weight = 0.0
        for batch in self.batches:
            loss, tokens, *_ = self.run(batch)
            loss.backward()
            total += float(loss.detach())
            weight += float(tokens)
        learning = [p for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in learning], 1 / weight)
        synchronize(self.model.device)
        self.times.append(time.perf_counter() - start)
        self.work.append(time.process_time() - busy)
        self.loss = total / weight
        self.gradients = [p.grad.detach().clone() for p in learning]


def build(args: argparse.Namespace) -> Any:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = diffa.build(spec(args.size, args.adapters), device=args.device, dtype=dtype)
    return model.train()


def measure(args: argparse.Namespace, cache: Path) -> list[dict[str, Any]]:
    """Run both steps in turn, and compare what they make."""
    model, rows = build(args), rows_of(args.rows)
    steps = [Step(model, rows, name, cache, args.micro) for name in ("baseline", "ours")]
    steps[1]()  # the first epoch fills the cache
    steps[1].times.clear(), steps[1].work.clear()
    for _ in range(args.repeats):
        for step in steps:
            step()
    base, busy = min(steps[0].times), min(steps[0].work)
    result = []
    for step in steps:
        seconds = min(step.times)
        line = {"name": step.name, "seconds": round(seconds, 3)}
        line |= {"speedup": round(base / seconds, 2), "rows_per_second": args.rows / seconds}
        # On a busy machine CPU time says more than wall time.
        line |= {"cpu_seconds": round(min(step.work), 3)}
        line |= {"cpu_speedup": round(busy / min(step.work), 2)}
        line["loss_error"] = abs(step.loss - steps[0].loss) / abs(steps[0].loss)
        line["gradient_error"] = distance(step.gradients, steps[0].gradients)
        line["loss"] = step.loss
        result.append(line)
    return result


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the reference's."""
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(ours, theirs, strict=True))
    return (apart / sum(float(b.double().square().sum()) for b in theirs)) ** 0.5


def peak(args: argparse.Namespace, cache: Path) -> tuple[int, int]:
    """Peak memory of one step above what the process holds before it, and what it holds."""
    model = build(args)
    step = Step(model, rows_of(args.rows), args.peak, cache, args.micro)
    gc.collect()
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before, before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
    before = process_memory("VmRSS")
    step()
    return process_memory("VmHWM") - before, before


def peak_of(cache: Path, name: str) -> tuple[int, int]:
    """Peak memory of a step and what was held before, of a process with the same arguments."""
    line = [sys.executable, __file__, *sys.argv[1:], "--peak", name, "--cache", str(cache)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ)
    above, before = done.stdout.split()[-2:]
    return int(above), int(before)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="Run four rows and two rounds (under 4 minutes)."
    )
    parser.add_argument("--json", type=Path, help="Additional file for the report.")
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--adapters", choices=ADAPTERS, default="semantic")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, help="Rows of one step.")
    parser.add_argument(
        "--micro", type=int, default=1, help="Rows per forward pass of diffa's step."
    )
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rows = args.rows or (4 if args.quick else 8)
    args.repeats = args.repeats or (2 if args.quick else 3)
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(*peak(args, args.cache))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
        for line in rows:
            line["peak_bytes"], line["held_bytes"] = peak_of(Path(folder), line["name"])
    report = {
        "spec": Spec.read(spec(args.size, args.adapters)).digest(),
        "size": args.size,
        "adapters": args.adapters,
        "lengths": lengths_of(args.rows),
        "threads": args.threads,
        "cores": len(os.sched_getaffinity(0)),
        "device": args.device,
        "rows": rows,
    }
    target = RESULTS / f"train-{args.size}-{args.adapters}.json"
    for path in (args.json, None if args.quick else target):
        write_report(report, path)
    for line in rows:
        print(" ".join(f"{key}={value}" for key, value in line.items()))


if __name__ == "__main__":
    main()
