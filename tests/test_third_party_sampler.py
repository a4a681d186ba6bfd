"""A sampler from somebody else's package: found, checked, built and used like diffa's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import toy

import diffa
from diffa.errors import SpecError
from diffa.spec import registry
from diffa.testing import SamplerSuite, failures

SOURCE = '''
"""Unmask from right to left, one token per forward."""

from diffa.types import Step


class Backwards:
    """Write the answer's last token first."""

    decoding = "masked"

    def __init__(self, vocab, *, sure: bool = True) -> None:
        self.vocab, self.sure = vocab, sure

    def __call__(self, canvas, denoise):
        """Fill the canvas, yielding after every forward."""
        while bool((masked := canvas.undecided()).any()):
            last = masked.shape[1] - 1 - masked.flip(1).int().argmax(dim=1, keepdim=True)
            slot = (last + canvas.start).where(masked.any(dim=1, keepdim=True), last - last - 1)
            logits = denoise(None, slot).float()
            logits[..., self.vocab.mask] = float("-inf")
            confidence, tokens = logits.softmax(dim=-1).max(dim=-1)
            canvas.write(slot, tokens, confidence)
            final = ~canvas.undecided()
            yield Step(canvas.answer.clone(), final, canvas.confidence.clone())
'''
# what an author may get wrong: a mask that is accepted stays undecided for ever
BROKEN = SOURCE.replace('            logits[..., self.vocab.mask] = float("-inf")\n', "")


@pytest.fixture(params=["whole", "broken"])
def package(request, tmp_path: Path, monkeypatch):
    """Somebody's package on the path, with its metadata, as pip would leave it."""
    source = SOURCE if request.param == "whole" else BROKEN
    (tmp_path / "acme_backwards.py").write_text(source)
    info = tmp_path / "acme_backwards-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-backwards\nVersion: 1.2\n")
    point = "[diffa.samplers]\nacme-backwards = acme_backwards:Backwards\n"
    (info / "entry_points.txt").write_text(point)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.clear_scan()
    yield request.param
    sys.modules.pop("acme_backwards", None)
    monkeypatch.undo()
    registry.clear_scan()


def suite() -> type[SamplerSuite]:
    return type("TestBackwards", (SamplerSuite,), {"name": "acme-backwards"})


@pytest.mark.parametrize("package", ["whole"], indirect=True)
def test_it_conforms_and_answers(package, tmp_path):
    assert failures(suite()) == {}
    (part,) = [part for part in registry.list_parts("sampler") if part.dist == "acme-backwards"]
    assert (part.name, part.version) == ("acme-backwards", "1.2")
    spec = toy.spec(toy.write_tokenizer(tmp_path / "tokenizer"))
    spec["encoder"] = {"name": "tiny", "window_seconds": 1.0, "width": 16, "layers": 2, "heads": 2}
    model = diffa.build({**spec, "sampler": {"name": "acme-backwards", "sure": False}})
    assert type(model.sampler).__name__ == "Backwards" and model.sampler.sure is False
    steps: list[list[bool]] = []
    model = model.generate(
        torch.tensor([7, 8, 9]), torch.zeros(16000), max_tokens=4,
        on_step=lambda step: steps.append(step.final[0].tolist()),
    )  # fmt: skip
    assert model.num_forwards == 4
    assert steps == [[column >= 3 - n for column in range(4)] for n in range(4)]
    with pytest.raises(SpecError, match="shure: unknown option, did you mean 'sure'"):
        diffa.build({**spec, "sampler": {"name": "acme-backwards", "shure": 1}})


@pytest.mark.parametrize("package", ["broken"], indirect=True)
def test_one_that_accepts_masks_is_found_out(package):
    assert BROKEN != SOURCE
    assert "test_it_ends_with_everything_decided" in failures(suite())
