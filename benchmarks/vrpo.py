"""Preference optimisation on nano: what shared masks do to variance, and what training does.

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
from reports import write
from rich.console import Console
from torch import Tensor

import diffa
from diffa.data.collate import Batch, Collate
from diffa.data.manifest import Manifest
from diffa.data.rows import AnswerTransform, AudioTransform, PreferenceTransform
from diffa.data.samples import seed_of
from diffa.nano.preferences import write_preferences
from diffa.spec.spec import Spec
from diffa.trainers import train
from diffa.trainers.evaluate import compare
from diffa.trainers.learners.preferences import Prefers
from diffa.trainers.trainable import release

RESULTS = Path(__file__).parent / "results"
SHOWN = ("loss", "accuracy", "margin", "chosen", "rejected")


def spec_of(chosen: argparse.Namespace, **objective: Any) -> Spec:
    """The named spec with LoRA on its backbone and the preference objective."""
    rule = {"name": "vrpo", "samples": chosen.samples, "beta": chosen.beta, **objective}
    lora = {"rank": chosen.rank, "alpha": 2.0 * chosen.rank}
    return Spec.read(chosen.spec).change(
        {"backbone.lora": lora, "objective": rule, "train": chosen.parts}
    )


# --- variance -----------------------------------------------------------------------------------


class Moments:
    """Mean and variance of vectors, one after another (Welford)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.apart: Tensor | float = 0.0

    def add(self, value: Tensor) -> None:
        """Take in one more."""
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
    return Collate(model.backbone.vocab, learn_padding=False)([make(data[row], seed_of(row, draw))])


def variance(chosen: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Variances after some steps of training each, with shared masks and without."""
    data = manifest(chosen, folder, "train", chosen.pairs)
    torch.manual_seed(0)
    model = diffa.build(spec_of(chosen))
    release(model, chosen.parts)
    learner = Prefers(model).train()
    learning = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=chosen.lr)
    found, done = [], 0
    for away in sorted(chosen.away):
        for step in range(done, away):
            optimizer.zero_grad()
            learner(pair_batch(model, data, step % len(data), -1 - step)).sum.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
        done = away
        ways = {"shared": True, "apart": False}
        both = {name: spread(learner, data, chosen, way) for name, way in ways.items()}
        for shared, apart in zip(both["shared"], both["apart"], strict=True):
            ratios = {
                key: apart[key] / max(shared[key], 1e-30) for key in ("margin", "loss", "gradient")
            }
            row = {"steps": away, "samples": chosen.samples, "beta": shared["beta"]}
            row |= {"pairs": chosen.pairs, "draws": chosen.draws, "parts": chosen.parts}
            found.append(row | {"shared": shared, "apart": apart, "apart_over_shared": ratios})
            print(json.dumps(row | ratios))
    return found


def spread(
    learner: Prefers, data: Manifest, chosen: argparse.Namespace, shared: bool
) -> list[dict[str, float]]:
    """Variance over draws of masks of one pair's margin, loss and gradient; mean over pairs.

    The loss is -log sigmoid(beta g) of a gain g, and its gradient -beta sigmoid(-beta g) times
    that of g: one pass serves every beta.
    """
    learning = [p for p in learner.parameters() if p.requires_grad]
    rule = learner.model.objective
    kept, rule.shared_masks, rule.beta = (
        rule.beta,
        shared,
        1e-3,
    )  # small: its sigmoid never underflows
    rows = min(len(data), chosen.pairs)
    kinds = ("margin", "loss", "gradient", "mean_margin", "mean_gradient")
    sums = [dict.fromkeys(kinds, 0.0) for _ in chosen.betas]
    for row in range(rows):
        of = [{key: Moments() for key in ("margin", "loss", "gradient")} for _ in chosen.betas]
        for draw in range(chosen.draws):
            parts = learner(pair_batch(learner.model, data, row, draw))
            grads = torch.autograd.grad(parts.sum, learning, allow_unused=True)
            assert parts.notes is not None
            margin = parts.notes["margin"].double()
            flat = torch.cat([g.flatten() for g in grads if g is not None]).double()
            gain = margin / rule.beta
            slope = flat / (-rule.beta * torch.sigmoid(-margin))  # the gain's gradient
            for beta, moments in zip(chosen.betas, of, strict=True):
                moments["margin"].add(beta * gain)
                moments["loss"].add(-F.logsigmoid(beta * gain))
                moments["gradient"].add(-beta * torch.sigmoid(-beta * gain) * slope)
        for found, moments in zip(sums, of, strict=True):
            for key, one in moments.items():
                found[key] += one.variance / rows
            found["mean_margin"] += float(moments["margin"].mean) / rows
            found["mean_gradient"] += float(torch.as_tensor(moments["gradient"].mean).norm()) / rows
    rule.beta = kept
    return [{"beta": beta} | found for beta, found in zip(chosen.betas, sums, strict=True)]


# --- training -----------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Held-out preference accuracy and mean margin, and word error of transcription."""

    accuracy: float
    margin: float
    word_error: float


def train_preferences(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a preference stage and measure before and after.

    LoRA alone learns unless ``--parts`` says otherwise: adapters of this size that learn along are
    moved by the noise of a small batch, and .78 of held-out pairs were right after 300 such steps.
    """
    held = manifest(chosen, folder, "test", chosen.held)
    manifest(chosen, folder, "train", chosen.count)
    stage = {
        "name": "prefer",
        "kind": "preferences",
        "data": [{"path": str(folder / "train-preferences.jsonl"), "unique": False}],
        "train": chosen.parts,
        "steps": chosen.steps,
        "batch": chosen.batch,
        "grouped": False,
        "save": max(chosen.steps, 1),
        "optimizer": {"lr": chosen.lr, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup": 0.05},
    }
    recipe = {"spec": spec_of(chosen, sft_weight=chosen.sft).data, "stages": [stage]}
    spoken = heard(chosen)
    torch.manual_seed(0)
    first = diffa.build(spec_of(chosen))
    before = Scores(0.5, 0.0, word_error(first, spoken))
    out = Path(tempfile.mkdtemp(dir=folder))
    start = time.perf_counter()
    report = train(recipe, out=out / "run", console=Console(stderr=True))
    seconds = time.perf_counter() - start
    assert report.model is not None
    after = score(first, report.model, held, chosen, spoken)
    log = [json.loads(line) for line in (out / "run/1-prefer/log.jsonl").read_text().splitlines()]
    curve = [{key: row[key] for key in ("step", *SHOWN)} for row in log if "margin" in row]
    return {
        "parts": chosen.parts,
        "lr": chosen.lr,
        "samples": chosen.samples,
        "beta": chosen.beta,
        "sft_weight": chosen.sft,
        "steps": chosen.steps,
        "batch": chosen.batch,
        "train_pairs": chosen.count,
        "held_pairs": len(held),
        "transcriptions": len(spoken),
        "seconds": round(seconds, 1),
        "before": before._asdict(),
        "after": after._asdict(),
        "curve": curve[:: max(1, len(curve) // 20)],
    }


@torch.no_grad()
def score(
    first: Any, last: Any, held: Manifest, chosen: argparse.Namespace, spoken: list[Any]
) -> Scores:
    """Compare the trained policy's bounds with those of the model it began as."""
    for model in (first, last):
        model.eval().objective.samples = chosen.judged
    right = margin = 0.0
    rule = last.objective
    for row in range(len(held)):
        batch = pair_batch(last, held, row, 0)
        noised = rule.draws(batch.tokens, batch.answer, batch.seeds)
        bounds = [Prefers(model)._bounds(batch, noised) for model in (last, first)]
        found = float(rule.compare(*bounds).margin)
        right += (found > 0) + 0.5 * (found == 0)
        margin += found
    return Scores(right / len(held), margin / len(held), word_error(last, spoken))


def heard(chosen: argparse.Namespace) -> list[Any]:
    """Freshly composed test utterances with digits in them."""
    from diffa.nano.corpus.utterances import Utterances

    speech = Utterances("test", chosen.seed + 7)
    made = (speech[i] for i in range(20 * chosen.spoken))
    kept = (u for u in made if u.labels.digits)
    return [u for u, _ in zip(kept, range(chosen.spoken), strict=False)]


@torch.no_grad()
def word_error(model: Any, spoken: list[Any]) -> float:
    """Word errors per word when asked to transcribe."""
    from diffa.data.corpora.fsdd import DIGIT_WORDS

    model = diffa.swap(model, sampler=model.spec.data["sampler_presets"]["exact"])
    wanted = [" ".join(DIGIT_WORDS[d] for d in u.labels.digits) for u in spoken]
    written: list[str] = []
    for at in range(0, len(spoken), 16):
        waves = [torch.from_numpy(u.audio) for u in spoken[at : at + 16]]
        asked = ["Please transcribe the audio to text."] * len(waves)
        written += model.answer(waves, asked, max_tokens=16).text
    return compare(written, wanted)["error"]


def manifest(chosen: argparse.Namespace, folder: Path, split: Any, count: int) -> Manifest:
    """Pairs of a split, written once."""
    path = folder / f"{split}-preferences.jsonl"
    if not path.is_file():
        path = write_preferences(folder, split, chosen.seed, count, form="jsonl")
    return Manifest(path, pairs=True, unique=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variance", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--json", type=Path, help="where to write; results/vrpo-SPEC.json if not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=20_261_121)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--beta", type=float, default=0.2, help="that is trained with")
    parser.add_argument(
        "--betas", type=float, nargs="+", default=[0.1, 0.2, 1.0, 5.0], help="whose variance"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--parts", nargs="+", default=["backbone.lora"], help="that learn")
    parser.add_argument("--pairs", type=int, default=12, help="whose variance is measured")
    parser.add_argument("--draws", type=int, default=24, help="of masks, for each pair")
    parser.add_argument(
        "--away", type=int, nargs="+", default=[0, 50, 200], help="steps of training before that"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--count", type=int, default=1500, help="pairs to learn from")
    parser.add_argument("--held", type=int, default=300, help="held-out pairs")
    parser.add_argument("--spoken", type=int, default=200, help="transcriptions")
    parser.add_argument("--judged", type=int, default=16, help="draws of a held-out bound")
    parser.add_argument("--sft", type=float, default=0.05)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    path = chosen.json or RESULTS / f"vrpo-{Path(chosen.spec).stem}.json"
    held = json.loads(path.read_text()) if path.is_file() else {}
    report = held | {"spec": chosen.spec, "digest": Spec.read(chosen.spec).digest()}
    with tempfile.TemporaryDirectory() as folder:
        if chosen.variance:
            found = variance(chosen, Path(folder) / "variance")
            kept = [row for row in held.get("variance", []) if row["samples"] != chosen.samples]
            report["variance"] = sorted(kept + found, key=lambda row: row["samples"])
        if chosen.train:
            report["training"] = train_preferences(chosen, Path(folder) / "train")
            print(json.dumps({k: v for k, v in report["training"].items() if k != "curve"}))
    write(report, path)


if __name__ == "__main__":
    main()
