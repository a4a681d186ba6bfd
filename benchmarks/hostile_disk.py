"""Kills and full disks: nothing that was written is lost, and the next run leaves no trace of them.

    python benchmarks/hostile_disk.py --out benchmarks/results/hostile-disk.json

Needs Linux and the Free Spoken Digit Dataset (DIFFA_FSDD). A process that has imported diffa forks
a child for every trial: it trains, maps, saves, evaluates or writes a corpus, and is killed at a
random moment, or finds a disk with so many KiB left. Then the same command runs undisturbed.

A trial is a loss if the second run fails or its files differ from those of a run that was never
disturbed, or if a recording, a shard or weights under their final name are incomplete after the
first. It is a leftover if the second run leaves a file that the undisturbed one has not. Files that
differ between two undisturbed runs (they hold times) are not compared.

The disks are a tmpfs in a mount namespace of its own (``unshare``), partly filled by another file.
Where the system has none, RLIMIT_FSIZE bounds every file instead (EFBIG for ENOSPC).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reports import write_report

import diffa
from diffa.audio import write_wav
from diffa.cli import main as run_command
from diffa.errors import DiffaError

Job = Callable[[Path], None]
FREE_KIB = (0, 4, 8, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DISK = 16 * 2**20  # bytes of a disk; every command fits in
ATOMIC = (".parquet", ".safetensors", ".wav", ".pt")


def make_jobs(world: Path) -> dict[str, Job]:
    """Write the inputs of the commands; return the commands, which take their output's path."""
    rng = np.random.default_rng(0)
    for number in range(6):
        wave = (0.1 * rng.standard_normal(8000)).astype(np.float32)
        write_wav(world / f"{number}.wav", wave, 16_000)
    rows = [
        {"audio_id": f"r{n}", "audio_filepath": f"{n}.wav", "input": "What is this?",
         "target": "noise", "duration": 0.5}
        for n in range(6)
    ]  # fmt: skip
    questions = [
        {"id": f"q{n}", "task_name": "noise", "audio_path": f"{n}.wav", "question": "Which?",
         "choice_a": "hiss", "choice_b": "hum", "choice_c": "speech", "choice_d": "music",
         "answer_gt": "hiss", "category": "Perception", "sub-category": "paralinguistics",
         "sub-sub-category": "noise", "linguistics_sub_discipline": "none"}
        for n in range(6)
    ]  # fmt: skip
    for name, lines in (("rows", rows), ("questions", questions)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (world / f"{name}.jsonl").write_text(text)
    torch.manual_seed(0)
    model = diffa.build("tiny")
    diffa.save(model, world / "tiny")
    stage = {
        "name": "align", "data": [{"path": "rows.jsonl"}], "train": ["adapters"], "max_steps": 4,
        "batch_size": 2, "save_steps": 1, "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    (world / "recipe.yaml").write_text(
        json.dumps({"spec": "tiny", "save_total_limit": 2, "stages": [stage]})
    )
    common = ["--spec", str(world / "tiny"), "--device", "cpu", "--max-tokens", "4"]

    def train(out: Path) -> None:
        words = ["train", str(world / "recipe.yaml"), "--device", "cpu", "--out", str(out)]
        run_command([*words, "--resume"] if any(out.glob("*/")) else words)

    def map_rows(out: Path) -> None:
        options = ["--shard", "1", "--batch", "1", "--threads", "1", "--out", str(out)]
        run_command(["map", str(world / "rows.jsonl"), *common, *options])

    def evaluate(out: Path) -> None:
        options = ["--data", str(world / "questions.jsonl"), "--batch", "1", "--out", str(out)]
        run_command(["eval", "run", "mmsu", *common, *options])

    def save(out: Path) -> None:
        for _ in range(20):
            diffa.save(model, out)

    def data(out: Path) -> None:
        run_command(["data", "nano", "--split", "test", "--count", "12", "--out", str(out)])

    return {"train": train, "map": map_rows, "save": save, "eval": evaluate, "data": data}


def warm_up(jobs: dict[str, Job], place: Path) -> None:
    """Run every command once in this process, so that no child pays for imports."""
    for name, job in jobs.items():
        try:
            job(place / name)
        except SystemExit as error:
            if error.code:
                raise
        shutil.rmtree(place / name)


def fork(job: Job, out: Path, log: Path, limit: int | None = None) -> int:
    """Run a job in a child with a process group of its own; return the child's id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        job(out)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except DiffaError as error:
        print(f"diffa: {error}")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Return the exit code of a child; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones included."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class Trials:
    """Disturbs one command again and again, and compares what the next run makes of it.

    Args:
        job: The command.
        place: An empty folder; ``place / "out"`` is the command's output.
        log: File for what the command prints.
    """

    KINDS = ("trials", "disturbed", "losses", "leftovers", "unworded")

    def __init__(self, job: Job, place: Path, log: Path) -> None:
        self.job, self.place, self.out, self.log = job, place, place / "out", log
        self.seconds = 0.0
        self.expected = self.undisturbed()
        again = self.undisturbed()
        self.compared = {name for name, data in self.expected.items() if again.get(name) == data}
        self.faults: list[str] = []
        self.counts = dict.fromkeys(self.KINDS, 0)

    def undisturbed(self) -> dict[str, bytes]:
        """Run the command in an empty place; return the files."""
        self.clear()
        begin = time.perf_counter()
        if code := wait(fork(self.job, self.out, self.log)):
            raise SystemExit(f"exit code {code}: {self.log.read_text()}")
        self.seconds = time.perf_counter() - begin
        return contents(self.place)

    def clear(self) -> None:
        """Empty the place."""
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def kill(self, moment: float, *, full: bool) -> None:
        """Kill the command after ``moment`` seconds and run it again; ``full``: over its output."""
        if full:
            self.undisturbed()
        else:
            self.clear()
        child = fork(self.job, self.out, self.log)
        time.sleep(moment)
        os.killpg(child, signal.SIGKILL) if os.getpgid(child) == child else os.kill(child, 9)
        self.check(f"killed after {moment:.3f} s", wait(child) < 0, full=full)

    def fill(self, kib: int, ballast: Callable[[int], None], limit: int | None) -> None:
        """Run the command with ``kib`` KiB of space, then with all of it."""
        self.clear()
        ballast(DISK - kib * 1024)
        code = wait(fork(self.job, self.out, self.log, limit))
        text = self.log.read_text(errors="replace")
        if code and ("Traceback" in text or "RuntimeError" in text):
            self.fault("unworded", f"{kib} KiB left", text[-300:])
        ballast(0)
        self.check(f"{kib} KiB left", code != 0, full=False)

    def check(self, event: str, disturbed: bool, *, full: bool) -> None:
        """Compare what is there now, and after another run, with the undisturbed run."""
        self.counts["trials"] += 1
        self.counts["disturbed"] += disturbed
        now = contents(self.place)
        for name in self.compared:
            missing = full and name not in now
            if name.endswith(ATOMIC) and now.get(name, self.expected[name]) != self.expected[name]:
                self.fault("losses", event, f"{name} is incomplete")
            elif missing:
                self.fault("losses", event, f"{name} is gone")
        if code := wait(fork(self.job, self.out, self.log)):
            text = self.log.read_text(errors="replace")[-300:]
            return self.fault("losses", event, f"exit code {code} of the next run: {text}")
        then = contents(self.place)
        different = [name for name in self.compared if then.get(name) != self.expected[name]]
        if missing_names := sorted({*different, *(self.expected.keys() - then.keys())}):
            self.fault("losses", event, f"other than undisturbed: {', '.join(missing_names[:4])}")
        if extra := sorted(then.keys() - self.expected.keys()):
            self.fault("leftovers", event, ", ".join(extra[:4]))

    def fault(self, kind: str, event: str, text: str) -> None:
        """Count a fault and keep its text."""
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {event}: {text}")

    def report(self) -> dict[str, Any]:
        """Return counts and faults."""
        files = {"files": len(self.expected), "compared": len(self.compared)}
        return {**self.counts, **files, "seconds": round(self.seconds, 3), "faults": self.faults}


def progress(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def run_kills(jobs: dict[str, Job], place: Path, log: Path, count: int) -> dict[str, Any]:
    """Kill every command ``count`` times, at moments over its whole run."""
    rng, reports = random.Random(0), {}
    for name, job in jobs.items():
        trials = Trials(job, place, log)
        progress(f"kills: {name}, {trials.seconds:.1f} s each")
        for number in range(count):
            moment = trials.seconds * (number + rng.random()) / count
            trials.kill(moment, full=name == "save")
        reports[name] = trials.report()
    return reports


def run_disks(jobs: dict[str, Job], place: Path, log: Path, *, mounted: bool) -> dict[str, Any]:
    """Run every command on a disk of every fill level; ``place`` is the disk."""

    def ballast(size: int) -> None:
        file = place.parent / f"{place.name}.ballast" if not mounted else place / "ballast"
        file.unlink(missing_ok=True)
        if mounted and size:
            file.write_bytes(bytes(size))

    reports = {}
    for name, job in jobs.items():
        trials = Trials(job, place, log)
        progress(f"disks: {name}")
        for kib in FREE_KIB:
            trials.fill(kib, ballast, None if mounted else kib * 1024)
        reports[name] = trials.report()
    return reports


def mount(place: Path) -> bool:
    """Mount a small disk, if this process has a mount namespace of its own."""
    if "--in-namespace" not in sys.argv:
        return False
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    return subprocess.run(words, capture_output=True).returncode == 0


def enter_namespace() -> None:
    """Start this program again in a mount namespace of its own, where the system has them."""
    words = ["unshare", "--user", "--map-root-user", "--mount"]
    if "--in-namespace" in sys.argv or shutil.which("unshare") is None:
        return
    if subprocess.run([*words, "true"], capture_output=True).returncode == 0:
        os.execvp(words[0], [*words, sys.executable, *sys.argv, "--in-namespace"])


def main() -> None:
    """Run kills and disks, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills of each command")
    parser.add_argument("--only", nargs="*", default=[], help="commands (default: all)")
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    enter_namespace()
    torch.set_num_threads(1)  # forked children must not wait for the parent's threads
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        world, place, disk = (Path(folder) / name for name in ("world", "kills", "disk"))
        for path in (world, place, disk):
            path.mkdir()
        jobs = make_jobs(world)
        jobs = {name: job for name, job in jobs.items() if name in (arguments.only or jobs)}
        warm_up(jobs, world)
        kills = run_kills(jobs, place, world / "log", arguments.kills)
        mounted = mount(disk)
        disks = run_disks(jobs, disk, world / "log", mounted=mounted)
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
    report = {
        "kills": kills,
        "disk": "tmpfs" if mounted else "RLIMIT_FSIZE",
        "free_kib": FREE_KIB,
        "disks": disks,
        "total": {
            part: {key: sum(row[key] for row in rows.values()) for key in Trials.KINDS}
            for part, rows in (("kills", kills), ("disks", disks))
        },
        "minutes": round((time.perf_counter() - begin) / 60, 1),
    }
    write_report(report, arguments.out)
    print(json.dumps(report, indent=1))
    faults = sum(report["total"][part][kind] for part in ("kills", "disks")
                 for kind in ("losses", "leftovers", "unworded"))  # fmt: skip
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
