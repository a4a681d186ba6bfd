"""Intervals, paired tests, nano-suite, and files of VoiceBench's shape."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffa.audio import read
from diffa.data.corpora.fsdd import TEST_INDICES
from diffa.errors import SpecError
from diffa.evaluation.intervals import (
    bootstrap_interval,
    mcnemar_test,
    paired_difference,
    permutation_test,
    ratio_of_sums,
)
from diffa.evaluation.suites import load_suite
from diffa.evaluation.suites.voicebench import subset_from_name
from diffa.nano.corpus.utterances import Utterances
from diffa.nano.suite_files import TASKS, make_item, write_suite
from diffa.spec import registry


class TestIntervals:
    def test_the_bootstrap_agrees_with_the_normal_interval_of_a_share(self):
        hits = [1.0] * 300 + [0.0] * 100
        low, high = bootstrap_interval(hits, [1.0] * 400, resamples=4000)
        wide = 1.96 * math.sqrt(0.75 * 0.25 / 400)
        assert low == pytest.approx(0.75 - wide, abs=0.006)
        assert high == pytest.approx(0.75 + wide, abs=0.006)

    def test_a_ratio_is_of_sums(self):
        assert ratio_of_sums([1, 0], [1, 9]) == 0.1
        assert math.isnan(ratio_of_sums([0], [0])) and math.isnan(
            bootstrap_interval([0.0], [0.0])[0]
        )

    def test_mcnemar_is_the_exact_binomial(self):
        assert mcnemar_test(0, 0) == 1
        assert mcnemar_test(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
        assert mcnemar_test(9, 1) == mcnemar_test(1, 9)

    def test_a_small_sample_is_permuted_as_all_its_signs_would_be(self):
        moved = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
        assert permutation_test(moved) == pytest.approx(2 / 16, abs=0.015)
        assert permutation_test(np.zeros(4)) == 1

    def test_a_paired_difference_sees_what_two_intervals_do_not(self):
        draw = np.random.default_rng(0)
        a = (draw.random(400) < 0.5).astype(float)
        b = np.where(draw.random(400) < 0.1, 1.0, a)
        one = np.ones(400)
        low_b, _ = bootstrap_interval(b, one)
        _, high_a = bootstrap_interval(a, one)
        assert low_b < high_a  # the two overlap
        found = paired_difference((a, one), (b, one))
        assert found.low > 0 and found.p < 0.001 and found.mcnemar < 0.001
        assert found.only_a == 0 and found.only_b == round(400 * found.value)
        again = paired_difference((a, one), (b, one))
        assert again == found


class TestSuites:
    @pytest.mark.parametrize(
        "name", [name for name in registry.available("suite") if name != "voicebench"]
    )
    def test_every_suite_asks_and_marks_what_it_says_it_does(self, name):
        made = load_suite(name)
        assert made.name == name and made.prompts and {"official", "fixed"} <= set(made.parsers)
        assert made.find_fault({}) != ""

    def test_an_unknown_suite_or_subset_says_what_there_is(self):
        with pytest.raises(SpecError, match="did you mean 'mmsu'"):
            load_suite("mmsuu")
        with pytest.raises(SpecError, match="did you mean 'sd-qa'"):
            load_suite("voicebench", "sdqa")

    def test_answer_lengths_are_those_of_the_papers(self):
        mcq = {"question": "?", "choices": ["a"], "choice_a": "a", "answer_gt": "a"}
        lengths = {
            "mmsu": (4, 4), "mmau": (16, 16), "mmar": (16, 16), "asr": (128, 128)
        }  # fmt: skip
        for name, length in lengths.items():
            asked = load_suite(name).question(mcq, load_suite(name).prompts[0])
            assert (asked.max_tokens, asked.block_length) == length
        parts = {"ifeval": (256, 32), "mmsu": (16, 16), "openbookqa": (16, 16), "sd-qa": (128, 32)}
        for name, length in parts.items():
            asked = load_suite("voicebench", name).question({}, "voicebench@official")
            assert (asked.max_tokens, asked.block_length) == length
            assert asked.text == asked.system == ""  # the official input is audio alone

    @pytest.mark.parametrize(
        ("path", "subset"),
        [
            ("model-alpacaeval_full-test-audio.jsonl", "alpacaeval_full"),
            ("model-alpacaeval-test-audio.jsonl", "alpacaeval"),
            ("result-model-sd-qa-usa-audio.jsonl", "sd-qa"),
            ("voicebench/sd-qa/usa-00000-of-00001.parquet", "sd-qa"),
            ("mmsu/law.jsonl", "mmsu"),
            ("other.jsonl", ""),
        ],
    )
    def test_a_subset_is_found_in_the_names_of_its_files(self, path, subset):
        assert subset_from_name(Path(path)) == subset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano-suite")
    write_suite(folder, per_task=4)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "nano-suite.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.fsdd
class TestNanoSuite:
    def test_it_has_the_columns_of_mmsu_and_sound(self, folder, rows):
        assert Counter(row["task_name"] for row in rows) == dict.fromkeys(TASKS, 4)
        assert {row["category"] for row in rows} == {"Perception", "Reasoning"}
        for row in rows:
            assert load_suite("nano-suite").find_fault(row) == ""
            choices = [row[f"choice_{slot}"] for slot in "abcd"]
            assert choices.count(row["answer_gt"]) == 1 and len(set(choices)) == 4
            wave, rate = read(folder / row["audio_path"])
            assert rate == 16_000 and 0.1 < len(wave) / rate <= 8

    def test_answers_that_are_few_come_in_turn(self, rows):
        said = [row["answer_gt"] for row in rows if row["task_name"] == "accent"]
        assert said == list(TASKS["accent"].answers)
        same = [row["answer_gt"] for row in rows if row["task_name"] == "speaker"]
        assert same == ["same", "different"] * 2

    def test_the_question_is_in_nanos_words(self, rows):
        asked = load_suite("nano-suite").question(rows[0], "nano@1")
        letters = " ".join(f"{n}. {rows[0][f'choice_{n.lower()}']}" for n in "ABCD")
        assert asked.text == f"{rows[0]['question']} Choose the right letter. {letters}"
        assert asked.choices == tuple("ABCD")

    def test_an_item_depends_on_its_seed_and_number_alone(self):
        first, second = (Utterances("test", 7, synthetic_voices=False) for _ in range(2))
        make_item(second, "sum", 3, np.random.default_rng(1))
        one, other = (make_item(s, "speed", 1, np.random.default_rng(9)) for s in (first, second))
        np.testing.assert_array_equal(one[0].audio, other[0].audio)
        assert one[1:] == other[1:] and one[0].labels == other[0].labels

    def test_only_test_recordings_of_real_people_are_used(self):
        speech = Utterances("test", 7, synthetic_voices=False)
        assert all(voice.real for voice in speech.voices)
        used = {int(file.stem.split("_")[2]) for files in speech.recordings.files.values()
                for file in files}  # fmt: skip
        assert used == set(TEST_INDICES)
