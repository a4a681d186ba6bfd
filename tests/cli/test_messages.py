"""Every input that cannot be used ends in one message: no traceback, no address, no type's name."""

from __future__ import annotations

import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.fakes import install, site_packages

import diffa
from diffa.cli import main
from diffa.cli.plugins import list_plugins
from diffa.errors import CheckpointError, DiffaError, SpecError, describe, show
from diffa.spec import registry
from diffa.spec.spec import Spec

DEEP = "[" * 100_000 + "]" * 100_000
FILES = {
    "deep.json": DEEP,
    "deep.yaml": f"encoder: {DEEP}",
    "deep-mapping.json": '{"encoder":' * 900 + "1" + "}" * 900,
    "itself.yaml": "encoder: &a [*a]\n",
    "multiplied.yaml": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefgh")),
    "long-text.yaml": f"a: &a {'x' * 10_000}\nb: [{', '.join(['*a'] * 1_000)}]\n",
    "tag.yaml": "encoder: !!bool perhaps\n",
    "time.yaml": "encoder: !!timestamp x\n",
    "list-key.yaml": "? [a, b]\n: c\n",
    "number.yaml": f"format: {'9' * 5_000}\n",
    "bytes.yaml": b"\xff\xfe\x00\x01",
    "[bold]x.yaml": "encoder: [/]\n",
}  # fmt: skip
NAMES = ("a b/c", "a..b/c", "org/na\0me", "org/" + "x" * 300, "é/ü", "[/a]/b", "~nobody-here/y",
         "x" * 5_000 + "/y", "org\\x/y", "", "package:..")  # fmt: skip
VALUES = ("9" * 400, "9" * 5_000, "1e400", "!!bool x", "&a [*a]", DEEP[:600], "[/x]", "{a: 1}")
TYPE_NAME = re.compile(r"\b(?!ModuleNotFound)\w+(Error|Exception)\b")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def command(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        return (end.value.code or 0, *capsys.readouterr())

    return command


def assert_in_words(code: int, out: str, err: str) -> None:
    assert code in (1, 2) and err.startswith("diffa: "), err
    assert not re.search(r"0x[0-9a-f]{6,}|Traceback", err) and not TYPE_NAME.search(err), err
    assert len(err) < 2_500


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_spec_is_refused_in_words(run, tmp_path, name):
    content = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_in_words(*run("spec", "check", name))
    assert_in_words(*run("train", name, "--dry-run", "--out", "run"))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("path", ["sampler.block_length", "backbone.checkpoint", "train", "format"])
def test_an_override_that_does_not_fit_is_refused_in_words(run, path, value):
    assert_in_words(*run("spec", "check", "tiny", "--set", f"{path}={value}")[:3])


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_cannot_be_named_is_refused_in_words(run, name):
    option = f"encoder={{name: whisper, checkpoint: {json.dumps(name)}}}"
    assert_in_words(*run("ask", "a.wav", "?", "--spec", "tiny", "--set", option))


@pytest.mark.parametrize("tokens", ["9" * 400, str(2**63), str(10**12)])
def test_an_answer_of_absurd_length_is_refused(tokens):
    model = diffa.build("tiny")
    recording = Path(diffa.__file__).parent / "assets" / "recordings" / "digits.flac"
    with pytest.raises(SpecError, match="max_tokens must be at most"):
        model.answer(recording, "?", max_tokens=int(tokens))


def test_a_spec_that_holds_itself_is_refused():
    spec: dict[str, object] = {"encoder": "tiny"}
    spec["adapters"] = spec
    with pytest.raises(SpecError):
        Spec(spec)


def test_a_value_is_quoted_in_bounded_length():
    inner: list[object] = []
    for _ in range(5_000):
        inner = [inner]
    for value in (10**5_000, inner, "x" * 10**6):
        assert len(show(value)) <= 200


def test_messages_hold_no_addresses():
    thing = object()
    assert "0x" not in str(DiffaError(f"{thing!r} is wrong")) + describe(TypeError(f"{thing!r}"))


def test_unexpected_errors_are_worded():
    cases = {
        RecursionError("maximum recursion depth"): "nested too deeply",
        MemoryError(): "memory is exhausted",
        OverflowError("int too large"): "too large",
        FileNotFoundError(2, "No such file or directory", "a.wav"): "a.wav: No such file",
        OSError(28, "No space left on device"): "No space left",
    }
    for error, words in cases.items():
        assert words in describe(error) and not TYPE_NAME.search(describe(error))


def test_a_refused_pickle_is_not_advised_to_be_run(tmp_path):
    torch = pytest.importorskip("torch")
    from diffa.checkpoints.read import read_weights

    torch.save({"a": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors") as caught:
        read_weights(tmp_path)
    assert "weights_only" not in str(caught.value)


def test_a_saved_model_does_not_shadow_a_preset_in_silence(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    diffa.save(diffa.build("tiny"), "nano")
    assert Spec.read("nano") != Spec.read("tiny")
    assert "./nano" in caplog.text
    assert Spec.read("./nano").digest() == Spec.read(Path("nano")).digest()


@pytest.fixture
def site(tmp_path, monkeypatch):
    yield from site_packages(tmp_path, monkeypatch)


def test_plugins_lists_packages_that_hang_print_or_raise(run, site, monkeypatch):
    monkeypatch.setattr(sys.modules[list_plugins.__module__], "_IMPORT_SECONDS", 6.0)
    codes = {
        "hanging": "import threading; threading.Event().wait()",
        "printing": "import os; print('[]'); os.write(1, b'{}')",
        "raising": "raise RuntimeError('the moon is full')",
        "aborting": "import os; os.abort()",
    }
    for name, code in codes.items():
        install(site, f"{name}-diffa", {"adapter": {name: f"{name}:Pool"}}, {name: code})
    registry.clear_scan()
    code, out, _ = run("plugins", "--json")
    health = {row["name"]: row["health"] for row in json.loads(out)}
    assert code == 0 and health["conv"] == "works"
    assert "no answer within 6 s" in health["hanging"]
    assert "has no 'Pool'" in health["printing"]
    assert "the moon is full" in health["raising"]
    assert "killed by signal" in health["aborting"]


def test_a_part_that_prints_when_it_is_imported_prints_to_stderr(site, capsys):
    pool = "print('hello')\nclass Pool: pass"
    install(site, "chatty-diffa", {"adapter": {"chatty": "chatty:Pool"}}, {"chatty": pool})
    registry.clear_scan()
    with pytest.raises(DiffaError):
        registry.load_part("adapter", "chatty")
    assert capsys.readouterr() == ("", "hello\n")


def test_brackets_in_names_are_printed_as_they_are(run, tmp_path):
    from diffa.cli.output import print_table

    print_table(["a", "b"], [["[/b]", "long enough"]], title="[bold]x[/b]")
    code, out, err = run("data", "check", f"[/b]{os.sep}x")
    assert code and "[/b]" in err and "[bold]x[/b]" in out
