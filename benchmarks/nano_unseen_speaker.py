"""Accuracy on a speaker whose recordings the encoder and adapters were not trained on.

    python benchmarks/nano_unseen_speaker.py --out runs/unseen-speaker --speaker theo

The encoder and both adapters learn from nothing, by ``recipes/nano.yaml`` without the speaker's
recordings and with the steps that are given; the language model that ships, which learned from
text alone, stays. Then the speaker's test recordings are asked about, and beside them those of
somebody whom this model has heard, and the model that ships is asked the same. An interrupted
training is continued when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from reports import RESULTS, write_report

from diffa.data.corpora.fsdd import ACCENTS
from diffa.trainers.config import Recipe
from diffa.trainers.run import train

METRICS = ("digit error 2-5", "digit error 6-8", "open count", "open accent", "choice all")


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """nano's recipe without its text stages, and without the speaker."""
    whole = Recipe.read("nano").data
    steps = {
        "listen": args.listen,
        **dict.fromkeys(("transcribe", "align", "instruct"), args.adapt),
    }
    stages = [stage | {"max_steps": steps[stage["name"]]} for stage in whole["stages"]
              if stage["name"] in steps]  # fmt: skip
    for stage in stages:
        for source in stage["data"]:
            source["options"] = source["options"] | {"exclude_speakers": [args.speaker]}
    backbone = {"name": "llada", "checkpoint": args.llada}
    return {**whole, "spec": {**whole["spec"], "backbone": backbone}, "stages": stages}


def score(spec: str, speaker: str, args: argparse.Namespace) -> dict[str, Any]:
    """nano.py's scores of a model on utterances of one person alone."""
    out = args.out / "scores" / f"{Path(spec).name}-{speaker}.json"
    script = Path(__file__).with_name("nano.py")
    words = ["--spec", spec, "--speaker", speaker, "--count", str(args.count)]
    subprocess.run([sys.executable, str(script), *words, "--json", str(out)], check=True)
    scores: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["scores"]
    return {name: scores[name] for name in METRICS if name in scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the training")
    parser.add_argument(
        "--speaker", choices=sorted(ACCENTS), default="theo", help="Speaker left out of training."
    )
    parser.add_argument(
        "--beside",
        choices=sorted(ACCENTS),
        default="george",
        help="Speaker of the training data to compare with.",
    )
    parser.add_argument("--listen", type=int, default=1900, help="steps of the encoder")
    parser.add_argument("--adapt", type=int, default=500, help="steps of each adapter stage")
    parser.add_argument("--llada", default="package:nano/llada")
    parser.add_argument("--count", type=int, default=60, help="test utterances of each speaker")
    parser.add_argument("--json", type=Path, default=RESULTS / "nano-unseen-speaker.json")
    args = parser.parse_args()
    train(recipe(args), out=args.out / "run", resume=(args.out / "run").is_dir())
    people = {"left out": args.speaker, "trained on": args.beside}
    models = {"without the speaker": str(args.out / "run" / "model"), "nano": "nano"}
    report: dict[str, Any] = {
        "speaker": args.speaker,
        "beside": args.beside,
        "steps": {"listen": args.listen, "transcribe, align, instruct": args.adapt},
        "utterances": args.count,
    }
    for name, spec in models.items():
        report[name] = {part: score(spec, person, args) for part, person in people.items()}
        print(name, json.dumps(report[name]))
    write_report(report, args.json)


if __name__ == "__main__":
    main()
