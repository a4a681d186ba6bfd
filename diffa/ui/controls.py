"""The controls of one sampler preset: sampler, rule and cache, each with its meaning in a line."""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr

from diffa.spec.spec import Spec
from diffa.ui import sampler_options
from diffa.ui.sampler_options import CACHES, ONE, PLAIN, SamplerForm


class Controls(NamedTuple):
    """The components of one sampler: the preset to start from, then ``SamplerForm``'s fields."""

    sampler_preset: Any
    fields: tuple[Any, ...]

    @property
    def inputs(self) -> list[Any]:
        """What the page reads when it asks."""
        return [self.sampler_preset, *self.fields]


def controls(spec: Spec, decoding: str, begin: str, title: str) -> Controls:
    """Lay out the controls of one sampler preset that starts as the one named ``begin``."""
    known = sampler_options.sampler_presets(spec)
    start = sampler_options.form_from_sampler(spec, known[begin])
    offered = sampler_options.installed_samplers(decoding)
    shown, told = sampler_options.visible_controls(start.sampler), start.sampler
    sampler_preset = gr.Dropdown(
        list(known), value=begin, label=f"{title}: start from",
        info="A sampler preset of the spec; it fills in the controls below.",
    )  # fmt: skip
    sampler = gr.Dropdown(
        list(offered), value=start.sampler, label="Sampler", info=offered.get(start.sampler, "")
    )
    block = gr.Slider(
        1, 128, start.block_length, step=1, label="Block", visible=shown["block_length"],
        info=sampler_options.describe_option(told, "block_length"),
    )  # fmt: skip
    rule = gr.Radio(
        sampler_options.available_rules(told), value=start.rule, label="Tokens per pass",
        visible=shown["rule"], info=sampler_options.describe_rule(told, start.rule),
    )  # fmt: skip
    value = gr.Number(
        start.value, label="Value of the rule", visible=start.rule != ONE,
        info="Value of the rule: passes, a probability, a factor, or nats.",
    )  # fmt: skip
    cache = gr.Radio(
        CACHES, value=start.cache, label="Cache", visible=shown["cache"],
        info=sampler_options.describe_option(told, "cache"),
    )  # fmt: skip
    temperature = gr.Slider(
        0, 2, start.temperature, step=0.1, label="Temperature", visible=shown["temperature"],
        info="Sampling temperature; 0 takes the most likely token.",
    )  # fmt: skip
    guidance = gr.Slider(
        0, 4, start.cfg_scale, step=0.25, label="Guidance", visible=shown["cfg_scale"],
        info="Classifier-free guidance scale; 0 disables it. It doubles the work.",
    )  # fmt: skip
    others = gr.Textbox(
        start.others, label="Further options", placeholder="suffix_window: 64, stop_at_eos: false",
        info=sampler_options.describe_further_options(told),
    )  # fmt: skip
    fields = (sampler, block, rule, value, cache, temperature, guidance, others)
    made = Controls(sampler_preset, fields)
    _connect(made, spec, known, offered)
    return made


def _connect(
    made: Controls, spec: Spec, known: dict[str, dict[str, Any]], offered: dict[str, str]
) -> None:
    sampler, rule, value = made.fields[0], made.fields[2], made.fields[3]

    def fill(name: str) -> list[Any]:
        return show(sampler_options.form_from_sampler(spec, known[name]))

    def show(chosen: SamplerForm) -> list[Any]:
        there = sampler_options.visible_controls(chosen.sampler)
        updates = dict(chosen._asdict())
        for key in PLAIN:
            meant = sampler_options.describe_option(chosen.sampler, key)
            info = {"info": meant} if key in ("block_length", "cache") and meant else {}
            updates[key] = gr.update(value=updates[key], visible=there[key], **info)
        updates["sampler"] = gr.update(value=chosen.sampler, info=offered.get(chosen.sampler, ""))
        updates["rule"] = gr.update(
            value=chosen.rule, visible=there["rule"],
            choices=sampler_options.available_rules(chosen.sampler),
            info=sampler_options.describe_rule(chosen.sampler, chosen.rule),
        )  # fmt: skip
        updates["value"] = gr.update(value=chosen.value, visible=chosen.rule != ONE)
        further = sampler_options.describe_further_options(chosen.sampler)
        updates["others"] = gr.update(value=chosen.others, info=further)
        return list(updates.values())

    def change(name: str, *rest: Any) -> list[Any]:
        kept = SamplerForm(name, *rest)
        if kept.rule not in sampler_options.available_rules(name):
            kept = kept._replace(rule=ONE, value=sampler_options.STARTS[ONE])
        return show(kept._replace(others=""))

    def explain(name: str, chosen: str) -> tuple[Any, Any]:
        info = gr.update(info=sampler_options.describe_rule(name, chosen))
        return info, gr.update(value=sampler_options.STARTS[chosen], visible=chosen != ONE)

    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    fields = list(made.fields)
    made.sampler_preset.input(fill, made.sampler_preset, fields, **quiet)
    sampler.input(change, fields, fields, **quiet)
    rule.input(explain, [sampler, rule], [rule, value], **quiet)
