"""Decoding and losses repeat the reference code's own numbers, digit for digit where it matters."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import diffa
from diffa.types import Noised

GOLDEN = Path(__file__).parent
FOLDERS = ["diffa1-tiny", "diffa2-tiny"]
LIVE = "diffa2-tiny, LoRA live"
CASE = re.compile(
    r"(?:generate\.clip(?P<clip>\d)|text)\.(?P<loop>llada|parallel|cache_\w+)"
    r"\.length(?P<length>\d+)\.block(?P<block>\d+)(?:\.steps(?P<steps>\d+))?"
    r"(?:\.guidance(?P<guidance>[\d.]+))?(?:\.factor(?P<factor>[\d.]+|None))?"
    r"(?:\.threshold(?P<threshold>[\d.]+|None))?"
)


class Golden(NamedTuple):
    """One folder: the model its files make, and what the reference computes."""

    model: Any
    values: dict[str, torch.Tensor]
    counts: dict[str, Any]

    def waveform(self, clip: int) -> torch.Tensor:
        return self.values[f"clip{clip}.waveform"].float() / 32768


def read(name: str) -> Golden:
    name, _, form = name.partition(", ")
    folder = GOLDEN / name
    parts = str(folder / "diffa")
    backbone: dict[str, Any] = {"name": "llada", "checkpoint": str(folder / "llada")}
    if name == "diffa2-tiny":
        backbone["lora"] = {"checkpoint": parts, "merge": not form}
    spec = {
        "encoder": {"name": "whisper", "checkpoint": str(folder / "whisper")},
        "adapters": {
            "acoustic": {"name": "qformer", "checkpoint": parts},
            "semantic": {"name": "conv", "checkpoint": parts},
        },
        "backbone": backbone,
    }
    values = load_file(folder / "expected.safetensors")
    return Golden(diffa.build(spec), values, json.loads((folder / "expected.json").read_text()))


@pytest.fixture(scope="module")
def golden() -> dict[str, Golden]:
    return {name: read(name) for name in (*FOLDERS, LIVE)}


def cases() -> list[tuple[str, str]]:
    names = []
    for folder in FOLDERS:
        values = load_file(GOLDEN / folder / "expected.safetensors")
        names += [(folder, name) for name in sorted(values) if CASE.fullmatch(name)]
    heard = [(LIVE, name) for folder, name in names if folder == "diffa2-tiny" and "clip" in name]
    return names + heard


def options(found: dict[str, str | None]) -> dict[str, Any]:
    """The blockwise sampler's options for a case: a threshold or factor excludes steps."""
    rule: dict[str, Any] = {"stop_at_eos": False}
    for name in ("factor", "threshold", "steps"):
        value = found[name]
        if value not in (None, "None"):
            rule[name] = int(value) if name == "steps" else float(value)
            break
    loop = found["loop"] or ""
    if loop.startswith("cache_"):
        rule["cache"] = loop.removeprefix("cache_")
    if found["guidance"]:
        rule["cfg_scale"] = float(found["guidance"])
    return {"name": "blockwise", "block_length": int(found["block"] or 0), **rule}


@pytest.mark.parametrize(("folder", "case"), cases())
def test_decoding_repeats_the_reference_sequence(
    golden: dict[str, Golden], folder: str, case: str
) -> None:
    model, values, counts = golden[folder]
    match = CASE.fullmatch(case)
    assert match is not None
    found = match.groupdict()
    model = diffa.swap(model, sampler=options(found))
    length = int(found["length"] or 0)
    if found["clip"] is None:
        made = model.generate(values["text.prompt"], max_tokens=length)
    else:
        clip = f"generate.clip{found['clip']}"
        wave = golden[folder].waveform(int(found["clip"]))
        at = int(values[f"{clip}.audio_at"])
        made = model.generate(values[f"{clip}.prompt"], wave, audio_at=at, max_tokens=length)
    assert made.tokens[0].tolist() == values[case].flatten().tolist()
    # The reference's cached loops also run a forward for a block that the refresh finished.
    assert made.num_forwards <= counts.get(case, int(found["steps"] or length))


def test_every_recorded_sequence_is_a_case() -> None:
    values = load_file(GOLDEN / FOLDERS[0] / "expected.safetensors")
    recorded = [n for n in values if re.search(r"length\d", n) and not n.endswith("length")]
    assert len(recorded) == 31
    assert sorted(recorded) == sorted(case for folder, case in cases() if folder == FOLDERS[0])


@pytest.mark.parametrize("folder", [*FOLDERS, LIVE])
def test_logits_are_the_references(golden: dict[str, Golden], folder: str) -> None:
    model, values, _ = golden[folder]
    with torch.no_grad():
        logits = model.logits(model.backbone.embed(values["llada.tokens"]))
    assert (logits - values["llada.logits"]).abs().max() < 2e-3


class Recorded:
    """The masked objective with a recorded corruption in place of a drawn one."""

    decoding = "masked"

    def __init__(self, objective: Any, noised: Noised) -> None:
        self.loss, self.noised = objective.loss, noised

    def corrupt(self, tokens: torch.Tensor, answer: torch.Tensor, seeds: torch.Tensor) -> Noised:
        return self.noised


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("clip", [0, 1])
def test_losses_are_the_references(golden: dict[str, Golden], folder: str, clip: int) -> None:
    model, values, counts = golden[folder]
    case = counts[f"loss.clip{clip}"]
    tokens = values[f"loss.clip{clip}.tokens"][None]
    masked = values[f"loss.clip{clip}.masked"].bool()[None]
    answer = torch.arange(tokens.shape[1])[None] >= case["prompt_length"]
    noisy = tokens.masked_fill(masked, model.backbone.vocab.mask)
    wave = golden[folder].waveform(clip)[None]
    for weight, name, divisor in ((1.0, "nll_sum", None), (1 / case["level"], "loss", "answer")):
        noised = Noised(noisy, masked, masked * weight, answer)
        rule = model.objective
        model.objective = Recorded(rule, noised)
        try:
            with torch.no_grad():
                loss = model.loss(
                    tokens,
                    answer,
                    torch.tensor([0]),
                    lengths=torch.tensor([tokens.shape[1]]),
                    audio_at=torch.tensor([case["audio_at"]]),
                    audio=(wave, torch.tensor([wave.shape[1]])),
                )
        finally:
            model.objective = rule
        value = loss.sum / loss.weight if divisor else loss.sum
        expected = float(values[f"loss.clip{clip}.{name}"])
        assert float(value) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("shape", [(32, 8, 32), (32, 16, 8), (4, 4, 4)])
def test_the_benchmarks_baseline_is_the_reference_loop(
    golden: dict[str, Golden], folder: str, shape: tuple[int, int, int], monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import published

    model, values, _ = golden[folder]
    length, block, steps = shape
    with torch.no_grad():
        heard = model.listen(golden[folder].waveform(0)).values[0]
    prompt, at = values["generate.clip0.prompt"], int(values["generate.clip0.audio_at"])
    asked = published.Question(prompt, heard, at)
    made = list(published.decode(model, asked, length=length, steps=steps, block=block))
    case = f"generate.clip0.llada.length{length}.block{block}.steps{steps}.guidance0"
    assert made[-1][0].tolist() == values[case].tolist()
    assert len(made) == steps
