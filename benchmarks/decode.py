"""Compare decoding with the published loop: caches, rules, batches, block-causal models.

The block-causal rows decode models of the same shape whose attention has blocks of 32: ``block``
counts them from the end of the prompt (as LLaDA does), ``sdar`` from position 0; ``sdar, second
question`` comes after one about the same recording. ``pass_over_dual`` is the median CPU
time of a pass after the first over that of ``dual``, ``prefill_over_dual`` that of the first pass.

All rows run in one process, a step of each in turn, so that a busy machine slows them alike. Peak
memory is measured in a process of its own for each row, weights excluded.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import published
import torch
from reports import RESULTS, process_memory, write_report
from torch import Tensor

import diffa
from diffa.canvas.canvas import Canvas, insert_audio
from diffa.canvas.denoiser import Denoiser
from diffa.canvas.prefix_cache import PrefixCache
from diffa.spec.spec import Spec
from diffa.types import block_attention

AUDIO, PROMPT, AT, LENGTH, BLOCK = 439, 64, 16, 32, 32
SIZES = {
    "default": {"d_model": 1024, "n_layers": 12, "n_heads": 16, "mlp_hidden_size": 3072},
    "small": {"d_model": 256, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 768},
    "8b": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288},
}
QUICK = ("exact", "prefix", "dual")
BLOCKS = ("block", "sdar", "sdar, second question")


class Rung(NamedTuple):
    """One row of the ladder: the sampler's options and how many rows it decodes at once."""

    sampler: dict[str, Any]
    rows: int = 1
    backbone: str = ""
    second: bool = False


def ladder(steps: int) -> dict[str, Rung]:
    """Return everything that is measured besides the baseline."""
    dual: dict[str, Any] = {"cache": "dual"}
    options: dict[str, tuple[dict[str, Any], int]] = {
        "exact": ({"steps": steps, "stop_at_eos": False}, 1),
        "stop": ({"steps": steps}, 1),
        "prefix": ({"steps": steps, "stop_at_eos": False, "cache": "prefix"}, 1),
        "dual": ({"steps": steps, "stop_at_eos": False, **dual}, 1),
        "vicinity": ({"steps": steps, **dual, "vicinity_window": 8}, 1),
        "suffix window": ({"steps": steps, "cache": "prefix", "suffix_window": 32}, 1),
        "threshold": ({"threshold": 0.9, **dual}, 1),
        "factor": ({"factor": 1.0, **dual}, 1),
        "entropy bound": ({"entropy_bound": 0.1, **dual}, 1),
        "local leap": ({"threshold": 0.9, "neighbor_threshold": 0.75, **dual}, 1),
        "run threshold": ({"threshold": 0.9, "run_threshold": 0.4, **dual}, 1),
        "KLASS": ({"threshold": 0.6, "kl_threshold": 0.015, **dual}, 1),
        "credit": ({"threshold": 0.9, "credit_strength": 0.7, **dual}, 1),
        "dual-batch4": ({"steps": steps, **dual}, 4),
    }
    rungs = {
        name: Rung({"name": "blockwise", "block_length": BLOCK, **sampler}, rows)
        for name, (sampler, rows) in options.items()
    }
    block = {"name": "blockwise", "stop_at_eos": False, "cache": "prefix"}
    rungs["block"] = Rung(block, backbone="llada")
    rungs["sdar"] = Rung(block, backbone="sdar")
    rungs["sdar, second question"] = Rung(block, backbone="sdar", second=True)
    return rungs


def spec(size: str, block: str = "") -> dict[str, Any]:
    """A random LLaDA of the stated shape, or a block-causal model; the audio is random."""
    config = {
        **SIZES[size],
        "vocab_size": 126464,
        "embedding_size": 126464,
        "max_sequence_length": 4096,
        "rope_theta": 500000.0,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
    }
    encoder = {"name": "tiny", "width": 16, "layers": 1, "heads": 1}
    adapters = {"semantic": {"name": "linear", "intermediate_size": 16}}
    backbone = {
        "name": block or "llada",
        "config": config,
        "block_length": BLOCK if block else None,
    }
    if block == "sdar":
        names = {
            "hidden_size": "d_model", "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads", "intermediate_size": "mlp_hidden_size",
        }  # fmt: skip
        backbone["config"] = {**config, **{own: config[name] for own, name in names.items()}}
    return {"format": 1, "encoder": encoder, "adapters": adapters, "backbone": backbone}


def question(model: Any, seed: int = 0) -> published.Question:
    """A random prompt with random audio embeddings of the size that tokens have."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 126000, (PROMPT,), generator=generator)
    audio = 0.02 * torch.randn(AUDIO, model.backbone.width, generator=generator)
    return published.Question(prompt, audio, AT)


def open_canvas(model: Any, questions: list[published.Question]) -> tuple[Canvas, Denoiser]:
    """Build the canvas that ``model.generate`` builds, with audio already embedded."""
    embed, vocab = model.backbone.embed, model.backbone.vocab
    embeds, text = insert_audio(
        [q.prompt for q in questions],
        [q.audio for q in questions],
        [q.at for q in questions],
        embed,
    )
    place = embeds.values.device
    answer = torch.full((len(questions), LENGTH), vocab.mask, device=place)
    seeds = torch.zeros(len(questions), dtype=torch.long, device=place)
    attention = block_attention(model.backbone)
    canvas = Canvas(
        embeds, text, answer, embed=embed, vocab=vocab, seeds=seeds, attention=attention
    )
    return canvas, Denoiser(model.backbone, canvas)


class Run:
    """One decoder, advanced and timed step by step."""

    def __init__(self, steps: Iterator[Any], num_forwards: Callable[[], int]) -> None:
        self._steps, self.num_forwards = steps, num_forwards
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.answers: list[Tensor] = []

    def step(self) -> bool:
        """Take one step; return False if there is none left."""
        begin, worked = time.perf_counter(), time.process_time()
        with torch.no_grad():
            result = next(self._steps, None)
        if result is None:
            return False
        self.times.append(time.perf_counter() - begin)
        self.cpu.append(time.process_time() - worked)
        self.answers.append(result if isinstance(result, Tensor) else result.tokens)
        return True


def start(model: Any, rung: Rung) -> Run:
    """Start one of diffa's decoders."""
    sampler = diffa.swap(model, sampler=rung.sampler).sampler
    with torch.no_grad():
        questions = [question(model, row) for row in range(rung.rows)]
        canvas, denoise = open_canvas(model, questions)
        if rung.second:
            prefixes = PrefixCache()
            # The same recording, another question behind it.
            prompt = questions[0].prompt.clone()
            prompt[AT:] = prompt[AT:].flip(0)
            other, first = open_canvas(model, [questions[0]._replace(prompt=prompt)])
            next(sampler(other, first))
            prefixes.store(other, first.kv_cache)
            prefixes.load(canvas, denoise.kv_cache)
        return Run(sampler(canvas, denoise), lambda: denoise.num_forwards)


def race(runs: dict[str, Run], after: Callable[[int], None] | None = None) -> None:
    """Advance every run by one step in turn until all are done; call ``after`` after each round."""
    alive, count = dict(runs), 0
    while alive:
        alive = {name: run for name, run in alive.items() if run.step()}
        if after is not None and alive:
            after(count)
        count += 1


class Sampled:
    """A few of the baseline's equal steps, each taken where the exact decoder stood."""

    def __init__(self, model: Any, exact: Run, steps: int, count: int) -> None:
        self._model, self._exact, self._question = model, exact, question(model)
        self._plan = published.schedule(LENGTH, steps, BLOCK)
        self._selected = set(torch.linspace(0, steps - 1, count).long().tolist())
        self._begin = torch.full((1, LENGTH), model.backbone.vocab.mask)
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.same = True

    def after(self, count: int) -> None:
        """Take the baseline's step ``count`` if it is one of the selected, and compare."""
        if count not in self._selected:
            return
        before = self._exact.answers[count - 1] if count else self._begin
        started, worked = time.perf_counter(), time.process_time()
        result = published.step(self._model, self._question, before, *self._plan[count])
        self.times.append(time.perf_counter() - started)
        self.cpu.append(time.process_time() - worked)
        self.same &= torch.equal(result, self._exact.answers[count])

    def total(self, times: list[float]) -> float:
        """Scale the steps that were taken to all of them."""
        return sum(times) / len(times) * len(self._plan)


def to_first_eos(answer: Tensor, eos: int) -> list[int]:
    """The tokens of answer (A,) up to its first EOS."""
    tokens: list[int] = answer.tolist()
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def measure(size: str, steps: int, names: list[str], checked: int | None) -> list[dict[str, Any]]:
    """Race the baseline (or ``checked`` of its steps) against the named rungs."""
    model = diffa.build(spec(size))
    rungs = ladder(steps)
    models = {"": model}
    for kind in {rungs[name].backbone for name in names} - {""}:
        models[kind] = diffa.build(spec(size, kind))
    runs = {name: start(models[rungs[name].backbone], rungs[name]) for name in names}
    if checked is None:
        loop = published.decode(model, question(model), length=LENGTH, steps=steps, block=BLOCK)
        plain = Run(loop, lambda: steps)
        race({"baseline": plain, **runs})
        seconds, worked = sum(plain.times), sum(plain.cpu)
        expected, same = plain.answers[-1], True
    else:
        some = Sampled(model, runs["exact"], steps, checked)
        race(runs, some.after)
        seconds, worked = some.total(some.times), some.total(some.cpu)
        expected, same = runs["exact"].answers[-1], some.same
    eos = model.backbone.vocab.eos
    reference = to_first_eos(expected[0], eos)
    first = row("baseline", seconds, steps, seconds, reference, reference, 1)
    rows = [first | {"cpu_seconds": round(worked, 4)}]
    for name, run in runs.items():
        result = to_first_eos(run.answers[-1][0], eos)
        line = row(
            name, sum(run.times), run.num_forwards(), seconds, result, reference, rungs[name].rows
        )
        line["identical"] &= same
        more = {"prefill": round(run.times[0], 4), "cpu_seconds": round(sum(run.cpu), 4)}
        if rungs[name].backbone:  # another model: its tokens cannot be the baseline's
            line |= {"identical": None, "agreement": None}
        if "dual" in runs:
            window = statistics.median(run.cpu[1:]), statistics.median(runs["dual"].cpu[1:])
            more["pass_over_dual"] = round(window[0] / window[1], 3)
            more["prefill_over_dual"] = round(run.cpu[0] / runs["dual"].cpu[0], 3)
        rows.append(line | more)
    return rows


def row(
    name: str,
    seconds: float,
    num_forwards: int,
    base: float,
    result: list[int],
    reference: list[int],
    rows: int,
) -> dict[str, Any]:
    """One line of the report; ``speedup`` is over the baseline's seconds per answer."""
    same = sum(a == b for a, b in zip(result, reference, strict=False))
    return {
        "name": name,
        "rows": rows,
        "seconds": round(seconds, 4),
        "num_forwards": num_forwards,
        "tokens_per_forward": round(len(result) * rows / num_forwards, 3),
        "speedup": round(base * rows / seconds, 2),
        "identical": result == reference,
        "agreement": round(same / max(len(result), len(reference)), 3),
        "tokens_per_second": round(len(result) * rows / seconds, 3),
    }


def peak(size: str, steps: int, name: str) -> int:
    """Peak memory of two forward passes above what the process holds with its weights, in bytes."""
    with torch.device("meta"):
        model = diffa.build(spec(size), device="meta")
    model = model.to_empty(device="cpu").eval()
    for weight in model.parameters():
        weight.data.fill_(0.01)
    with torch.no_grad():
        if name == "baseline":
            loop = published.decode(model, question(model), length=LENGTH, steps=steps, block=BLOCK)
            run = Run(loop, lambda: steps)
        else:
            run = start(model, ladder(steps)[name])
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = process_memory("VmRSS")
        run.step()
        run.step()
    return process_memory("VmHWM") - before


def peaks(size: str, steps: int, names: list[str]) -> dict[str, int | None]:
    """Peak memory of each row, measured in a process of its own; None off Linux."""
    if sys.platform != "linux":
        return dict.fromkeys(names)
    peak_memory: dict[str, int | None] = {}
    for name in names:
        line = [sys.executable, __file__, "--size", size, "--steps", str(steps), "--peak", name]
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ)
        peak_memory[name] = int(done.stdout.split()[-1])
    return peak_memory


def table(rows: list[dict[str, Any]]) -> str:
    """Format the report as a table."""
    head = (
        "name", "seconds", "num_forwards", "tokens_per_forward", "speedup", "identical",
        "pass_over_dual", "prefill_over_dual",
    )  # fmt: skip
    lines = [" ".join(f"{name:>21}" for name in (*head, "peak MiB"))]
    for line in rows:
        memory = line["peak_bytes"]
        cells = [*(line.get(name, "-") for name in head), "-" if memory is None else memory >> 20]
        lines.append(" ".join(f"{cell!s:>21}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="Run few rungs and only some of the baseline's steps."
    )
    parser.add_argument("--json", type=Path, help="Additional file for the report.")
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--steps", type=int, default=LENGTH)
    parser.add_argument(
        "--checked", type=int, default=4, help="Number of baseline steps that --quick times."
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(args.size, args.steps, args.peak))
        return
    names = [*QUICK, *BLOCKS] if args.quick else list(ladder(args.steps))
    rows = measure(args.size, args.steps, names, args.checked if args.quick else None)
    memory = peaks(args.size, args.steps, ["baseline", *QUICK])
    for line in rows:
        line["peak_bytes"] = memory.get(line["name"])
    digest = Spec.read(spec(args.size)).digest()
    shape = {"size": args.size, "audio": AUDIO, "prompt": PROMPT, "answer": LENGTH}
    report = {"spec": digest, **shape, "threads": args.threads, "rows": rows}
    target = RESULTS / f"decode-{args.size}-{digest}.json"
    for path in (args.json, None if args.quick else target):
        write_report(report, path)
    print(table(rows))


if __name__ == "__main__":
    main()
