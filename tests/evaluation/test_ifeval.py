"""IFEval's instructions, each followed and each not, and how VoiceBench adds them up."""

from __future__ import annotations

import pytest

from diffa.evaluation.items import Item
from diffa.evaluation.scores import score_items
from diffa.evaluation.suites import ifeval, load_suite

FOLLOWED = [
    ("keywords:existence", {"keywords": ["Blue", "red"]}, "blue and RED", "blue"),
    (
        "keywords:frequency",
        {"keyword": "hey", "frequency": 2, "relation": "at least"},
        "hey Hey",
        "hey",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a cat"),
    (
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
        "Z",
        "zZ",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "two words",
        "now three words",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "One. Two.",
        "One.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "a\n\nSo, b",
        "a\n\nb",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x\nP.S. y", "x"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "no"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a* b", "a"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a}"),
    ("detectable_format:title", {}, "<<a>>\nb", "<a>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it. It.", "It."),
    ("startend:end_checker", {"end_phrase": "Bye."}, 'x "bye."', "bye. x"),
    ("startend:quotation", {}, '"x"', "x"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": "at least"},
        "AN x",
        "an",
    ),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


class TestIFEval:
    @pytest.mark.parametrize(
        ("name", "given", "good", "bad"), FOLLOWED, ids=[f[0] for f in FOLLOWED]
    )
    def test_an_instruction_is_followed_or_not(self, name, given, good, bad):
        assert ifeval.follows_instruction(good, name, given) is True
        assert ifeval.follows_instruction(bad, name, given) is False
        assert ifeval.follows_instruction(" ", name, given) is False

    def test_the_number_is_the_mean_of_strict_and_loose_over_prompts_and_instructions(self):
        two = {
            "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
            "kwargs": [{}, {}],
        }
        given = [
            {"prompt": "?", **two, "response": '"a"'},
            {"prompt": "?", **two, "response": 'Sure, here:\n"a"'},  # its first line spoils it
            {"prompt": "?", **two, "response": "a"},
        ]
        report, _ = score_items(
            load_suite("voicebench", "ifeval"), [Item(n, f) for n, f in enumerate(given, start=1)]
        )
        official = report["official"]
        assert official["prompt_strict"] == pytest.approx(1 / 3, abs=1e-5)
        assert official["prompt_loose"] == pytest.approx(2 / 3, abs=1e-5)
        assert official["instruction_strict"] == pytest.approx(3 / 6)
        assert official["instruction_loose"] == pytest.approx(5 / 6, abs=1e-5)
        assert official["accuracy"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 2 + 5 / 6) / 4, abs=1e-5)
