"""The plugin for lmms-eval: against a stand-in of its interface, and against itself where it is."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import toy

from diffa.errors import AudioError, DiffaError, SpecError
from diffa.integrations.lmms_audio import concatenate_recordings, load_recording

RATE = 16_000


class Request(NamedTuple):
    """What lmms-eval hands to a model: its ``Instance``, as far as a model reads it."""

    args: tuple[Any, ...]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of lmms-eval 0.7.3 that the plugin imports, with their behaviour."""

    class Hook:
        def __init__(self) -> None:
            self.added: list[Any] = []

        def add_partial(self, *given: Any) -> None:
            self.added.append(given)

    class Model:
        is_simple = True

        def __init__(self) -> None:
            self._rank, self._world_size, self.task_dict = 0, 1, {}
            self.cache_hook = Hook()

        @property
        def rank(self) -> int:
            return self._rank

    class Manifest(NamedTuple):
        model_id: str
        simple_class_path: str

    class Result(NamedTuple):
        text: Any

    parts = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.api.instance": {"GenerationResult": Result},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    for name, names in parts.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "diffa.integrations.lmms_model", raising=False)
    yield
    sys.modules.pop("diffa.integrations.lmms_model", None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer, as a spec file."""
    import json

    folder = tmp_path_factory.mktemp("lmms")
    path = folder / "spec.json"
    path.write_text(json.dumps(toy.spec(toy.write_tokenizer(folder / "tokenizer"))))
    return path


def model(saved: Path, **options: Any) -> Any:
    from diffa.integrations.lmms_model import Diffa

    torch.manual_seed(0)
    made = Diffa(spec=str(saved), device="cpu", **options)
    documents = [
        {"array": toy.tone(200 + 50 * n, 0.4 + n / 10), "sampling_rate": RATE} for n in range(5)
    ]
    made.task_dict = {"tones": {"test": documents}}
    return made


def heard(document: Any) -> list[Any]:
    return [document]


def asked(number: int, question: str = "What ?", length: int = 4, **wishes: Any) -> Request:
    wanted = {"max_new_tokens": length, **wishes}
    return Request((question, wanted, heard, number, "tones", "test"))


def test_the_entry_point_names_the_model(stand_in: None) -> None:
    from diffa.integrations.lmms import manifest

    made = manifest()
    module, _, name = made.simple_class_path.rpartition(".")
    assert made.model_id == "diffa"
    __import__(module)
    assert getattr(sys.modules[module], name).is_simple


def test_the_plugin_is_declared_to_lmms_eval() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["lmms_eval.models"]
    assert points == {"diffa": "diffa.integrations.lmms:manifest"}


def test_answers_are_the_models_own_in_the_order_of_the_requests(
    stand_in: None, saved: Path
) -> None:
    made = model(saved, batch_size=2)
    requests = [asked(3, length=6), asked(0), asked(4, length=6), asked(1), asked(2, "How many ?")]
    texts = made.generate_until(requests)
    documents = made.task_dict["tones"]["test"]
    for request, text in zip(requests, texts, strict=True):
        question, wishes, _, number, *_ = request.args
        wave = torch.from_numpy(documents[number]["array"])
        alone = made.model.answer(wave, question, max_tokens=wishes["max_new_tokens"])
        assert text == alone.text
    assert any(texts)
    added = made.cache_hook.added
    assert len(added) == 5 and {one[0] for one in added} == {"generate_until"}


def test_a_paper_s_length_overrules_the_task_s(stand_in: None, saved: Path) -> None:
    made = model(saved, max_tokens=3)
    wave = torch.from_numpy(made.task_dict["tones"]["test"][0]["array"])
    assert made.generate_until([asked(0, length=64)]) == [
        made.model.answer(wave, "What ?", max_tokens=3).text
    ]


def test_answers_end_at_a_stop(stand_in: None, saved: Path) -> None:
    from diffa.integrations.lmms_model import cut

    assert cut("one\ntwo. three", ["\n\n", ". ", "\n"]) == "one"
    assert cut("one", ["", "x"]) == "one"
    made = model(saved)
    (whole,) = made.generate_until([asked(0)])
    assert whole
    assert made.generate_until([asked(0, until=whole[-1])]) == [whole.partition(whole[-1])[0]]
    with pytest.raises(SpecError, match="until must be"):
        made.generate_until([asked(0, until=5)])


def test_a_broken_recording_is_answered_with_nothing_and_counted(
    stand_in: None, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = model(saved, batch_size=4)
    made.task_dict["tones"]["test"][1] = str(saved)  # not audio
    with caplog.at_level("WARNING", "diffa.lmms"):
        texts = made.generate_until([asked(n) for n in range(3)])
    assert texts[1] == "" and texts[0] and texts[2]
    assert made.num_unreadable == 1 and "document 1" in caplog.text
    with pytest.raises(DiffaError, match="none of 1 recordings"):
        made.generate_until([asked(1)])


def test_sampling_that_a_diffusion_sampler_ignores_is_told(
    stand_in: None, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = model(saved)
    with caplog.at_level("WARNING", "diffa.lmms"):
        made.generate_until([asked(0, temperature=0, num_beams=1, do_sample=False)])
        assert caplog.text == ""
        made.generate_until([asked(0, temperature=0.7)])
    assert "temperature" in caplog.text


def test_choices_are_scored_as_losses_with_shared_draws(stand_in: None, saved: Path) -> None:
    made = model(saved, samples=8)
    choices = ["high", "low", "one two three"]
    where = (heard, 0, "tones", "test")
    requests = [Request(("What ?", f" {choice}", *where)) for choice in choices]
    found = [one.text for one in made.loglikelihood(requests)]
    wave = torch.from_numpy(made.task_dict["tones"]["test"][0]["array"])
    score = made.model.score(wave, "What ?", choices, samples=8)
    losses = (-score.values / score.lengths).tolist()
    assert [loss for loss, _ in found] == pytest.approx(losses)
    assert (
        np.argmin([loss * n for (loss, _), n in zip(found, score.lengths, strict=True)])
        == score.best
    )
    by_target = made.loglikelihood([Request(("What ?", lambda document: "high", *where))])
    assert by_target[0].text[0] == pytest.approx(
        (-made.model.score(wave, "What ?", ["high"], samples=8).values[0]).item()
    )


def test_what_is_not_offered_is_refused(stand_in: None, saved: Path) -> None:
    made = model(saved)
    with pytest.raises(DiffaError, match="one question at a time"):
        made.generate_until_multi_round([])
    with pytest.raises(SpecError, match="batch_size"):
        model(saved, batch_size="auto")
    with pytest.raises(SpecError, match="unknown option"):
        model(saved, changes="sampler.block_lenth=4")
    assert (
        model(saved, changes="sampler.block_length=4").model.spec.data["sampler"]["block_length"]
        == 4
    )


def test_every_form_of_a_recording_is_read(tmp_path: Path) -> None:
    import io

    import soundfile

    wave = toy.tone(300)
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    stereo = np.stack([wave, wave])

    class Samples(NamedTuple):
        data: torch.Tensor
        sample_rate: int

    class Decoder:
        def get_all_samples(self) -> Samples:
            return Samples(torch.from_numpy(stereo), RATE)

    stored = io.BytesIO(path.read_bytes()).getvalue()
    forms: list[Any] = [
        str(path),
        {"array": wave, "sampling_rate": RATE},
        {"array": wave.astype(np.float64).tolist(), "sampling_rate": RATE},
        {"array": stereo, "sampling_rate": RATE},
        {"array": stereo.T, "sampling_rate": RATE},
        {"bytes": stored, "path": "gone.wav"},
        {"bytes": None, "path": str(path)},
        Decoder(),
    ]
    for form in forms:
        assert torch.allclose(load_recording(form, RATE), torch.from_numpy(wave), atol=1e-6)
    assert len(load_recording({"array": wave, "sampling_rate": 8000}, RATE)) == 2 * len(wave)


@pytest.mark.parametrize("form", [{"array": None}, 5, {"bytes": b"no audio"}, {"rate": 3}, ["a"]])
def test_other_forms_are_refused(form: Any) -> None:
    with pytest.raises(AudioError):
        load_recording(form, RATE)


def test_several_recordings_are_joined_with_pauses() -> None:
    one, two = torch.ones(4), torch.full((2,), 2.0)
    assert concatenate_recordings([], 10) is None
    assert concatenate_recordings([one, two], 10).tolist() == [1.0] * 4 + [0.0] * 5 + [2.0] * 2  # type: ignore[union-attr]


@pytest.mark.skipif(
    find_spec("lmms_eval") is None, reason="lmms-eval is not installed (docs/data.md says how)"
)
def test_lmms_eval_itself_finds_and_runs_the_model(saved: Path) -> None:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    assert get_model("diffa").__name__ == "Diffa"
    made = get_model("diffa").create_from_arg_string(
        f"spec={saved},max_tokens=4", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    made.task_dict = {"tones": {"test": [{"array": toy.tone(200), "sampling_rate": RATE}]}}
    metadata = {"task": "tones", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until", asked(0).args, 0, metadata)
    assert len(made.generate_until([request, request])) == 2
