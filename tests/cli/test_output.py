"""Notes go to stderr and results to stdout; options are parsed with an error that names them."""

from __future__ import annotations

import pytest

from diffa.cli.map import _parse_range
from diffa.cli.models import parse_override
from diffa.cli.output import print_json, print_notes, print_table
from diffa.cli.serve import KEYS, read_keys
from diffa.cli.synthesis import parse_bands
from diffa.errors import SpecError


def test_notes_show_their_number_and_the_first_lines(capsys):
    print_notes([f"row {i}" for i in range(5)], "rows left out", limit=2)
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines() == ["5 rows left out:", "  row 0", "  row 1", "  and 3 more"]


def test_no_notes_print_nothing(capsys):
    print_notes([], "rows left out")
    assert capsys.readouterr() == ("", "")


def test_json_keeps_letters_of_all_languages(capsys):
    print_json({"text": "Grüße"})
    assert capsys.readouterr().out == '{\n  "text": "Grüße"\n}\n'


def test_a_table_cuts_nothing_without_a_terminal(capsys):
    print_table(["name", "note"], [["a", "x" * 200], ["b", ""]])
    lines = capsys.readouterr().out.splitlines()
    assert "x" * 200 in lines[2] and lines[3].split() == ["b"]
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sampler.steps=16", ("sampler.steps", 16)),
        ("train=[adapters, backbone]", ("train", ["adapters", "backbone"])),
        ("prompt.system=", ("prompt.system", None)),
        ("a=b=c", ("a", "b=c")),
    ],
)
def test_an_override_is_a_path_and_a_yaml_value(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["steps", "=3", "steps=[1"])
def test_a_bad_override_names_its_option(text):
    with pytest.raises(SpecError, match=r"^--sampling"):
        parse_override(text, "--sampling")


def test_a_band_of_pitch_sets_the_limits_of_all_voices():
    bands = parse_bands(["pitch=110,180", "speed=2,4"])
    assert bands.man == bands.woman == bands.anyone == (110.0, 180.0)
    assert bands.speed == (2.0, 4.0)
    assert parse_bands(None) == type(bands)()


@pytest.mark.parametrize(("text", "bounds"), [("1:4", (1, 4)), ("3", (3, 3))])
def test_a_range_of_replicas_is_one_number_or_two(text, bounds):
    assert _parse_range(text) == bounds


@pytest.mark.parametrize("text", ["0:2", "3:2", "many"])
def test_a_bad_range_of_replicas_is_refused(text):
    with pytest.raises(SpecError, match="MIN:MAX"):
        _parse_range(text)


def test_keys_come_from_the_file_or_else_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(KEYS, " one, two,, ")
    assert read_keys(None) == ["one", "two"]
    file = tmp_path / "keys"
    file.write_text("three\n\n four \n")
    assert read_keys(file) == ["three", "four"]
    file.write_text("\n \n")
    with pytest.raises(SpecError, match="holds no key"):
        read_keys(file)
    with pytest.raises(SpecError, match="cannot be read"):
        read_keys(tmp_path / "none")
