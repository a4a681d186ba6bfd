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
    visible, sampler_name = sampler_options.visible_controls(start.sampler), start.sampler
    sampler_preset = gr.Dropdown(
        list(known), value=begin, label=f"{title}: start from",
        info="A sampler preset of the spec; it fills in the controls below.",
    )  # fmt: skip
    sampler = gr.Dropdown(
        list(offered), value=start.sampler, label="Sampler", info=offered.get(start.sampler, "")
    )
    block = gr.Slider(
        1, 128, start.block_length, step=1, label="Block", visible=visible["block_length"],
        info=sampler_options.describe_option(sampler_name, "block_length"),
    )  # fmt: skip
    rule = gr.Radio(
        sampler_options.available_rules(sampler_name), value=start.rule, label="Tokens per pass",
        visible=visible["rule"], info=sampler_options.describe_rule(sampler_name, start.rule),
    )  # fmt: skip
    value = gr.Number(
        start.value, label="Value of the rule", visible=start.rule != ONE,
        info="Value of the rule: passes, a probability, a factor, or nats.",
    )  # fmt: skip
    cache = gr.Radio(
        CACHES, value=start.cache, label="Cache", visible=visible["cache"],
        info=sampler_options.describe_option(sampler_name, "cache"),
    )  # fmt: skip
    temperature = gr.Slider(
        0, 2, start.temperature, step=0.1, label="Temperature", visible=visible["temperature"],
        info="Sampling temperature; 0 takes the most likely token.",
    )  # fmt: skip
    guidance = gr.Slider(
        0, 4, start.cfg_scale, step=0.25, label="Guidance", visible=visible["cfg_scale"],
        info="Classifier-free guidance scale; 0 disables it. It doubles the work.",
    )  # fmt: skip
    others = gr.Textbox(
        start.others, label="Further options", placeholder="suffix_window: 64, stop_at_eos: false",
        info=sampler_options.describe_further_options(sampler_name),
    )  # fmt: skip
    fields = (sampler, block, rule, value, cache, temperature, guidance, others)
    group = Controls(sampler_preset, fields)
    _connect(group, spec, known, offered)
    return group


def _connect(
    group: Controls, spec: Spec, known: dict[str, dict[str, Any]], offered: dict[str, str]
) -> None:
    sampler, rule, value = group.fields[0], group.fields[2], group.fields[3]

    def fill(name: str) -> list[Any]:
        return show(sampler_options.form_from_sampler(spec, known[name]))

    def show(form: SamplerForm) -> list[Any]:
        there = sampler_options.visible_controls(form.sampler)
        updates = dict(form._asdict())
        for key in PLAIN:
            meant = sampler_options.describe_option(form.sampler, key)
            info = {"info": meant} if key in ("block_length", "cache") and meant else {}
            updates[key] = gr.update(value=updates[key], visible=there[key], **info)
        updates["sampler"] = gr.update(value=form.sampler, info=offered.get(form.sampler, ""))
        updates["rule"] = gr.update(
            value=form.rule, visible=there["rule"],
            choices=sampler_options.available_rules(form.sampler),
            info=sampler_options.describe_rule(form.sampler, form.rule),
        )  # fmt: skip
        updates["value"] = gr.update(value=form.value, visible=form.rule != ONE)
        further = sampler_options.describe_further_options(form.sampler)
        updates["others"] = gr.update(value=form.others, info=further)
        return list(updates.values())

    def change(name: str, *rest: Any) -> list[Any]:
        form = SamplerForm(name, *rest)
        if form.rule not in sampler_options.available_rules(name):
            form = form._replace(rule=ONE, value=sampler_options.STARTS[ONE])
        return show(form._replace(others=""))

    def explain(name: str, rule_name: str) -> tuple[Any, Any]:
        info = gr.update(info=sampler_options.describe_rule(name, rule_name))
        return info, gr.update(value=sampler_options.STARTS[rule_name], visible=rule_name != ONE)

    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    fields = list(group.fields)
    group.sampler_preset.input(fill, group.sampler_preset, fields, **quiet)
    sampler.input(change, fields, fields, **quiet)
    rule.input(explain, [sampler, rule], [rule, value], **quiet)
