"""The command line: answers on stdout, everything else on stderr, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from helpers.fakes import POOL, install, site_packages

import diffa
from diffa.cli import main
from diffa.cli.ask import TRANSCRIBE
from diffa.cli.doctor import attempt, examine
from diffa.cli.models import default_spec
from diffa.errors import AudioError, SpecError
from diffa.spec import registry
from diffa.transcripts import Transcript

SPEC = """
encoder: tiny
adapters: {semantic: conv}
backbone: {name: llada, config: {d_model: 8}}
sampler: quick
sampler_presets: {quick: {name: blockwise, threshold: 0.9}, slow: blockwise}
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path in which packages can be installed, and nothing of them stays."""
    yield from site_packages(tmp_path, monkeypatch)


@pytest.fixture
def diffa_(capsys):
    """Run a command in this process: its exit code, stdout and stderr."""

    def run(*words: str) -> SimpleNamespace:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        code = end.value.code
        written = capsys.readouterr()
        return SimpleNamespace(code=code or 0, out=written.out, err=written.err)

    return run


@pytest.fixture
def mine(tmp_path):
    """A small spec in a file."""
    path = tmp_path / "mine.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def fake(monkeypatch):
    """A model that answers with what it was asked, in the place of ``diffa.build``."""
    calls: dict[str, object] = {}

    def build(spec, *, device="cpu", dtype=None):
        calls.update(spec=spec, device=device)
        return SimpleNamespace(answer=answer, transcribe=transcribe, spec=spec.resolve())

    def answer(audio, question, *, system=None, max_tokens=None, on_step=None):
        if audio == "missing.wav":
            raise AudioError("there is no file missing.wav")
        calls.update(system=system, max_tokens=max_tokens)
        return SimpleNamespace(
            text=f"{audio}: {question}", tokens=[1, 2], num_forwards=3, confidence=-0.5
        )

    def transcribe(audio, *, instruction, **options):
        return Transcript(f"{audio}: {instruction}", [], -0.5, 3)

    monkeypatch.setattr(diffa, "build", build, raising=False)
    return calls


def test_ask_prints_the_answer_alone_on_stdout(diffa_, fake, mine):
    done = diffa_("ask", "a.wav", "Who?", "--spec", mine, "--max-tokens", 9, "--system", "Hi.")
    assert (done.code, done.out) == (0, "a.wav: Who?\n")
    assert "3 forward passes" in done.err
    assert (fake["max_tokens"], fake["system"]) == (9, "Hi.")


def test_ask_in_json_names_the_spec_that_answered(diffa_, fake, mine):
    done = diffa_(
        "ask", "a.wav", "Who?", "--spec", mine, "--json", "--set", "sampler.block_length=4"
    )
    result = json.loads(done.out)
    assert result["text"] == "a.wav: Who?" and result["tokens"] == [1, 2]
    assert result["digest"] == fake["spec"].digest() != diffa.Spec.read(mine).digest()
    assert fake["spec"].resolve().data["sampler"]["block_length"] == 4


def test_transcribe_asks_for_the_text(diffa_, fake, mine):
    done = diffa_("transcribe", "a.wav", "--spec", mine)
    assert done.out == f"a.wav: {TRANSCRIBE}\n"
    assert diffa_("transcribe", "a.wav", "--spec", mine, "--instruction", "Go").out == "a.wav: Go\n"


def test_a_sampler_preset_selects_the_sampler(diffa_, fake, mine):
    diffa_(
        "ask",
        "a.wav",
        "?",
        "--spec",
        mine,
        "--sampler-preset",
        "slow",
        "--set",
        "sampler.block_length=2",
    )
    sampler = fake["spec"].resolve().data["sampler"]
    assert (sampler["threshold"], sampler["block_length"]) == (None, 2)
    done = diffa_("ask", "a.wav", "?", "--spec", mine, "--sampler-preset", "slwo")
    assert done.code == 2 and "no sampler preset 'slwo', did you mean 'slow'?" in done.err


def test_without_a_spec_the_default_is_nano_else_tiny_with_a_word_about_it(
    diffa_, fake, monkeypatch, tmp_path
):
    folder = tmp_path / "diffa"
    (folder / "assets" / "presets").mkdir(parents=True)
    monkeypatch.setattr(diffa, "__file__", str(folder / "__init__.py"))
    done = diffa_("ask", "a.wav", "?")
    assert done.code == 0 and "untrained" in done.err and "--spec diffa-1" in done.err
    assert "untrained" not in done.out
    (folder / "assets" / "presets" / "nano.yaml").write_text("")
    assert default_spec() == "nano"


def test_a_saved_model_is_loaded_and_only_its_sampler_changes(diffa_, mine, monkeypatch, tmp_path):
    spec = diffa.Spec.read(mine).resolve()
    (tmp_path / "spec.json").write_text(spec.to_json())
    (tmp_path / "model.safetensors").write_text("")
    answer = SimpleNamespace(text="yes", tokens=[], num_forwards=1, confidence=-0.5)
    model = SimpleNamespace(spec=spec, answer=lambda *_, **__: answer)
    swapped = []

    def swap(model, **parts):
        swapped.append(parts)
        return model

    monkeypatch.setattr(diffa, "load", lambda folder, device, dtype: model, raising=False)
    monkeypatch.setattr(diffa, "swap", swap, raising=False)
    assert diffa_("ask", "a.wav", "?", "--spec", tmp_path).out == "yes\n"
    assert swapped == []
    diffa_("ask", "a.wav", "?", "--spec", tmp_path, "--set", "sampler.block_length=2")
    assert swapped[0]["sampler"]["block_length"] == 2
    done = diffa_("ask", "a.wav", "?", "--spec", tmp_path, "--set", "encoder.width=8")
    assert done.code == 2 and "only the sampler of a saved model" in done.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["ask", "missing.wav", "?"], 1, "diffa: there is no file missing.wav"),
        (["ask", "a.wav"], 2, "Missing argument 'QUESTION'"),
        (["ask", "a.wav", "?", "--set", "block"], 2, "--set takes PATH=VALUE"),
        (
            ["ask", "a.wav", "?", "--set", "sampler.block_lenth=1"],
            2,
            "did you mean 'block_length'?",
        ),
        (["ask", "a.wav", "?", "--set", "sampler.block_length=[1"], 2, "needs quotes"),
        (["ask", "a.wav", "?", "--set", "sampler.block_length=x"], 2, "expected int, got 'x'"),
        (["ask", "a.wav", "?", "--device", "cpuu"], 2, "--device cpuu: "),
        (["ask", "a.wav", "?", "--max-tokens", "0"], 2, "--max-tokens"),
        (["ask", "a.wav", "?", "--spec", "tests"], 2, "tests holds no spec.json"),
        (["map", "a.json", "--out", "o", "--device", "cpuu"], 2, "--device cpuu: "),
        (["map", "a.json", "--out", "o", "--replicas", "2"], 2, "need --ray"),
        (["map", "a.json", "--out", "o", "--gpus", "1"], 2, "need --ray"),
        (["bogus"], 2, "No such command 'bogus'"),
        (["spec", "check", "difa-1"], 2, "did you mean 'diffa-1'"),
        (["spec", "show", "none.yaml"], 2, "there is no file none.yaml"),
        (["plugins", "check", "conv"], 2, "KIND:NAME"),
        (["plugins", "check", "adapter:cnov"], 2, "did you mean 'conv'?"),
    ],
)
def test_a_users_error_is_one_message_on_stderr(diffa_, fake, mine, words, code, message):
    words = [*words, "--spec", mine] if words[0] == "ask" and "--spec" not in words else words
    done = diffa_(*words)
    assert done.code == code and done.out == ""
    assert message in done.err and "Traceback" not in done.err


def test_an_unexpected_error_is_short_unless_debug_is_given(diffa_, mine, monkeypatch):
    def build(spec, **_):
        error = ValueError("odd")
        error.add_note("while building adapter 'conv'")
        raise error

    monkeypatch.setattr(diffa, "build", build, raising=False)
    done = diffa_("ask", "a.wav", "?", "--spec", mine)
    assert done.code == 1 and done.err.startswith("diffa: ValueError: odd")
    assert "while building adapter 'conv'" in done.err and "--debug" in done.err
    with pytest.raises(ValueError, match="odd"):
        main(["ask", "a.wav", "?", "--spec", str(mine), "--debug"])


def test_debug_shows_where_a_users_error_came_from():
    with pytest.raises(SpecError):
        main(["--debug", "spec", "check", "difa-1"])


def test_spec_show_prints_what_can_be_read_back(diffa_, mine):
    done = diffa_(
        "spec", "show", mine, "--sampler-preset", "slow", "--set", "train=[adapters, backbone]"
    )
    printed = diffa.Spec.read(yaml.safe_load(done.out))
    assert printed.data["train"] == ["adapters", "backbone"]
    assert printed.digest() in done.err and printed.data["sampler"]["block_length"] == 32
    assert (
        json.loads(diffa_("spec", "show", mine, "--json").out)["sampler_presets"]["slow"][
            "block_length"
        ]
        == 32
    )


def test_spec_check_tells_good_from_bad(diffa_, mine):
    done = diffa_("spec", "check", mine)
    assert done.code == 0 and diffa.Spec.read(mine).digest() in done.out
    result = json.loads(diffa_("spec", "check", mine, "--json").out)
    assert result["ok"] is True
    done = diffa_(
        "spec", "check", mine, "--json", "--set", "sampler.block_length=x", "--set", "train=3"
    )
    assert done.code == 2
    result = json.loads(done.out)
    assert (
        result["ok"] is False
        and "sampler.block_length" in result["error"]
        and "train" in result["error"]
    )


def test_spec_list_names_every_preset(diffa_):
    assert {"diffa-1", "diffa-2", "tiny"} <= set(diffa_("spec", "list").out.split())


def test_spec_show_counts_parameters_without_weights(diffa_):
    rows = json.loads(diffa_("spec", "show", "diffa-1", "--parameters", "--json").out)
    result = {row["part"]: row for row in rows}
    assert result["adapters.acoustic"]["parameters"] == 22_251_776  # facts/diffa.md 2.8
    assert result["adapters.semantic"]["parameters"] == 14_369_280
    assert result["backbone"]["parameters"] == 8_015_581_184
    assert result["adapters.semantic"]["rate"] == "12.5/s"
    assert result["adapters.acoustic"]["rate"] == "64 in all"
    assert (result["encoder"]["width"], result["backbone"]["width"]) == (768, 4096)
    assert result["sum"]["trained"] == 22_251_776 + 14_369_280
    table = diffa_("spec", "show", "tiny", "--parameters").out
    assert "adapters.semantic" in table and "rate" in table.splitlines()[0]


def test_plugins_lists_a_broken_part_with_the_reason_and_the_rest(diffa_, site):
    install(site, "acme-diffa", {"adapter": {"broken": "acme:Pool"}}, {"acme": "import not_here"})
    install(site, "beta-diffa", {"adapter": {"puddle": "beta:Pool"}}, {"beta": POOL})
    registry.clear_scan()
    rows = {row["name"]: row for row in json.loads(diffa_("plugins", "--json").out)}
    assert rows["broken"]["health"].startswith("broken: adapter 'broken' from acme-diffa")
    assert "not_here" in rows["broken"]["health"]
    assert rows["puddle"] == {
        "kind": "adapter",
        "name": "puddle",
        "package": "beta-diffa 1.0",
        "target": "beta:Pool",
        "health": "works",
    }
    assert rows["conv"]["health"] == "works"
    table = diffa_("plugins").out
    line = next(line for line in table.splitlines() if "broken" in line)
    assert "not_here" in line  # nothing is cut where there is no terminal


def test_plugins_check_shows_the_schema(diffa_, site):
    install(site, "beta-diffa", {"adapter": {"puddle": "beta:Pool"}}, {"beta": POOL})
    registry.clear_scan()
    result = json.loads(diffa_("plugins", "check", "adapter:beta-diffa:puddle", "--json").out)
    assert result["wires"] == ["source", "width"]
    assert result["options"][0] == {"option": "stride", "type": "int", "default": 4}
    assert "stride" in diffa_("plugins", "check", "adapter:puddle").out


def test_plugins_check_refuses_a_part_that_breaks_its_contract(diffa_, site):
    code = POOL.replace("out_lengths", "lengths")
    install(site, "acme-diffa", {"adapter": {"bad": "acme:Pool"}}, {"acme": code})
    registry.clear_scan()
    done = diffa_("plugins", "check", "adapter:bad")
    assert done.code == 1 and "adapter Pool lacks out_lengths" in done.err


def test_doctor_judges_every_library_by_itself(site, monkeypatch):
    for name, code in {
        "einops": "raise OSError('libbroken.so')",
        "timm": "import os; os.abort()",
    }.items():
        (site / f"{name}.py").write_text(code)
    monkeypatch.setattr("importlib.util.find_spec", _find_spec_without("peft"))
    result = {f.name: f for f in examine(["einops", "timm", "peft", "huggingface_hub", "python"])}
    assert result["einops"].state == "broken: OSError: libbroken.so" and result["einops"].blocks
    assert result["timm"].state == "broken: the process was killed by signal 6"
    assert not result["timm"].blocks  # optional
    assert (result["peft"].state, result["peft"].note) == (
        "absent",
        "pip install 'diffa-audio[train]'",
    )
    assert result["huggingface_hub"].state == result["python"].state == "works"


def test_doctor_names_the_strangers_package_that_overwrites_diffa(site):
    (fine,) = examine(["diffa-audio"])
    assert fine.state == "works" and fine.required
    install(site, "diffa", {})
    (finding,) = examine(["diffa-audio"])
    assert finding.blocks and "'diffa' (a line-diff tool)" in finding.state
    assert finding.note.startswith("pip uninstall diffa && pip install --force-reinstall")


def test_doctor_says_how_to_install_a_checkout_that_is_only_on_the_path(monkeypatch):
    monkeypatch.setattr("diffa.cli.doctor._version", lambda name: "unknown")
    (finding,) = examine(["diffa-audio"])
    assert finding.blocks and finding.note.startswith("pip install -e .")


def _find_spec_without(missing: str):
    from importlib.util import find_spec

    return lambda name, package=None: None if name == missing else find_spec(name, package)


def test_a_trial_that_prints_or_exits_is_read_rightly():
    trials = {"a": "print('note: hello')", "b": "raise SystemExit", "c": "raise KeyError('x')"}
    assert attempt(trials) == {
        "a": ("works", "hello"),
        "b": ("works", ""),
        "c": ("broken: KeyError: 'x'", ""),
    }


def test_doctor_exits_with_one_where_a_required_library_is_broken(diffa_, monkeypatch):
    from diffa.cli import doctor

    fine = doctor.Finding("torch", "2.10", "works", "", True)
    absent = doctor.Finding("timm", "", "absent", "pip install 'diffa-audio[timm]'", False)
    ill = doctor.Finding("torchaudio", "2.11", "broken: RuntimeError: CUDA", "", True)
    monkeypatch.setattr(doctor, "examine", lambda: [fine, absent])
    assert diffa_("doctor").code == 0
    monkeypatch.setattr(doctor, "examine", lambda: [fine, absent, ill])
    done = diffa_("doctor", "--json")
    assert done.code == 1 and "torchaudio" in done.err
    assert json.loads(done.out)[2]["state"] == "broken: RuntimeError: CUDA"


def test_the_light_commands_import_no_torch():
    code = (
        "import sys; from diffa.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    for words in (["--help"], ["ask", "--help"], ["plugins", "--names"], ["spec", "list"]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


def test_the_installed_command_prints_no_traceback_and_minds_its_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "diffa", "spec", "check", "difa-1"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("diffa: there is no preset 'difa-1'")
    assert len(done.stderr.splitlines()) == 1


def test_ask_runs_from_file_to_text(diffa_, tmp_path):
    numpy, soundfile = pytest.importorskip("numpy"), pytest.importorskip("soundfile")
    path = tmp_path / "noise.wav"
    soundfile.write(path, numpy.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    done = diffa_("ask", path, "What?", "--spec", "tiny", "--max-tokens", 8, "--json")
    result = json.loads(done.out)
    assert len(result["tokens"]) == 8 and isinstance(result["text"], str)
    done = diffa_("transcribe", tmp_path / "none.wav", "--spec", "tiny")
    assert done.code == 1 and "none.wav" in done.err and done.out == ""
