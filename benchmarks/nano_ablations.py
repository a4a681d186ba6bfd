"""The ablations of DIFFA's paper at nano's scale: backbone and adapters, encoders.

    python benchmarks/nano_ablations.py --out runs/nano-ablations

Every cell trains nano's adapters anew under several seeds, before the same frozen encoder and
language model, and answers questions about the same test utterances. It goes on where it was
stopped. The table of answer lengths and block lengths is ``nano_blocks.py``'s.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from reports import write_report

from diffa.ablation.study import Study, ablate
from diffa.ablation.table import summary_rows

RESULTS = Path(__file__).parent / "results" / "nano-ablations.json"
SCORES = {
    "open questions": "scores.open all",
    "choices": "scores.choice all",
    "digit error 6-8": "scores.digit error 6-8",
    "caption error": "scores.caption token error",
    "accent": "scores.open accent",
    "gender": "scores.open gender",
}


def grids(llada: str) -> dict[str, list[str]]:
    """Return the grids: the paper's Table 5, and encoders before the semantic adapter."""
    masked = f'{{name: llada, checkpoint: "{llada}"}}'
    causal = '{name: llama, checkpoint: "package:nano/llama"}'
    untrained = (
        "{name: tiny, width: 192, layers: 4, heads: 6, window_seconds: 8.0, trailing_silence: 0.5}"
    )
    trained = '{name: whisper, checkpoint: "package:nano/whisper", trailing_silence: 0.5}'
    return {
        "backbone and adapters": [
            f"backbone={masked},{causal}",
            "adapters=both,semantic",
        ],
        "encoder": [
            "adapters=semantic",
            f"encoder={trained},{untrained},{{name: mel}}",
            f"backbone={masked}",
        ],
    }


def table(study: Study) -> list[dict[str, Any]]:
    """One row per cell: means over seeds with Student's 95 % intervals, and every seed's value."""
    entries = []
    for row in summary_rows(study, "scores.open all"):
        if not row.means:
            continue
        entry: dict[str, Any] = {
            "settings": row.labels,
            "stages": row.stages,
            "parameters": row.parameters,
            "trained": row.trained,
        }
        for name, key in SCORES.items():
            mean = row.means[key]
            entry[name] = {"mean": mean.mean, "half": mean.half, "seeds": row.by_seed[key]}
        entries.append(entry)
    return entries


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    names = list(rows[0]["settings"])
    lines = ["| " + " | ".join([*names, "seeds", "trained", *SCORES]) + " |"]
    lines.append("|" + "---|" * (len(names) + 2 + len(SCORES)))
    for row in rows:
        cells = [
            *row["settings"].values(),
            str(len(row["choices"]["seeds"])),
            f"{row['trained']:,}",
        ]
        for name in SCORES:
            half = row[name]["half"]
            more = "" if half is None else f" ± {half:.3f}"
            cells.append(f"{row[name]['mean']:.3f}{more}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the studies")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of every stage")
    parser.add_argument("--count", type=int, default=40, help="test utterances")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--llada", default="package:nano/llada", help="the masked language model")
    parser.add_argument("--features", type=Path, help="where an encoder's features are kept")
    parser.add_argument("--collect", action="store_true", help="tell what there is, train nothing")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    changes = [f"stages.{i}.max_steps={args.steps}" for i in range(3)]
    features = (args.features or args.out / "features").resolve()
    changes += [f"stages.{i}.cache.folder={features}" for i in range(3)]
    script = Path(__file__).with_name("nano.py").resolve()
    score = f"{sys.executable} {script} --spec {{model}} --count {args.count} --json {{json}}"
    report: dict[str, Any] = {
        "seeds": args.seeds,
        "steps": args.steps,
        "utterances": args.count,
    }
    for name, vary in grids(args.llada).items():
        study = ablate(
            "nano-adapters",
            vary,
            out=args.out,
            seeds=args.seeds,
            overrides=changes,
            score=score,
            jobs=args.jobs,
            dry_run=args.collect,
            on_message=print,
        )
        report[name] = table(study._replace(results=study.load_results()))
        if report[name]:
            print(markdown(report[name]))
    write_report(report, args.json)


if __name__ == "__main__":
    main()
