"""The conformance suites find what is wrong: every planted fault is caught by its check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import faulty_parts as parts
from helpers import faulty_rules as rules
from testing.test_conformance import LLAMA, SMALL

from diffa.testing import (
    AdapterSuite,
    BackboneSuite,
    EncoderSuite,
    ObjectiveSuite,
    SamplerSuite,
    failures,
)


class TestPool(AdapterSuite):
    part = parts.Pool


class TestFrames(EncoderSuite):
    part = parts.Frames


class TestSteady(SamplerSuite):
    part = rules.Steady
    exact = {"temperature": 1.0}


CHECKS = [
    (TestPool, parts.DeadWeight, "gradient_reaches_every_trainable_weight"),
    (TestPool, parts.WrongLengths, "lengths_equal_out_lengths"),
    (TestPool, parts.FallingLengths, "out_lengths_never_fall"),
    (TestPool, parts.PaddingLeak, "padding_does_not_leak"),
    (TestPool, parts.WindowLeak, "padding_does_not_leak"),
    (TestPool, parts.PaddingLeftBehind, "lengths_equal_out_lengths"),
    (TestPool, parts.NeighbourLeak, "batch_equals_single"),
    (TestPool, parts.Unseeded, "eval_is_deterministic"),
    (TestPool, parts.Forgetful, "weights_survive_saving"),
    (TestPool, parts.Deaf, "it_hears_the_audio"),
    (TestPool, parts.FixedWidth, "it_fits_every_source_and_width"),
    (TestPool, parts.SinglePrecision, "bfloat16_agrees_with_float32"),
    (TestPool, parts.OnTheProcessor, "a_dry_run_takes_no_memory"),
    (TestPool, parts.Catching, "the_constructor_is_a_schema"),
    (TestPool, parts.NoJson, "the_constructor_is_a_schema"),
    (TestPool, parts.Positional, "the_constructor_is_a_schema"),
    (TestPool, parts.NoLengths, "the_constructor_is_a_schema"),
    (TestFrames, parts.WrongRate, "frames_come_at_the_declared_rate"),
    (TestFrames, parts.WrongLayers, "it_emits_what_it_declares"),
    (TestFrames, parts.Cut, "audio_longer_than_a_window_is_read_to_its_end"),
    (TestFrames, parts.HearsPadding, "padding_does_not_leak"),
    (TestFrames, parts.Levelled, "batch_equals_single"),
    (TestFrames, parts.Levelled, "silence_and_a_single_sample_give_finite_states"),
    (TestSteady, rules.LeavesAMask, "it_ends_with_everything_decided"),
    (TestSteady, rules.TouchesThePrompt, "the_prompt_is_never_touched"),
    (TestSteady, rules.TouchesTheDraft, "draft_tokens_do_not_change"),
    (TestSteady, rules.GlobalChance, "the_same_seeds_give_the_same_answer"),
    (TestSteady, rules.OneSeedForAll, "a_row_alone_is_the_row_in_a_batch"),
    (TestSteady, rules.Cold, "samples_follow_the_model_exactly"),
    (TestSteady, rules.SaysTheMask, "it_ends_with_everything_decided"),
    (TestSteady, rules.Stale, "it_ends_with_everything_decided"),
    (TestSteady, rules.Silent, "final_tokens_do_not_change"),
    (TestSteady, rules.Shifted, "certain_predictions_are_the_answer"),
    (TestSteady, rules.Wavering, "final_tokens_do_not_change"),
    (TestSteady, rules.Undeclared, "the_constructor_is_a_schema"),
]
MASKED = type("MaskedSuite", (ObjectiveSuite,), {"part": rules.Masked, "unbiased": True})
CHECKS += [
    (MASKED, rules.CorruptsThePrompt, "only_answer_tokens_are_corrupted"),
    (MASKED, rules.GlobalNoise, "seeds_reproduce"),
    (MASKED, rules.BatchNoise, "a_row_is_corrupted_alike_in_any_batch"),
    (MASKED, rules.Unweighted, "the_expectation_is_the_bound"),
    (MASKED, rules.Doubled, "the_loss_of_a_fully_masked_answer_is_cross_entropy"),
    (MASKED, rules.Everywhere, "only_predicted_tokens_have_a_gradient"),
    (MASKED, rules.Everywhere, "other_states_and_tokens_do_not_change_the_loss"),
]
LLADA = type("LLaDASuite", (BackboneSuite,), {"options": {"config": SMALL}})
LLAMAS = type("LlamaSuite", (BackboneSuite,), {"options": {"config": LLAMA}})
CHECKS += [
    (LLADA, parts.SeesPadding, "padding_and_neighbours_do_not_leak"),
    (LLADA, parts.CountsColumns, "positions_count_and_columns_do_not"),
    (LLADA, parts.NoMemory, "a_full_kv_cache_equals_a_plain_pass"),
    (LLADA, parts.KeepsEverything, "the_kv_cache_keeps_slots_only_with_write"),
    (LLADA, parts.SeesBranches, "branches_and_attention_masks_are_respected"),
    (LLAMAS, parts.SeesTheFuture, "attention_has_the_declared_direction"),
    (LLADA, parts.SeesNoFuture, "attention_has_the_declared_direction"),
]


@pytest.mark.parametrize(
    "suite, faulty, check", CHECKS, ids=[f"{part.__name__}-{check}" for _, part, check in CHECKS]
)
def test_a_planted_fault_is_caught(suite: Any, faulty: type, check: str) -> None:
    with pytest.raises(Exception) as caught:
        getattr(type("Planted", (suite,), {"part": faulty})(), f"test_{check}")()
    assert not isinstance(caught.value, AttributeError | NameError), caught.value


def test_an_option_that_is_not_declared_is_caught() -> None:
    class Misspelt(AdapterSuite):
        part = parts.Pool
        options = {"strid": 2}

    found = failures(Misspelt)["test_the_given_options_are_declared"]
    assert "strid: undeclared option, did you mean 'stride'?" in found


def test_an_option_of_the_wrong_type_is_caught() -> None:
    class Worded(AdapterSuite):
        part = parts.Pool
        options = {"stride": "2"}

    assert "expected int" in failures(Worded)["test_the_given_options_are_declared"]


def test_a_heavy_import_is_caught(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_heavy.py").write_text("import torch\nimport transformers\n")
    monkeypatch.syspath_prepend(tmp_path)

    class Heavy(parts.Pool):
        __module__ = "acme_heavy"

    class Suite(AdapterSuite):
        part = Heavy

    assert "transformers" in failures(Suite)["test_importing_it_is_light"]


def test_a_flag_turns_a_check_around() -> None:
    class Boastful(AdapterSuite):
        part = parts.Pool
        reads_padding = True
        uses_audio = False
        varies = True

    assert set(failures(Boastful)) == {
        "test_padding_does_not_leak",
        "test_it_hears_the_audio",
        "test_lengths_equal_out_lengths",
    }


def test_a_sampler_with_a_temperature_must_say_when_it_is_exact() -> None:
    class Quiet(SamplerSuite):
        part = rules.Steady

    assert set(failures(Quiet)) == {"test_samples_follow_the_model_exactly"}


def test_a_sampler_that_never_ends_is_caught() -> None:
    class Endless(rules.Steady):
        def places(self, canvas: Any) -> Any:
            while True:
                yield torch.full((canvas.count, 1), canvas.start)

    class Suite(SamplerSuite):
        part = Endless
        exact = {"temperature": 1.0}

    assert "has not ended" in failures(Suite)["test_it_ends_with_everything_decided"]
