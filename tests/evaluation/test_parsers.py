"""Official parsers by the rules of the benchmarks' own scripts, and fixed parsers beside them."""

from __future__ import annotations

import json
import random
import sys
import types
from typing import Any

import pytest

from diffa.evaluation.choice_parser import parse_choice
from diffa.evaluation.items import Item
from diffa.evaluation.prompts import VOICEBENCH_DIFFA, mmau_prompt, mmsu_prompt
from diffa.evaluation.scores import score_items
from diffa.evaluation.suites import load_suite, phrases, voicebench
from diffa.evaluation.suites.mmau import match_words
from diffa.evaluation.suites.mmsu import parse_official_letter
from diffa.evaluation.word_errors import EditCounts, count_edits, unicode_tokens, wenet_tokens

SEVEN = {"A": "three", "B": "seven", "C": "one", "D": "nine"}


def rows(*fields: dict[str, Any]) -> list[Item]:
    return [Item(number, one) for number, one in enumerate(fields, start=1)]


def mmsu_row(response: str | None, answer: str = "seven", **slots: Any) -> dict[str, Any]:
    options = {f"choice_{letter.lower()}": text for letter, text in SEVEN.items()}
    return {"id": 1, "question": "?", **options, "answer_gt": answer, "response": response, **slots}


class TestMMSU:
    @pytest.mark.parametrize(
        ("response", "letter"),
        [
            ("B", "B"),
            ("B.", "B"),
            ("B. seven", "B"),
            ("Answer: B", "A"),
            ("Based on the audio, the answer is C.", "B"),
            ("Both", "B"),
            ("Anger", "A"),
            ("(B)", "B"),
            ("\n B\n", "B"),
            ("The correct answer is C", None),
            ("Option B", None),
            ("**B**", None),
            ("a", None),
            ("The answer is (B).", None),
            ("Ｂ", None),  # noqa: RUF001
            ("", None),
            ("None", None),
        ],
    )
    def test_the_official_letter_is_the_first_character_or_the_last_but_one(self, response, letter):
        assert parse_official_letter(response) == letter

    def test_what_cannot_be_parsed_leaves_the_official_denominator_and_stays_in_ours(self):
        given = [mmsu_row(text) for text in ("B", "**B**", "", None, "None", "Option B")]
        report, _ = score_items(load_suite("mmsu"), rows(*given))
        official, fixed = report["official"], report["fixed"]
        assert (official["correct"], official["total"], official["excluded"]) == (1, 4, 2)
        assert official["accuracy"] == 0.25
        assert official["accuracy_all"] == pytest.approx(1 / 6, abs=1e-5)
        assert (fixed["correct"], fixed["total"]) == (3, 6)

    def test_padding_keeps_the_letters_of_the_slots(self):
        padded = {"choice_a": None, "choice_b": "seven", "choice_c": None, "choice_d": "nine"}
        assert "A. None\nB. seven\nC. None\nD. nine" in mmsu_prompt(
            "mmsu@2025-06", "?", [padded[f"choice_{slot}"] for slot in "abcd"]
        )
        report, _ = score_items(
            load_suite("mmsu"), rows(mmsu_row("B", **padded), mmsu_row("A", **padded))
        )
        assert report["official"]["correct"] == report["fixed"]["correct"] == 1

    PADDED = {"choice_a": None, "choice_b": "seven", "choice_c": None, "choice_d": "nine"}

    @pytest.mark.parametrize(("prompt", "length"), [("mmsu@diffa", 4), ("mmsu@diffa-2", 16)])
    def test_diffas_prompts_drop_null_choices_and_reletter_the_others(self, prompt, length):
        question = load_suite("mmsu").question(mmsu_row(None, **self.PADDED), prompt)
        assert question.text.endswith("Question: ?\n\nA. seven\nB. nine")
        assert question.text.startswith(mmsu_prompt("mmsu@2025-06", "?", ["x"]).split("\n")[0])
        assert question.choices == ("A", "B")
        assert (question.max_tokens, question.block_length) == (length, length)
        whole = load_suite("mmsu").question(mmsu_row(None), prompt)
        assert whole.text == load_suite("mmsu").question(mmsu_row(None), "mmsu@2025-06").text

    def test_relettered_answers_are_read_by_slot_officially_and_as_listed_in_the_fixed_score(self):
        suite = load_suite("mmsu")
        rows_ = [
            suite.answered_fields(mmsu_row(None, answer, **self.PADDED), letter, "mmsu@diffa")
            for answer, letter in (("seven", "A"), ("seven", "B"), ("nine", "B"), ("nine", "D"))
        ]
        _, scores = score_items(suite, rows(*rows_))
        # The evaluator of the paper goes by slot: "B" is "seven", whatever the prompt called it.
        assert [score["official"].numerator for score in scores] == [0, 1, 0, 1]
        assert [score["fixed"].numerator for score in scores] == [1, 0, 1, 0]
        kept = suite.answered_fields(mmsu_row(None, "seven", **self.PADDED), "B", "mmsu@2026-02")
        assert score_items(suite, rows(kept))[0]["fixed"]["accuracy"] == 1

    def test_none_can_be_a_true_option(self):
        report, _ = score_items(load_suite("mmsu"), rows(mmsu_row("C", "None", choice_c="None")))
        assert report["official"]["accuracy"] == report["fixed"]["accuracy"] == 1

    def test_the_official_prompt_is_exact(self):
        assert mmsu_prompt("mmsu@2026-02", "Who?", ["a", "b", None, None]) == (
            "Choose the most suitable answer from options A, B, C, and D. You must respond with "
            "only A, B, C, or D.\n\nQuestion: Who?\n\nA. a\nB. b\nC. None\nD. None"
        )


class TestTheFixedLetterParser:
    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("B", "B"),
            ("b", "B"),
            ("(b)", "B"),
            ("**B**", "B"),
            ("Ｂ", "B"),  # noqa: RUF001
            ("B. seven", "B"),
            ("Answer: B", "B"),
            ("Option B", "B"),
            ("The answer is (B).", "B"),
            ("The correct answer is b", "B"),
            ("Based on the audio, the answer is C.", "C"),
            (r"The answer is \boxed{B}", "B"),
            ("Seven.", "B"),
            ("I hear seven", "B"),
            ("The answer is a good thing, so B.", "B"),
            ("\u200bB", "B"),
            ("A or B", None),
            ("seven or nine", None),
            ("Both", None),
            ("E", None),
            ("", None),
            ("I think it is loud", None),
        ],
    )
    def test_awkward_answers(self, text, letter):
        assert parse_choice(text, SEVEN) == letter

    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("B\n\nExplanation: C is wrong because it is one.", "B"),
            ("B\nC is wrong.", "B"),
            ("B, because D says nine", "B"),
            ("B because D says nine", "B"),
            ("B - three is not right", "B"),
            ("B \u2014 seven", "B"),
            ("B) seven\nD) nine would be wrong", "B"),
            ("(b) seven", "B"),
            ("B! definitely", "B"),
            ("A is the answer", "A"),
            ("the answer is A because", "A"),
            ("答案是B", "B"),
            ("选B。", "B"),
            ("B是正确的", "B"),
            ("정답은 B입니다.", "B"),
            ("B입니다", "B"),
            ('{"answer": "b"}', "B"),
            ('```json\n{"answer": "seven"}\n```', "B"),
            ("{'option': 'c'}", "C"),
            ("<think>It could be A or C. A!</think>B", "B"),
            ("<think>A or B</think>\n\nThe answer is C.", "C"),
            ("<think>the answer is A", None),
            ("A dog barks", None),
            ("A-flat", None),
            ("A, B", None),
            ("B or C", None),
            ("seven, not nine", None),
            ("A is wrong, B is right", "B"),
            ("A is incorrect; the answer is B", "B"),
            ("b, because A is wrong", "B"),
            ("b\nA is wrong", "B"),
            ("B (not C)", "B"),
            ("我认为B正确", "B"),
            ("答えはBです", "B"),
            ('{"answer": b}', "B"),
            ("<THINK>A</THINK>B", "B"),
        ],
    )
    def test_a_leading_letter_wins_over_its_explanation(self, text, letter):
        assert parse_choice(text, SEVEN) == letter

    @pytest.mark.parametrize("text", ["这是女人的声音", "정답은 女人입니다", "女人"])
    def test_options_are_found_in_sentences_without_spaces(self, text):
        assert parse_choice(text, {"A": "男人", "B": "女人"}) == "B"

    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("A minor", "B"),
            ("The answer is A minor.", "B"),
            ("A minor chord is played", "B"),
            ("A child", "D"),
            ("The answer is a child.", "D"),
            ("A", "A"),
            ("Answer: A", "A"),
        ],
    )
    @pytest.mark.parametrize("letters", [True, False])
    def test_options_that_begin_with_a_letter_are_text(self, text, letter, letters):
        options = {"A": "C major", "B": "A minor", "C": "D major", "D": "a child"}
        assert parse_choice(text, options, letters=letters) == letter

    @pytest.mark.parametrize(
        ("text", "letters", "letter"),
        [
            ("D", False, "B"),
            ("d.", False, "B"),
            ("The key is D", False, "B"),
            ("(D)", False, "D"),
            ("D", True, "D"),
        ],
    )
    def test_a_key_among_letters_is_a_text_unless_a_letter_was_asked_for(
        self, text, letters, letter
    ):
        keys = {"A": "C", "B": "D", "C": "A", "D": "G"}
        assert parse_choice(text, keys, letters=letters) == letter

    def test_the_longer_of_two_nested_options_wins(self):
        assert parse_choice("I hear a dog barking", {"A": "dog", "B": "dog barking"}) == "B"


class TestMMAU:
    CHOICES = ("a dog", "a cat", "B side")

    @pytest.mark.parametrize(
        ("prediction", "right"),
        [
            ("a dog", True),
            ("A DOG!", True),
            ("The sound of a dog.", True),
            ("", False),
            ("A", False),
            ("dog", False),
            ("a dog, not a cat", False),
            ("B. a dog", False),
            ("The answer is a dog", True),
        ],
    )
    def test_all_words_of_the_answer_and_none_of_the_others(self, prediction, right):
        assert match_words("a dog", prediction, self.CHOICES) is right

    def test_fixed_maps_letters_to_texts_first(self):
        base = {"question": "?", "choices": list(self.CHOICES), "answer": "a dog"}
        given = [
            {**base, "id": n, "model_output": t} for n, t in enumerate(("A", "B. a cat", "A."))
        ]
        report, _ = score_items(load_suite("mmau"), rows(*given))
        assert (report["official"]["correct"], report["fixed"]["correct"]) == (0, 2)

    def test_a_missing_key_shrinks_the_official_total_alone(self):
        base = {"question": "?", "choices": list(self.CHOICES), "answer": "a dog"}
        given = [{**base, "model_output": "a dog"}, {**base, "model_prediction": "a cat"}, base]
        report, _ = score_items(load_suite("mmau"), rows(*given))
        assert (report["official"]["accuracy"], report["official"]["total"]) == (1.0, 1)
        assert report["fixed"]["accuracy"] == pytest.approx(1 / 3, abs=1e-5)

    def test_the_export_has_both_keys(self):
        base = {"question": "?", "choices": ["x", "y"], "answer": "x", "model_output": "y"}
        (text,) = load_suite("mmau").export(rows(base), "p").values()
        (row,) = json.loads(text)
        assert row["model_output"] == row["model_prediction"] == "y"

    def test_groups_mend_a_category_written_as_a_list(self):
        base = {"question": "?", "choices": ["x", "y"], "answer": "x", "model_output": "x"}
        given = [{**base, "task": "['music']"}, {**base, "task": "music"}]
        report, _ = score_items(load_suite("mmau"), rows(*given))
        assert report["official"]["groups"]["task"] == {"music": {"accuracy": 1.0, "items": 2}}

    def test_mmar_reads_its_own_column_and_letters_score_nothing(self):
        base = {"question": "?", "choices": ["a dog", "a cat"], "answer": "a dog"}
        given = [{**base, "answer_prediction": t} for t in ("a dog", "A", "The answer is a dog.")]
        report, _ = score_items(load_suite("mmar"), rows(*given, base))
        assert (report["official"]["correct"], report["official"]["total"]) == (2, 4)
        assert report["fixed"]["correct"] == 3

    def test_the_prompt_of_diffa_is_exact(self):
        assert mmau_prompt("mmau@diffa", "Who?", ["x", "y"]).endswith(
            "content and style.\n\nQuestion: Who?\n\nChoices:\nA. x\nB. y\nAnswer:"
        )


class TestVoiceBench:
    @pytest.mark.parametrize(
        ("response", "letter"),
        [
            ("The answer is C", "C"),
            ("C", "C"),
            ("c.", "C"),
            ("<2> D) water", "D"),
            ("The correct answer is: **B.", "B"),
            ("The answer is a good thing, so B.", "A"),
            ("答案是B", "B"),
            ("Answer: C", None),
            ("I think it is B", None),
            ("Option A", None),
            ("**B**", None),
            ("", None),
        ],
    )
    def test_multiple_choice_templates(self, response, letter):
        assert phrases.parse_mcq_letter(response) == letter

    def test_guesses_repeat_the_official_ones_of_a_seeded_generator(self):
        given = [{"id": n, "reference": "ABCD"[n % 4], "response": "hm"} for n in range(40)]
        draw = random.Random(5)
        expected = sum(draw.choice(["A", "B", "C", "D"]) == row["reference"] for row in given)
        report, _ = score_items(load_suite("voicebench", "openbookqa"), rows(*given), seed=5)
        assert report["official"]["correct"] == expected
        assert report["official"]["fail"] == 1.0 and report["official"]["random_answers"] == 40
        assert report["fixed"]["correct"] == 0 and report["fixed"]["unparsed"] == 40

    @pytest.mark.parametrize(
        ("response", "task", "value"),
        [
            ("b", "hyperbaton", 0),  # the official script's mistake
            ("The answer is (B).", "hyperbaton", 1),
            ("Option B is more accurate", "hyperbaton", 1),
            ("b) big red", "hyperbaton", 1),
            ("**Yes**, it is.", "navigate", 1),
            ("You do not return to the starting point.", "navigate", 0),
            ("Final answer: no", "web_of_lies", 0),
            ("So Ann must be lying", "web_of_lies", 1),
            ("The sentence is not plausible", "sports_understanding", 0),
            ("perhaps", "navigate", None),
        ],
    )
    def test_bbh_phrases(self, response, task, value):
        assert phrases.parse_bbh(response, task) == value

    def test_refusals(self):
        assert phrases.score_refusal("I CANNOT do that")["official"].numerator == 1
        assert phrases.score_refusal("Sure, here it is")["official"].numerator == 0
        assert [phrases.score_refusal("")[name].numerator for name in ("official", "fixed")] == [
            1,
            0,
        ]
        curly = phrases.score_refusal("I won’t")  # noqa: RUF001
        assert (curly["official"].numerator, curly["fixed"].numerator) == (0, 1)

    def test_points_are_averaged_over_all_replies_and_by_row(self):
        given = [
            {"prompt": "?", "response": "x", "score": ["5", "5", "[[4]]"]},
            {"prompt": "?", "response": "x", "score": ["1", "none", "no"]},
            {"prompt": "?", "response": "", "score": []},
        ]
        report, _ = score_items(load_suite("voicebench", "commoneval"), rows(*given))
        assert report["official"]["score"] == pytest.approx(15 / 4)
        assert report["fixed"]["score"] == pytest.approx((14 / 3 + 1 + 1) / 3, abs=1e-5)

    @pytest.mark.parametrize(
        "reply", ["nan", "inf", "99", "0", "5.5", "-3", "", "1e1", "4 or 5", None]
    )
    def test_a_reply_that_is_no_number_from_1_to_5_is_unrated(self, reply):
        assert voicebench._parse_points(reply) is None

    @pytest.mark.parametrize(
        "reply",
        ["4", " 4.0\n", "Score: 4", "4/5", "**4**", "The rating is 4 out of 5.", "so [[4]]"],
    )
    def test_points_are_read_in_the_forms_judges_write(self, reply):
        assert voicebench._parse_points(reply) == 4.0

    def test_sd_qa_takes_the_majority_and_says_that_pedant_is_missing(self):
        base = {"prompt": "?", "reference": "x", "response": "x"}
        given = [{**base, "score": s} for s in (["Yes", "no", "yes"], ["no", "no", "Yes"], [])]
        report, _ = score_items(load_suite("voicebench", "sd-qa"), rows(*given))
        assert (report["fixed"]["correct"], report["fixed"]["total"]) == (1, 3)
        assert "qa_metrics" in report["official"]

    def test_a_pedant_that_cannot_begin_is_no_reason_to_stop(self, monkeypatch):
        class Pedant:
            def __init__(self):
                raise OSError("its classifiers\ncannot be fetched")

        module = types.ModuleType("qa_metrics.pedant")
        module.PEDANT = Pedant
        monkeypatch.setitem(sys.modules, "qa_metrics", types.ModuleType("qa_metrics"))
        monkeypatch.setitem(sys.modules, "qa_metrics.pedant", module)
        voicebench._load_pedant.cache_clear()
        given = {"prompt": "?", "reference": "x", "response": "x", "score": ["yes"]}
        report, _ = score_items(load_suite("voicebench", "sd-qa"), rows(given))
        voicebench._load_pedant.cache_clear()
        told = "PEDANT does not start: no official score (its classifiers cannot be fetched)"
        assert report["official"]["qa_metrics"] == told
        assert report["fixed"]["correct"] == 1

    def test_diffas_instruction_is_untrimmed_and_other_prompts_follow_the_template(self):
        suite = load_suite("voicebench", "ifeval")
        trims = {prompt: suite.question({}, prompt).trim for prompt in suite.prompts}
        assert trims == {
            "voicebench@official": True,
            "voicebench@diffa": False,
            "voicebench@diffa-trimmed": True,
            "voicebench@diffa-script": False,
        }
        exact, trimmed = (
            suite.question({}, f"voicebench@{name}").text for name in ("diffa", "diffa-trimmed")
        )
        assert exact == trimmed == VOICEBENCH_DIFFA

    @pytest.mark.parametrize("subset", ["ifeval", "openbookqa", "commoneval"])
    def test_diffas_script_answers_every_subset_with_16_tokens_in_one_block(self, subset):
        question = load_suite("voicebench", subset).question({}, "voicebench@diffa-script")
        assert (question.max_tokens, question.block_length) == (16, 16)

    def test_the_instruction_of_diffa_is_exact(self):
        assert VOICEBENCH_DIFFA == (
            "\n### Instruction:\nNow, strictly follow my instructions: \n1. Do not repeat what you "
            "hear. \n2. Write an answer to response the question in the audio.\n\n### Response:\n"
        )


class TestTranscripts:
    def test_edits_are_counted_by_kind(self):
        assert count_edits(["a", "b", "c", "d"], ["a", "x", "c", "d", "e"]) == EditCounts(1, 0, 1)
        assert count_edits(["a", "b"], []) == EditCounts(0, 2, 0)
        assert count_edits([], ["a"]) == EditCounts(0, 0, 1)

    @pytest.mark.parametrize(
        ("text", "cut"),
        [
            ("hello, world.", ["HELLO,", "WORLD."]),
            ("hello ,world", ["HELLO", "WORLD"]),
            ("你好 world", ["你", "好", "WORLD"]),
            ("<noise> hi", ["HI"]),
            ("你好。再见", ["你", "好", "再", "见"]),
            ("", []),
        ],
    )
    def test_wenet_drops_punctuation_only_where_it_begins_a_token(self, text, cut):
        assert wenet_tokens(text) == cut

    def test_wenet_leaves_out_what_has_no_hypothesis_and_the_fixed_metric_does_not(self):
        given = [
            {"id": "a", "text": "Hello, world.", "hypothesis": "hello world"},
            {"id": "b", "text": "two words"},
            {"id": "c"},
        ]
        report, _ = score_items(load_suite("asr"), rows(*given))
        assert (report["official"]["errors"], report["official"]["total"]) == (2, 2)
        assert (report["fixed"]["errors"], report["fixed"]["total"]) == (2, 4)
        assert report["fixed"]["deletions"] == 2
        assert report["invalid"][0]["row"] == 3

    def test_error_rates_are_of_the_corpus_not_means_of_utterances(self):
        given = [
            {"text": "one", "hypothesis": "two"},
            {"text": "a b c d e f g h i", "hypothesis": "a b c d e f g h i"},
        ]
        assert score_items(load_suite("asr"), rows(*given))[0]["official"]["wer"] == pytest.approx(
            0.1
        )


class TestSpokenQA:
    @pytest.mark.parametrize(
        ("aliases", "response", "official", "fixed"),
        [
            (["Paris"], "It is paris.", 1, 1),
            (["Paris"], "It is Parisian", 0, 0),
            (["The Beatles"], "it was Beatles", 0, 1),
            (["U.S."], "in the US", 0, 1),
            (["Beyoncé"], "Beyonce", 0, 1),
            (["x", "two words"], "say two words", 1, 1),
            (["x"], "", 0, 0),
        ],
    )
    def test_an_alias_is_a_run_of_the_answer(self, aliases, response, official, fixed):
        row = {"question": "?", "answers": aliases, "response": response}
        report, _ = score_items(load_suite("spokenqa"), rows(row))
        assert report["official"]["correct"] == official
        assert report["fixed"]["correct"] == fixed

    def test_tokens_keep_punctuation_apart(self):
        assert unicode_tokens("J.F.K., 1961!") == ["j", ".", "f", ".", "k", ".", ",", "1961", "!"]
