"""Preference optimisation on nano: variance with shared masks, and results of training.

``--variance`` measures, over many draws of masks for the same pairs, the variance of the margin,
the loss and the gradient with masks shared between policy and reference and without. ``--train``
runs a preference stage (LoRA and adapters) on pairs that corrupt one audio attribute, and
compares preference accuracy on held-out pairs and word error of transcription before and after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from reports import RESULTS, write_report
from rich.console import Console
from torch import Tensor

import diffa
from diffa.data.collate import Batch, Collate
from diffa.data.manifest import Manifest
from diffa.data.rows import AnswerTransform, AudioTransform, PreferenceTransform
from diffa.data.samples import derive_seed
from diffa.nano.preferences import write_preferences
from diffa.spec.spec import Spec
from diffa.trainers import train
from diffa.trainers.config_sections import StageConfig
from diffa.trainers.evaluate import compare
from diffa.trainers.learners import PreferenceLearner
from diffa.trainers.trainable import set_trainable

LOGGED = ("loss", "accuracy", "margin", "chosen", "rejected")


def spec_of(args: argparse.Namespace, **objective: Any) -> Spec:
    """The named spec with LoRA on its backbone and the preference objective."""
    rule = {"name": "vrpo", "samples": args.samples, "beta": args.beta, **objective}
    lora = {"rank": args.rank, "alpha": 2.0 * args.rank}
    return Spec.read(args.spec).change(
        {"backbone.lora": lora, "objective": rule, "train": args.parts}
    )


# --- variance -----------------------------------------------------------------------------------


class Moments:
    """Mean and variance of vectors, one after another (Welford)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.apart: Tensor | float = 0.0

    def add(self, value: Tensor) -> None:
        """Add one vector."""
        self.count += 1
        step = value - self.mean
        self.mean = self.mean + step / self.count
        self.apart = self.apart + step * (value - self.mean)

    @property
    def variance(self) -> float:
        """Summed over the components."""
        return float(torch.as_tensor(self.apart).sum()) / max(1, self.count - 1)


def pair_batch(model: Any, data: Manifest, row: int, draw: int) -> Batch:
    """One pair, corrupted by the seeds of a draw."""
    hearing = AudioTransform(model.encoder.sample_rate)
    make = PreferenceTransform(
        AnswerTransform(model.chat_format, model.backbone.vocab, hearing), hearing
    )
    return Collate(model.backbone.vocab, learn_padding=False)(
        [make(data[row], derive_seed(row, draw))]
    )


def variance(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Variances after some steps of training each, with shared masks and without."""
    data = manifest(args, folder, "train", args.pairs)
    torch.manual_seed(0)
    model = diffa.build(spec_of(args))
    set_trainable(model, args.parts)
    learner = PreferenceLearner(model, StageConfig()).train()
    learning = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.lr)
    results, done = [], 0
    for away in sorted(args.away):
        for step in range(done, away):
            optimizer.zero_grad()
            learner(pair_batch(model, data, step % len(data), -1 - step)).sum.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
        done = away
        ways = {"shared": True, "apart": False}
        both = {name: spread(learner, data, args, way) for name, way in ways.items()}
        for shared, apart in zip(both["shared"], both["apart"], strict=True):
            ratios = {
                key: apart[key] / max(shared[key], 1e-30) for key in ("margin", "loss", "gradient")
            }
            row = {"steps": away, "samples": args.samples, "beta": shared["beta"]}
            row |= {"pairs": args.pairs, "draws": args.draws, "parts": args.parts}
            results.append(row | {"shared": shared, "apart": apart, "apart_over_shared": ratios})
            print(json.dumps(row | ratios))
    return results


def spread(
    learner: PreferenceLearner, data: Manifest, args: argparse.Namespace, shared: bool
) -> list[dict[str, float]]:
    """Variance over draws of masks of one pair's margin, loss and gradient; mean over pairs.

    The loss is -log sigmoid(beta g) of a gain g, and its gradient -beta sigmoid(-beta g) times
    that of g: one pass serves every beta.
    """
    learning = [p for p in learner.parameters() if p.requires_grad]
    rule = learner.model.objective
    previous = rule.beta
    rule.shared_masks, rule.beta = shared, 1e-3  # small: the sigmoid never underflows
    rows = min(len(data), args.pairs)
    kinds = ("margin", "loss", "gradient", "mean_margin", "mean_gradient")
    sums = [dict.fromkeys(kinds, 0.0) for _ in args.betas]
    for row in range(rows):
        of = [{key: Moments() for key in ("margin", "loss", "gradient")} for _ in args.betas]
        for draw in range(args.draws):
            parts = learner(pair_batch(learner.model, data, row, draw))
            grads = torch.autograd.grad(parts.sum, learning, allow_unused=True)
            assert parts.notes is not None
            margin = parts.notes["margin"].double()
            flat = torch.cat([g.flatten() for g in grads if g is not None]).double()
            gain = margin / rule.beta
            slope = flat / (-rule.beta * torch.sigmoid(-margin))  # the gain's gradient
            for beta, moments in zip(args.betas, of, strict=True):
                moments["margin"].add(beta * gain)
                moments["loss"].add(-F.logsigmoid(beta * gain))
                moments["gradient"].add(-beta * torch.sigmoid(-beta * gain) * slope)
        for values, moments in zip(sums, of, strict=True):
            for key, one in moments.items():
                values[key] += one.variance / rows
            values["mean_margin"] += float(moments["margin"].mean) / rows
            values["mean_gradient"] += (
                float(torch.as_tensor(moments["gradient"].mean).norm()) / rows
            )
    rule.beta = previous
    return [{"beta": beta} | values for beta, values in zip(args.betas, sums, strict=True)]


# --- training -----------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Held-out preference accuracy and mean margin, and word error of transcription."""

    accuracy: float
    margin: float
    word_error: float


def train_preferences(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a preference stage and measure before and after.

    LoRA alone learns unless ``--parts`` says otherwise: adapters of this size that learn along are
    moved by the noise of a small batch, and .78 of held-out pairs were right after 300 such steps.
    """
    test_pairs = manifest(args, folder, "test", args.test_pairs)
    manifest(args, folder, "train", args.count)
    stage = {
        "name": "prefer",
        "learner": "preferences",
        "data": [{"path": str(folder / "train-preferences.jsonl"), "unique_ids": False}],
        "train": args.parts,
        "max_steps": args.steps,
        "batch_size": args.batch,
        "group_by_length": False,
        "save_steps": max(args.steps, 1),
        "optimizer": {"lr": args.lr, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup_steps": 0.05},
    }
    recipe = {"spec": spec_of(args, sft_weight=args.sft).data, "stages": [stage]}
    utterances = test_utterances(args)
    torch.manual_seed(0)
    first = diffa.build(spec_of(args))
    before = Scores(0.5, 0.0, word_error(first, utterances))
    out = Path(tempfile.mkdtemp(dir=folder))
    start = time.perf_counter()
    report = train(recipe, out=out / "run", console=Console(stderr=True))
    seconds = time.perf_counter() - start
    assert report.model is not None
    after = score(first, report.model, test_pairs, args, utterances)
    log = [json.loads(line) for line in (out / "run/1-prefer/log.jsonl").read_text().splitlines()]
    curve = [{key: row[key] for key in ("step", *LOGGED)} for row in log if "margin" in row]
    return {
        "parts": args.parts,
        "lr": args.lr,
        "samples": args.samples,
        "beta": args.beta,
        "sft_weight": args.sft,
        "steps": args.steps,
        "batch": args.batch,
        "train_pairs": args.count,
        "held_pairs": len(test_pairs),
        "transcriptions": len(utterances),
        "seconds": round(seconds, 1),
        "before": before._asdict(),
        "after": after._asdict(),
        "curve": curve[:: max(1, len(curve) // 20)],
    }


@torch.no_grad()
def score(
    first: Any, last: Any, test_pairs: Manifest, args: argparse.Namespace, utterances: list[Any]
) -> Scores:
    """Compare the trained policy's bounds with those of the model it began as."""
    for model in (first, last):
        model.eval().objective.samples = args.judged
    right = margin = 0.0
    rule = last.objective
    for row in range(len(test_pairs)):
        batch = pair_batch(last, test_pairs, row, 0)
        noised = rule.draws(batch.tokens, batch.answer, batch.seeds)
        bounds = [
            PreferenceLearner(model, StageConfig())._bounds(batch, noised)
            for model in (last, first)
        ]
        row_margin = float(rule.compare(*bounds).margin)
        right += (row_margin > 0) + 0.5 * (row_margin == 0)
        margin += row_margin
    return Scores(right / len(test_pairs), margin / len(test_pairs), word_error(last, utterances))


def test_utterances(args: argparse.Namespace) -> list[Any]:
    """Freshly composed test utterances with digits in them."""
    from diffa.nano.corpus.utterances import Utterances

    speech = Utterances("test", args.seed + 7)
    candidates = (speech[i] for i in range(20 * args.utterances))
    with_digits = (u for u in candidates if u.labels.digits)
    return [u for u, _ in zip(with_digits, range(args.utterances), strict=False)]


@torch.no_grad()
def word_error(model: Any, utterances: list[Any]) -> float:
    """Word errors per word when asked to transcribe."""
    from diffa.data.corpora.fsdd import DIGIT_WORDS

    model = diffa.swap(model, sampler=model.spec.data["sampler_presets"]["exact"])
    expected = [" ".join(DIGIT_WORDS[d] for d in u.labels.digits) for u in utterances]
    texts: list[str] = []
    for at in range(0, len(utterances), 16):
        waves = [torch.from_numpy(u.audio) for u in utterances[at : at + 16]]
        questions = ["Please transcribe the audio to text."] * len(waves)
        texts += model.answer(waves, questions, max_tokens=16).text
    return compare(texts, expected)["error"]


def manifest(args: argparse.Namespace, folder: Path, split: Any, count: int) -> Manifest:
    """Pairs of a split, written once."""
    path = folder / f"{split}-preferences.jsonl"
    if not path.is_file():
        path = write_preferences(folder, split, args.seed, count, form="jsonl")
    return Manifest(path, pairs=True, unique=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variance", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--json", type=Path, help="Report file (default: results/vrpo-SPEC.json).")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=20_261_121)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--beta", type=float, default=0.2, help="Beta of the trained loss.")
    parser.add_argument(
        "--betas",
        type=float,
        nargs="+",
        default=[0.1, 0.2, 1.0, 5.0],
        help="Betas whose variance is measured.",
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--parts", nargs="+", default=["backbone.lora"], help="Parts to train.")
    parser.add_argument(
        "--pairs", type=int, default=12, help="Number of pairs whose variance is measured."
    )
    parser.add_argument("--draws", type=int, default=24, help="Number of mask samples per pair.")
    parser.add_argument(
        "--away",
        type=int,
        nargs="+",
        default=[0, 50, 200],
        help="Training steps before each measurement.",
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="Pairs per step.")
    parser.add_argument("--count", type=int, default=1500, help="Number of training pairs.")
    parser.add_argument("--test-pairs", type=int, default=300, help="Number of held-out pairs.")
    parser.add_argument(
        "--utterances", type=int, default=200, help="Number of utterances to transcribe."
    )
    parser.add_argument("--judged", type=int, default=16, help="Mask samples per held-out bound.")
    parser.add_argument("--sft", type=float, default=0.05)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.json or RESULTS / f"vrpo-{Path(args.spec).stem}.json"
    previous = json.loads(path.read_text()) if path.is_file() else {}
    report = previous | {"spec": args.spec, "digest": Spec.read(args.spec).digest()}
    with tempfile.TemporaryDirectory() as folder:
        if args.variance:
            results = variance(args, Path(folder) / "variance")
            others = [row for row in previous.get("variance", []) if row["samples"] != args.samples]
            report["variance"] = sorted(others + results, key=lambda row: row["samples"])
        if args.train:
            report["training"] = train_preferences(args, Path(folder) / "train")
            print(json.dumps({k: v for k, v in report["training"].items() if k != "curve"}))
    write_report(report, path)


if __name__ == "__main__":
    main()
