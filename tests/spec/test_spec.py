"""A spec reports all of its faults, keeps every default, and survives being written down."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.fakes import MANY, POOL, install, site_packages
from hypothesis import example, given, settings
from hypothesis import strategies as st

import diffa
from diffa.errors import PluginError, SpecError
from diffa.spec import registry
from diffa.spec.schema import coerce, read_schema
from diffa.spec.spec import Spec, presets
from diffa.spec.yaml import parse_json, parse_yaml, write_yaml

SMALL = {
    "encoder": "tiny",
    "adapters": {"acoustic": {"name": "qformer", "num_queries": 8}, "semantic": "conv"},
    "backbone": {"name": "llada", "checkpoint": "somewhere"},
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path in which packages can be installed, and nothing of them stays."""
    yield from site_packages(tmp_path, monkeypatch)


def faults(**changes) -> list[str]:
    """The lines of the error that SMALL with some keys changed brings."""
    with pytest.raises(SpecError) as caught:
        Spec.read({**SMALL, **changes})
    head, *lines = str(caught.value).split("\n")
    assert head == "invalid spec:"
    return [line.strip() for line in lines]


def test_all_faults_are_reported_at_once():
    lines = faults(
        encodr="whisper",
        adapters={
            "a": {"name": "conv", "strid": 4, "stride": "4"},
            "b": "cnov",
            "c": {"stride": 3},
        },
        sampler={"name": "blockwise", "steps": "8", "cache": "duel"},
        train=["adapter", "adapters.z"],
        prompt={"user": "hi", "usr": "x"},
    )
    assert lines == [
        "encodr: unknown key, did you mean 'encoder'?",
        "adapters.a.strid: unknown option, did you mean 'stride'?",
        "adapters.a.stride: expected int, got '4'",
        "adapters.b: there is no adapter 'cnov', did you mean 'conv'?",
        f"adapters.c: needs a name; known: {', '.join(registry.available('adapter'))}",
        "sampler.steps: expected int or null, got '8'",
        "sampler.cache: expected one of 'none', 'prefix', 'dual', got 'duel', did you mean 'dual'?",
        "train.0: unknown part 'adapter', did you mean 'adapters' or 'adapters.c' or 'adapters.b'?",
        "train.1: unknown part 'adapters.z', did you mean 'adapters.c' or 'adapters.b' or "
        "'adapters.a'?",
        "prompt.usr: unknown key, did you mean 'user'?",
        "prompt.user: must hold <audio> exactly once, got 'hi'",
        "prompt.user: must hold {question} exactly once, got 'hi'",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"encoder": None}, "encoder: is missing; known: "),
        ({"adapters": {}}, "adapters: at least one is needed; known: "),
        ({"adapters": ["conv"]}, "adapters: expected a mapping of names to adapters"),
        ({"adapters": {"a b": "conv"}}, "adapters.a b: a name is made of letters"),
        ({"adapters": {"keys": "conv"}}, "adapters.keys: the name is taken by torch's"),
        ({"adapters": {"a": None}}, "adapters.a: needs a name"),
        ({"backbone": 8}, "backbone: expected a name or a mapping with a name, got 8"),
        ({"backbone": {"name": 8}}, "backbone: expected a name, got 8; known: "),
        (
            {"adapters": {"a": {"name": "conv", "width": 8}}},
            "adapters.a.width: is set automatically",
        ),
        (
            {"sampler": "fsat", "sampler_presets": {"fast": "blockwise"}},
            "sampler: no sampler preset or sampler",
        ),
        (
            {"sampler_presets": {"greedy": "blockwise"}},
            "sampler_presets.greedy: is the name of a sampler",
        ),
        (
            {"sampler_presets": {"quick": {"name": "blockwise", "x": 1}}},
            "sampler_presets.quick.x: unknown option",
        ),
        ({"train": "adapters"}, "train: expected a list such as [adapters], got 'adapters'"),
        ({"train": ["adapters", "adapters"]}, "train.1: 'adapters' is given twice"),
        ({"prompt": "hi"}, "prompt: expected a mapping with system, user, max_tokens, got 'hi'"),
        ({"prompt": {"system": 3}}, "prompt.system: expected str, got 3; quote it"),
        ({"format": 2}, "format: 2 is not known; this diffa reads format 1; upgrade diffa"),
        ({"format": True}, "format: True is not known; this diffa reads format 1"),
        ({7: 1}, "7: unknown key"),
    ],
)
def test_each_fault_says_where_and_what(changes, line):
    lines = (
        faults(**{k: v for k, v in changes.items() if isinstance(k, str)})
        if 7 not in (changes)
        else _faults_of({**SMALL, **changes})
    )
    assert any(found.startswith(line) for found in lines), lines


def _faults_of(spec) -> list[str]:
    with pytest.raises(SpecError) as caught:
        Spec.read(spec)
    return [line.strip() for line in str(caught.value).split("\n")[1:]]


def test_an_unknown_format_hides_what_cannot_be_judged():
    assert len(faults(format=9, nonsense=1)) == 1


def test_a_diffusion_sampler_on_a_causal_backbone_is_refused():
    lines = faults(backbone={"name": "llama"}, sampler="blockwise", objective="masked")
    assert lines == [
        "objective: 'masked' is for masked backbones, but 'llama' is causal; use 'autoregressive'",
        "sampler: 'blockwise' is for masked backbones, but 'llama' is causal; use 'greedy'",
    ]


def test_sampler_and_objective_follow_the_backbone_where_left_out():
    for backbone, expected in (
        ("llada", ["masked", "blockwise"]),
        ("llama", ["autoregressive", "greedy"]),
    ):
        done = Spec.read({**SMALL, "backbone": backbone}).resolve().data
        assert [done["objective"]["name"], done["sampler"]["name"]] == expected


def test_resolve_fills_in_every_default():
    done = Spec.read(SMALL).resolve().data
    assert done["format"] == 1
    assert done["train"] == ["adapters"]
    assert done["prompt"]["user"] == "This is the audio: <audio>. {question}"
    assert done["encoder"]["name"] == "tiny"
    for part, kind in ((done["adapters"]["semantic"], "adapter"), (done["sampler"], "sampler")):
        known = read_schema(registry.load_part(kind, part["name"])).options
        assert list(part) == ["name", *known]
        assert all(part[name] == option.default for name, option in known.items())
    assert done["adapters"]["acoustic"]["num_queries"] == 8


def test_a_setting_names_a_sampler():
    offers = {"quick": {"name": "blockwise", "threshold": 0.9}}
    named = Spec.read({**SMALL, "sampler_presets": offers, "sampler": "quick"})
    assert named.resolve().data["sampler"]["threshold"] == 0.9
    assert named.set("sampler.block_length", 4).resolve().data["sampler"]["block_length"] == 4
    assert (
        named.set("sampler.block_length", 4)
        .resolve()
        .data["sampler_presets"]["quick"]["block_length"]
        == 32
    )
    assert named.digest() == Spec.read({**SMALL, "sampler": offers["quick"]}).digest()


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid_and_survive_being_written(name):
    spec = Spec.read(name)
    done = spec.resolve()
    assert done == spec and done.digest() == spec.digest()
    assert done.resolve().data == done.data
    for text in (done.to_yaml(), done.to_json()):
        back = Spec.parse(text)
        assert back.data == done.data and list(back.data) == list(done.data)
        assert list(back.data["adapters"]) == list(done.data["adapters"])
    assert {"exact", "balanced", "fast"} <= set(done.data["sampler_presets"])


def test_presets_name_the_published_repositories():
    assert Spec.read("diffa-1").data["adapters"]["acoustic"]["checkpoint"] == "zhoujiaming777/DIFFA"
    two = Spec.read("diffa-2").data
    assert two["backbone"]["lora"] == {"checkpoint": "zhoujiaming777/DIFFA-2", "merge": True}
    assert two["encoder"]["checkpoint"] == "openai/whisper-large-v3"
    assert list(two["adapters"]) == ["acoustic", "semantic"]


def test_every_checkpoint_that_a_preset_reads_dry_ships_its_configuration():
    configs = Path(registry.__file__).parents[1] / "assets" / "configs"
    for name in presets():
        data = Spec.read(name).data
        for part in (data["encoder"], data["backbone"]):
            if part.get("checkpoint") and not part["checkpoint"].startswith("package:"):
                assert (configs / part["checkpoint"].replace("/", "--") / "config.json").is_file()


def test_options_take_their_declared_types_and_no_others(site):
    install(site, "acme", {"adapter": {"many": "many:Many"}}, {"many": MANY})
    registry.clear_scan()
    cls = registry.load_part("adapter", "many")
    assert read_schema(cls).wires == ("source", "width")
    known = read_schema(cls).options

    def fitted(option, value):
        found: list[str] = []
        done = coerce(value, known[option].hint, option, lambda path, text: found.append(path))
        return (done, found)

    for option, given_, done in [
        ("flag", False, False), ("count", 4, 4), ("rate", 1, 1.0), ("rate", 0.25, 0.25),
        ("label", "", ""), ("mode", "max", "max"), ("taps", None, None), ("taps", [1, 2], [1, 2]),
        ("scales", [1, 0.5], [1.0, 0.5]), ("extra", {"a": [None, {"b": True}]}, None),
        ("either", 2, 2), ("either", 2.0, 2.0), ("table", {"a": 1}, {"a": 1.0}),
    ]:  # fmt: skip
        value, wrong = fitted(option, given_)
        assert not wrong and value == (given_ if done is None and given_ is not None else done)
        assert type(value) is type(given_ if done is None else done)
    for option, given_, where in [
        ("flag", 1, "flag"), ("flag", "true", "flag"), ("count", True, "count"),
        ("count", 1.0, "count"), ("rate", True, "rate"), ("rate", float("nan"), "rate"),
        ("rate", float("inf"), "rate"), ("label", 3, "label"), ("label", None, "label"),
        ("mode", "men", "mode"), ("taps", [1, "x"], "taps.1"), ("taps", 3, "taps"),
        ("scales", [[1]], "scales.0"), ("extra", {"a": {"b": float("nan")}}, "extra.a"),
        ("extra", {1: 2}, "extra"), ("table", {"a": "x"}, "table.a"), ("either", True, "either"),
    ]:  # fmt: skip
        assert fitted(option, given_)[1] == [where], (option, given_)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(json_values)
@example("\x85")  # a line break to PyYAML, which it folds away
@example("1e-4")
@example("no")
@settings(max_examples=100, deadline=None)
def test_yaml_returns_every_json_value_unchanged(value):
    text = write_yaml({"v": value})
    assert json.dumps(parse_yaml(text)["v"]) == json.dumps(value)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.integers(1, 9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_specs_survive_yaml_and_json(config, block, stop):
    spec = Spec.read(
        {
            **SMALL,
            "backbone": {"name": "llada", "config": config},
            "sampler": {"name": "blockwise", "block_length": block, "stop_at_eos": stop},
        }
    )
    for text in (spec.to_yaml(), spec.to_json(), spec.resolve().to_yaml()):
        assert Spec.parse(text).digest() == spec.digest()


def test_the_digest_follows_meaning_not_writing():
    one = Spec.read(SMALL)
    pairs = list(SMALL["adapters"].items())
    assert Spec.read(dict(reversed(SMALL.items()))).digest() == one.digest()
    assert Spec.read({**SMALL, "adapters": dict(reversed(pairs))}).digest() != one.digest()
    assert one.set("sampler.block_length", 32).digest() == one.digest()  # the default, written out
    assert one.set("sampler.block_length", 31).digest() != one.digest()
    thresholds = [one.set("sampler.threshold", value).digest() for value in (1, 1.0)]
    assert thresholds[0] == thresholds[1] != one.digest()
    mixed = {"a": 1, "b": {"c": 2, "d": 3}}
    turned = {"b": {"d": 3, "c": 2}, "a": 1}
    assert one.set("backbone.config", mixed).digest() == one.set("backbone.config", turned).digest()
    assert len(one.digest()) == 12
    assert Spec.read(SMALL) == one and hash(Spec.read(SMALL)) == hash(one)


def test_set_returns_a_new_spec_and_leaves_the_old():
    spec = Spec.read(SMALL)
    changed = spec.set("adapters.semantic.stride", 2)
    assert changed.data["adapters"]["semantic"] == {"name": "conv", "stride": 2}
    assert spec.data["adapters"]["semantic"] == "conv"
    spec.data["adapters"].clear()
    assert list(spec.data["adapters"]) == ["acoustic", "semantic"]


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("sampler", {"name": "blockwise", "block_length": 8}, ("sampler", "block_length", 8)),
        ("sampler.block_length", 8, ("sampler", "block_length", 8)),
        ("encoder.width", 32, ("encoder", "width", 32)),
        ("prompt.system", "Be brief.", ("prompt", "system", "Be brief.")),
        ("backbone.lora.checkpoint", "x", ("backbone", "lora", {"checkpoint": "x"})),
        ("backbone.checkpoint", Path("a/b"), ("backbone", "checkpoint", "a/b")),
    ],
)
def test_set_reaches_every_place(path, value, where):
    done = Spec.read(SMALL).set(path, value).resolve().data
    assert done[where[0]][where[1]] == where[2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sampler.block_lenth", "sampler.block_lenth: unknown option, did you mean 'block_length'"),
        ("sampler.block_lenth.deep", "sampler.block_lenth: unknown option"),
        ("sampler.block_length.deep", "'block_length' holds 32, not a mapping"),
        ("samplr.block_length", "there is no 'samplr' in a spec, did you mean 'sampler'"),
        ("adapters.semantc.stride", "adapters has no 'semantc', did you mean 'semantic'"),
        ("adapters.third", "adapters has no 'third'"),
        ("backbone.checkpoint.x", "'checkpoint' holds 'somewhere', not a mapping"),
        ("prompt.sytem", "unknown path, did you mean 'system'"),
        ("train.0", "train is set as a whole"),
        ("", "there is no '' in a spec"),
    ],
)
def test_set_refuses_paths_that_lead_nowhere(path, message):
    with pytest.raises(SpecError) as caught:
        Spec.read(SMALL).set(path, 1)
    assert message in str(caught.value)


def test_several_changes_are_checked_together():
    spec = Spec.read(SMALL)
    changed = spec.change({"backbone": "llama", "sampler": "greedy", "objective": "autoregressive"})
    assert changed.resolve().data["sampler"]["name"] == "greedy"
    with pytest.raises(SpecError, match="is for masked backbones"):
        spec.change({"backbone": "llama", "sampler": "blockwise"})


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_files_are_read(tmp_path, suffix):
    path = tmp_path / f"mine.{suffix}"
    spec = Spec.read(SMALL)
    path.write_text(spec.to_json() if suffix == "json" else spec.to_yaml())
    assert Spec.read(path) == Spec.read(str(path)) == spec
    (tmp_path / "spec.json").write_text(spec.to_json())
    assert Spec.read(tmp_path) == spec


def test_a_runs_folder_points_to_its_model_and_hides_no_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano" / "model").mkdir(parents=True)
    assert Spec.read("nano").data["encoder"]["name"] == "whisper"
    (tmp_path / "nano").rename("mine")
    with pytest.raises(SpecError, match=r"mine holds no spec.json$"):
        Spec.read("mine")
    (tmp_path / "mine" / "model" / "spec.json").write_text(Spec.read("tiny").resolve().to_json())
    with pytest.raises(SpecError, match=r"mine holds no spec.json; say mine/model"):
        Spec.read("mine")
    assert Spec.read("mine/model").data["encoder"]["name"] == "tiny"


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwx")
)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.yaml", "encoder: tiny\nencoder: whisper\n", "line 2: 'encoder' is given twice"),
        ("a.yaml", "sampler: {name: x, name: y}\n", "line 1: 'name' is given twice"),
        ("a.json", '{"encoder": 1, "encoder": 2}', "'encoder' is given twice"),
        ("a.json", '{"encoder": ', "not JSON: line 1"),
        ("a.yaml", "encoder: [tiny\n", "not YAML: line 2"),
        ("a.yaml", "encoder: !!python/name:os.system x\n", "not YAML"),
        ("a.yaml", "", "holds nothing, not a mapping"),
        ("a.yaml", "- encoder\n", "holds a list, not a mapping"),
        ("a.yaml", "encoder: tiny\n", "invalid spec a.yaml:\n  adapters: is missing"),
        ("a.yaml", "&a encoder: &b [*b]\n", "line 1: an alias contains itself"),
        ("a.yaml", "encoder: &a {name: tiny, seed: [*a]}\n", "line 1: an alias contains itself"),
        ("a.yaml", BOMB, "its aliases expand to over 100,000 values"),
        ("a.yaml", "encoder: " + "[" * 5000, "not YAML that can be read"),
        ("a.json", '{"encoder": ' + "[" * 100_000, "not JSON that can be read: it is nested"),
        ("a.json", '{"encoder": ' + "9" * 5000 + "}", "not JSON that can be read"),
        ("a.yaml", "encoder: " + "9" * 5000, "not YAML that can be read"),
    ],
)
def test_a_bad_file_is_named_with_the_fault(tmp_path, file, text, message):
    path = tmp_path / file
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        Spec.read(path)
    assert message in str(caught.value) and file in str(caught.value)


def test_what_is_no_spec_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for given_, message in (
        ("difa-1", "there is no preset 'difa-1', did you mean 'diffa-1'"),
        ("", r"the folder \. holds no spec.json"),
        (str(tmp_path / "none.yaml"), "there is no file"),
        (tmp_path, "the folder .* holds no spec.json"),
        (tmp_path / "binary.yaml", "cannot be read as text"),
        (3, "a spec is a mapping, a path or the name of a preset, not a int"),
    ):
        with pytest.raises(SpecError, match=message):
            Spec.read(given_)


def test_yaml_says_what_it_shows():
    text = "a: 1e-4\nb: no\nc: 010\nd: 1:30\ne: 2026-01-31\nf:\ng: .5\nh: on\ni: '1'\nj: True"
    expected = {"a": 1e-4, "b": "no", "c": 10, "d": "1:30", "e": "2026-01-31"}
    expected |= {"f": None, "g": 0.5, "h": "on", "i": "1", "j": True}
    assert parse_yaml(text) == expected
    assert parse_json('{"a": 1e-4}') == {"a": 1e-4}


def test_a_class_may_stand_for_a_name_but_is_not_written_down():
    space: dict[str, type] = {"__name__": "notebook"}
    exec(POOL, space)
    spec = Spec.read({**SMALL, "adapters": {"mine": {"name": space["Pool"], "stride": 2}}})
    chosen = spec.parts()["adapters.mine"]
    assert chosen.load() is space["Pool"] and chosen.options == {"stride": 2, "mode": "mean"}
    assert spec.digest() != Spec.read(SMALL).digest()
    for write in (spec.to_json, spec.to_yaml):
        with pytest.raises(SpecError, match=r"adapters.mine: the class notebook:Pool stands for"):
            write()
    lines = faults(adapters={"mine": {"name": space["Pool"], "strde": 2}, "bad": int})
    assert lines[0] == "adapters.mine.strde: unknown option, did you mean 'stride'?"
    assert lines[1].startswith("adapters.bad: adapter int lacks")


def test_a_broken_plugin_is_named_beside_other_faults(site):
    install(site, "acme", {"adapter": {"broken": "acme:Pool"}}, {"acme": "import nowhere_at_all"})
    registry.clear_scan()
    assert Spec.read(SMALL)  # a spec that does not name it is not disturbed
    with pytest.raises(
        PluginError, match=r"adapters.a: adapter 'broken' from acme .*nowhere_at_all"
    ):
        Spec.read({**SMALL, "adapters": {"a": "broken"}})
    lines = faults(adapters={"a": "broken", "b": {"name": "conv", "strid": 1}})
    assert lines[0].startswith("adapters.a: adapter 'broken' from acme (acme:Pool)")
    assert lines[1] == "adapters.b.strid: unknown option, did you mean 'stride'?"


def test_an_ambiguous_name_is_reported_in_its_place(site):
    install(site, "acme-diffa", {"adapter": {"puddle": "acme:Pool"}}, {"acme": POOL})
    install(site, "beta-diffa", {"adapter": {"puddle": "acme:Pool"}})
    registry.clear_scan()
    assert faults(adapters={"a": "puddle"}) == [
        "adapters.a: adapter 'puddle' is ambiguous: "
        "write 'acme-diffa:puddle' or 'beta-diffa:puddle'"
    ]
    done = Spec.read({**SMALL, "adapters": {"a": "beta-diffa:puddle"}}).resolve().data
    assert done["adapters"]["a"] == {"name": "beta-diffa:puddle", "stride": 4, "mode": "mean"}


def test_numpy_numbers_and_tuples_are_taken_as_json():
    numpy = pytest.importorskip("numpy")
    spec = Spec.read(SMALL).set("sampler.threshold", numpy.float64(0.5))
    spec = spec.set("adapters.acoustic.encoder_layers", (1, 2))
    assert Spec.parse(spec.to_yaml()).data == spec.data
    assert type(spec.data["sampler"]["threshold"]) is float
    assert spec.data["adapters"]["acoustic"]["encoder_layers"] == [1, 2]


def test_an_adapter_that_is_swapped_away_no_longer_learns():
    spec = Spec.read("tiny").set("train", ["adapters.acoustic", "adapters.semantic"])
    model = diffa.build(spec)
    left = diffa.swap(model, adapters={"semantic": spec.data["adapters"]["semantic"]})
    assert left.spec.data["train"] == ["adapters.semantic"]
