"""Properties of specs: writing and reading, completing and changing lose nothing."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import ModuleDict

from diffa.spec.spec import Spec

few = settings(max_examples=60, deadline=None, derandomize=True)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=12)
words = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
# adapters live in a ModuleDict, whose own attributes (such as "to") a spec refuses as names
free = words.filter(lambda word: not hasattr(ModuleDict(), word))
numbers = st.integers(1, 10**6)
shares = st.floats(0, 1, allow_nan=False)

adapters = st.one_of(
    st.just("conv"),
    st.fixed_dictionaries(
        {"name": st.just("conv")}, optional={"stride": numbers, "final_relu": st.booleans()}
    ),
    st.fixed_dictionaries(
        {"name": st.just("qformer")},
        optional={
            "num_queries": numbers,
            "encoder_layers": st.one_of(
                st.none(), numbers, st.lists(st.integers(0, 9), max_size=3)
            ),
            "dropout": st.floats(0, 0.99),
        },
    ),
    st.fixed_dictionaries({"name": st.just("linear")}, optional={"stride": numbers}),
)
samplers = st.fixed_dictionaries(
    {"name": st.just("blockwise")},
    optional={
        "block_length": numbers,
        "threshold": st.one_of(st.none(), shares),
        "temperature": shares,
        "cache": st.sampled_from(["none", "prefix", "dual"]),
        "stop_at_eos": st.booleans(),
    },
)
odd = st.sampled_from(
    ["no", "1e-4", "null", "~", "2026-01-31", "1:30", "0x10", "", " a", "ä\n", "#"]
)


@st.composite
def specs(draw: Any) -> dict[str, Any]:
    names = draw(st.lists(free, min_size=1, max_size=3, unique=True))
    data: dict[str, Any] = {
        "format": 1,
        "encoder": {"name": "tiny", "window_seconds": draw(st.floats(0.1, 30))},
        "adapters": {name: draw(adapters) for name in names},
        "backbone": {"name": "llada", "checkpoint": draw(st.one_of(odd, texts))},
    }
    if draw(st.booleans()):
        data["sampler"] = draw(samplers)
    if draw(st.booleans()):
        data["sampler_presets"] = {"fast": draw(samplers), "slow": draw(samplers)}
        data["sampler"] = draw(st.sampled_from(["fast", "slow"]))
    if draw(st.booleans()):
        user = draw(st.one_of(odd, texts)).replace("<audio>", "") + "<audio> {question}"
        data["prompt"] = {"system": draw(st.one_of(odd, texts)), "user": user}
    if draw(st.booleans()):
        data["train"] = [f"adapters.{draw(st.sampled_from(names))}"]
    return data


@given(specs())
@few
def test_what_is_written_reads_back_as_the_same_spec(data: dict[str, Any]) -> None:
    spec = Spec.read(data)
    for again in (Spec.parse(spec.to_yaml()), Spec.parse(spec.to_json()), Spec.read(spec.data)):
        assert again == spec and again.data == spec.data
        assert list(again.resolve().data["adapters"]) == list(data["adapters"])


@given(specs())
@few
def test_completing_a_spec_changes_nothing_it_builds(data: dict[str, Any]) -> None:
    spec = Spec.read(data)
    whole = spec.resolve()
    assert whole.digest() == spec.digest() and whole.resolve().data == whole.data
    assert Spec.parse(whole.to_yaml()).data == whole.data
    json.dumps(whole.data, allow_nan=False)


@given(specs(), st.integers(1, 10**6))
@few
def test_set_changes_one_value_and_leaves_the_original(data: dict[str, Any], block: int) -> None:
    spec = Spec.read(data)
    before = spec.data
    changed = spec.set("sampler.block_length", block)
    assert spec.data == before
    options = changed.parts()["sampler"].options
    assert options["block_length"] == block
    assert {**options, "block_length": 0} == {
        **spec.parts()["sampler"].options,
        "block_length": 0,
    }
    same = changed.parts()["sampler"].options == spec.parts()["sampler"].options
    assert (changed.digest() == spec.digest()) == same


@given(specs())
@few
def test_the_order_of_options_does_not_count_and_that_of_adapters_does(
    data: dict[str, Any],
) -> None:
    spec = Spec.read(data)
    turned = {
        key: dict(reversed(value.items()))
        if isinstance(value, dict) and key != "adapters"
        else value
        for key, value in reversed(data.items())
    }
    assert Spec.read(turned).digest() == spec.digest()
    other = {**data, "adapters": dict(reversed(data["adapters"].items()))}
    assert (Spec.read(other).digest() == spec.digest()) == (len(data["adapters"]) == 1)
