"""Sources of samples are found among installed packages, and their constructors are schemas."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import toy
from helpers.fakes import install, site_packages
from helpers.toy import QUIET

from diffa.data.manifest import Manifest
from diffa.data.samples import (
    CheckedSource,
    CurriculumSource,
    DataError,
    Sample,
    SpeakerSource,
    TimedSource,
)
from diffa.data.sources import open_source
from diffa.errors import PluginError
from diffa.spec import registry
from diffa.trainers import train

TONES = """
import torch
from diffa.data.samples import Sample

class Tones:
    def __init__(self, *, count: int = 4, answers: list[str] = ["high"], pitch: float = 440.0):
        self.count, self.answers, self.pitch = count, answers, pitch
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        wave = torch.sin(torch.arange(8000) * self.pitch * 6.2832 / 16000)
        answer = self.answers[index % len(self.answers)]
        return Sample(answer, "high ?", audio=wave, rate=16000, key=f"tone-{index}")
"""


@pytest.fixture
def tones(tmp_path, monkeypatch):
    """An installed package that offers the source ``tones``."""
    for site in site_packages(tmp_path / "site", monkeypatch):
        install(
            site, "acme-tones", {"source": {"tones": "acme_tones:Tones"}}, {"acme_tones": TONES}
        )
        registry.clear_scan()
        yield site


def test_a_source_of_a_third_party_is_opened_by_name(tones):
    assert {"nano", "nano-text", "tones"} <= set(registry.available("source"))
    source = open_source("tones", {"count": 3, "pitch": 220})
    assert len(source) == 3 and source.pitch == 220.0
    assert open_source("acme-tones:tones", {})[0].target == "high"


def test_a_source_of_a_third_party_feeds_a_recipe_with_its_own_options(tones, world, tmp_path):
    recipe = {
        "spec": toy.spec(world / "tokenizer"),
        "stages": [
            {
                "name": "align",
                "data": [{"source": "tones", "options": {"count": 6, "answers": ["low", "two"]}}],
                "train": ["adapters"],
                "max_steps": 2,
                "batch_size": 2,
                "save_steps": 2,
            }
        ],
    }
    report = train(recipe, out=tmp_path / "run", console=QUIET, device="cpu")
    assert report.stages[0].rows == 6 and report.stages[0].skipped == 0
    recipe["stages"][0]["data"][0]["options"] = {"cuont": 6}
    with pytest.raises(DataError, match=r"source 'tones': .*'cuont', did you mean 'count'"):
        train(recipe, out=tmp_path / "other", console=QUIET, device="cpu")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"cuont": 3}, r"no option 'cuont', did you mean 'count'\?"),
        ({"count": "3"}, "count: expected int, got '3'"),
        ({"answers": [1]}, "answers.0: expected str, got 1"),
        ({"pitch": float("nan"), "x": 1}, "no option 'x'.*pitch: expected float.*finite"),
    ],
)
def test_options_of_a_source_that_do_not_fit_are_named(tones, options, fault):
    with pytest.raises(DataError, match=f"source 'tones': .*{fault}"):
        open_source("tones", options)


def test_an_unknown_source_brings_a_suggestion(tones):
    with pytest.raises(DataError, match=r"no source 'tonse', did you mean 'tones'\?"):
        open_source("tonse", {})
    with pytest.raises(DataError, match=r"no source 'mine', did you mean 'mime'\?"):
        open_source("mine", {}, {"mime": list})


def test_two_packages_with_one_source_ask_for_the_package(tones):
    install(tones, "beta-tones", {"source": {"tones": "acme_tones:Tones"}})
    registry.clear_scan()
    with pytest.raises(DataError, match="write 'acme-tones:tones' or 'beta-tones:tones'"):
        open_source("tones", {})


def test_a_name_that_diffa_ships_means_diffas_source(tones):
    install(tones, "acme-nano", {"source": {"nano-text": "acme_tones:Tones"}})
    registry.clear_scan()
    assert registry.find_part("source", "nano-text").target == "diffa.nano.sources:NanoText"
    assert open_source("acme-nano:nano-text", {}).answers == ["high"]


def test_a_source_without_a_length_breaks_the_contract(tones):
    install(tones, "half", {"source": {"half": "half:Half"}}, {"half": "class Half:\n    pass\n"})
    registry.clear_scan()
    with pytest.raises(PluginError, match=r"source Half lacks __len__, __getitem__; .* from half"):
        open_source("half", {})


def test_a_callers_own_factory_comes_first_and_takes_any_options():
    class Mine:
        def __init__(self, whatever):
            self.whatever = whatever

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Sample("a")

    assert isinstance(open_source("nano", {"whatever": object()}, {"nano": Mine}), Mine)
    with pytest.raises(DataError, match=r"source 'nano': .*unexpected keyword"):
        open_source("nano", {"other": 1}, {"nano": Mine})


def test_optional_members_of_a_source_are_recognised_by_their_protocols(world):
    text = open_source("nano-text", {"count": 3})
    assert isinstance(text, CurriculumSource)
    assert not isinstance(text, TimedSource | SpeakerSource | CheckedSource)
    manifest = Manifest(world / "train.json")
    assert isinstance(manifest, CheckedSource) and isinstance(manifest, TimedSource)


@pytest.mark.fsdd
def test_nano_is_timed_grows_and_names_its_speakers():
    source = open_source("nano", {"count": 4, "synthetic_voices": False})
    assert isinstance(source, TimedSource) and isinstance(source, CurriculumSource)
    assert isinstance(source, SpeakerSource) and "theo" in source.speakers


def test_data_imports_nothing_of_nano():
    folder = Path(__file__).parents[2] / "diffa" / "data"
    assert [path for path in folder.rglob("*.py") if "diffa.nano" in path.read_text()] == []
