"""Score nano on utterances composed from FSDD's test recordings: python benchmarks/nano.py."""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from reports import write_report

import diffa
from diffa.data.corpora.fsdd import ACCENTS
from diffa.evaluation.word_errors import count_edits
from diffa.nano.corpus.examples import all_instructions
from diffa.nano.corpus.utterances import Utterances

LENGTHS = {"caption": 24, "transcribe": 16}  # of the answers; the others get 8 tokens


def main() -> None:
    """Answer, score, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--sampler-preset", default="exact")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20_261_121)
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument(
        "--speaker", choices=sorted(ACCENTS), help="Use only this speaker's recordings."
    )
    parser.add_argument(
        "--held-out", action="store_true", help="Ask in paraphrases that training does not use."
    )
    parser.add_argument(
        "--shuffled", action="store_true", help="Use another row's audio (control experiment)."
    )
    parser.add_argument(
        "--scoring", action="store_true", help="Choose by likelihood instead of generation."
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_model(args.spec, args.sampler_preset)
    begin = time.perf_counter()
    rows, num_forwards = (choose_by_likelihood if args.scoring else ask)(model, args)
    seconds = time.perf_counter() - begin
    result = {
        **{key: str(value) for key, value in vars(args).items() if key != "json"},
        "digest": model.spec.digest(),
        "num_forwards": num_forwards,
        "seconds": round(seconds, 1),
        "scores": table(rows),
    }
    for name, score in result["scores"].items():
        ends = [score["low"], score["high"]]
        interval = "-" if None in ends else "[{:.3f}, {:.3f}]".format(*ends)
        print(f"{name:24s} {score['value']:.3f}  {interval}  n={score['n']}")
    write_report(result, args.json)


def load_model(spec: str, sampler_preset: str) -> diffa.Model:
    """Build a spec, or load the folder of a trained model, which may have no sampler presets."""
    saved = (Path(spec) / "model.safetensors").is_file()
    model = diffa.load(spec) if saved else diffa.build(spec)
    sampler_presets = model.spec.data.get("sampler_presets") or {}
    return diffa.swap(model, sampler=sampler_presets[sampler_preset]) if sampler_presets else model


def utterances(args: Any) -> Utterances:
    """Return utterances of all speakers, or of one."""
    if args.speaker is None:
        return Utterances(args.split, args.seed)
    others = tuple(name for name in ACCENTS if name != args.speaker)
    return Utterances(args.split, args.seed, exclude_speakers=others, synthetic_voices=False)


def ask(model: diffa.Model, args: Any) -> tuple[list[dict[str, Any]], int]:
    """Ask every question about every utterance; return the records and forward passes."""
    speech = utterances(args)
    groups: dict[int, list[tuple[Any, torch.Tensor, Any]]] = defaultdict(list)
    samples = [speech[index] for index in range(args.count)]
    for index, utterance in enumerate(samples):
        source = samples[(index + 7) % len(samples)] if args.shuffled else utterance
        wave = torch.from_numpy(source.audio)
        for trial in all_instructions(utterance.labels, args.seed, index, args.held_out):
            groups[LENGTHS.get(trial.task, 8)].append((trial, wave, utterance.labels))
    rows, num_forwards = [], 0
    for length, group in groups.items():
        group.sort(key=lambda item: len(item[1]))
        for begin in range(0, len(group), 16):
            part = group[begin : begin + 16]
            answer = model.answer(
                [wave for _, wave, _ in part],
                [trial.question for trial, _, _ in part],
                max_tokens=length,
            )
            num_forwards += answer.num_forwards
            rows += [
                record(trial, labels, text)
                for (trial, _, labels), text in zip(part, answer.text, strict=True)
            ]
    return rows, num_forwards


def choose_by_likelihood(model: diffa.Model, args: Any) -> tuple[list[dict[str, Any]], int]:
    """Choose the most likely of the four answers ("A. four" and so on)."""
    speech, rows, num_samples = utterances(args), [], 8
    for index in range(args.count):
        utterance = speech[index]
        wave = torch.from_numpy(utterance.audio)
        for trial in all_instructions(utterance.labels, args.seed, index, args.held_out):
            if trial.form == "choice":
                pairs = zip("ABCD", trial.choices, strict=True)
                answers = [f"{letter}. {text}" for letter, text in pairs]
                best = model.score(
                    wave, trial.question, answers, samples=num_samples, batch=32
                ).best
                rows.append(record(trial, utterance.labels, answers[best]))
    return rows, 0


def record(trial: Any, labels: Any, text: str) -> dict[str, Any]:
    """Return the errors of one answer among its tokens, or whether it is right."""
    if trial.task in ("transcribe", "caption"):
        reference, words = trial.answer.split(), text.split()
        digits = len(labels.digits)
        band = "1" if digits == 1 else "2-5" if digits <= 5 else "6-8"
        name = f"digit error {band}" if trial.task == "transcribe" else "caption token error"
        if trial.task == "transcribe" and not digits:
            return {"name": "nothing said", "hits": int(text == "nothing"), "of": 1}
        return {"name": name, "hits": count_edits(reference, words).errors, "of": len(reference)}
    right = text[:1] == trial.answer[:1] if trial.form == "choice" else text == trial.answer
    return {"name": f"{trial.form} {trial.task}", "hits": int(right), "of": 1}


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return shares with Wilson's 95 % intervals, by name and over all questions of a form."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        form = row["name"].split()[0]
        names = [row["name"], *([f"{form} all"] if form in ("choice", "open") else [])]
        for name in names:
            sums[name][0] += row["hits"]
            sums[name][1] += row["of"]
    return {name: wilson(hits, of) for name, (hits, of) in sorted(sums.items())}


def wilson(hits: int, of: int) -> dict[str, Any]:
    """Return a share with its 95 % interval (Wilson 1927); an error rate above 1 has none."""
    if hits > of:
        return {"value": hits / of, "low": None, "high": None, "n": of}
    share, z = hits / of, 1.96
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    wide = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return {"value": share, "low": max(middle - wide, 0), "high": middle + wide, "n": of}


if __name__ == "__main__":
    main()
