"""Our scorers against the benchmarks' own code, item by item, where that code can be installed.

docs/evaluation.md says how. A package whose rules are its own (a port) is no measure of ours and
is left out: lmms-eval's mmau, mmar, mmsu and librispeech, and whisper_normalizer.
"""

from __future__ import annotations

import ast
import logging
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from evaluation.test_ifeval import FOLLOWED

from diffa.evaluation import word_errors as words
from diffa.evaluation.items import Item
from diffa.evaluation.scores import score_items
from diffa.evaluation.suites import ifeval, load_suite, phrases, voicebench

IFEVAL = "lm_eval==0.4.13 (--no-deps) langdetect nltk immutabledict"
LMMS = "lmms_eval==0.7.3 (--no-deps)"
WHISPER = "openai-whisper==20250625 (--no-deps) more-itertools"


def folder(package: str, needs: str) -> Path:
    """Where an installed package lies; nothing of it is run."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed: pip install {needs}")
    return Path(next(iter(found.submodule_search_locations)))


def module(name: str, needs: str) -> ModuleType:
    """Import a module without the ``__init__`` of the packages around it.

    Those ask for what scoring does not: data sets, torch, clients of judges.
    """
    *parents, _ = name.split(".")
    place = folder(parents[0], needs)
    with pytest.MonkeyPatch.context() as patch:
        for depth in range(1, len(parents) + 1):
            bare = ModuleType(".".join(parents[:depth]))
            bare.__path__ = [str(place.joinpath(*parents[1:depth]))]
            patch.setitem(sys.modules, bare.__name__, bare)
        try:
            return import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} cannot be imported ({error}): pip install {needs}")


def defined(file: Path, name: str) -> ast.FunctionDef:
    """A function of a source file, wherever in it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    )


def running(file: Path, functions: Iterable[ast.stmt]) -> dict[str, Any]:
    """Run functions as they stand in a file, but let them guess None."""
    predictions = SimpleNamespace(choice=lambda among: None)
    quiet = {"print": lambda *told: None, "eval_logger": logging.getLogger(__name__)}
    names = {"re": re, "random": predictions, **quiet}
    exec(compile(ast.Module(list(functions), []), str(file), "exec"), names)
    return names


def strings(function: ast.FunctionDef) -> list[str]:
    """Every text that a function mentions."""
    found = (node.value for node in ast.walk(function) if isinstance(node, ast.Constant))
    return sorted({text for text in found if isinstance(text, str)})


def apart(
    items: Iterable[Any], ours: Callable[..., Any], theirs: Callable[..., Any]
) -> list[tuple[Any, Any, Any]]:
    """The items (tuples of arguments) on which two functions differ, with what they say."""
    both = ((item, ours(*item), theirs(*item)) for item in items)
    return [found for found in both if found[1] != found[2]]


AWKWARD = [
    "", " ", "\n", "A", "b", "B.", "(b)", "**B**", "Answer: B", "answer is b", "A or B", "Both",
    "The answer is (B).", "The answer is a good thing, so B.", "Ｂ", "b\u0301", "None", "<1> b",  # noqa: RUF001
    "<2>  yes.", "No<|user|>", "yes <|turn_end|> no", "no：", "答案是B", "\u200bB", "'b'", "a,b",  # noqa: RUF001
    r"is \( \boxed{b}", "I\u2019m sorry", "I'm sorry", "YES", "NO", "not plausible", "İ", "ß",
]  # fmt: skip


def around(text: str) -> list[str]:
    """A phrase alone, in other letters, marked, and inside an answer."""
    gaps = text.replace("(.+?)", "of all").replace("[CHOICE]", "c")
    made = [
        text, gaps, text.upper(), f"{gaps}.", f"So {gaps} it is", f"**{gaps}**", f"<1> {gaps}",
        f"{gaps} yes", f"{gaps} no", f"yes. {gaps}", f"no, {gaps}", f"b {gaps}", f"{gaps}<|user|>",
    ]  # fmt: skip
    return sorted(set(made))


def mixed(parts: list[str], count: int, seed: int, between: str = " ") -> list[str]:
    """Texts of some parts at random, so that several phrases compete."""
    draw = random.Random(seed)
    return [between.join(draw.choices(parts, k=draw.randint(2, 4))) for _ in range(count)]


# Phrases of BBH that lmms-eval's copy has and VoiceBench's script (at commit b3e5fd9) has not.
ADDED = (
    "the correct grammatical order is",
    "the sentence with the correct adjectives is",
    "the correct order of adjectives in the sentence is",
)


class TestVoiceBench:
    """The phrases of MatthewCYM/VoiceBench, which lmms-eval carries nearly as they are."""

    @pytest.fixture
    def scripts(self) -> Path:
        return folder("lmms_eval", LMMS) / "tasks" / "voicebench" / "utils.py"

    @pytest.mark.parametrize(
        "task", ["sports_understanding", "hyperbaton", "navigate", "web_of_lies"]
    )
    def test_bbh_reads_every_phrase_as_the_script_does(self, scripts, task):
        whole = defined(scripts, "voicebench_process_results_bbh")
        inner = [node for node in whole.body if isinstance(node, ast.FunctionDef)]
        theirs = running(scripts, inner)["extract_answer"]
        own = [p.text for name in ("yes_no", task) for p in phrases.bbh_phrases(name)]
        known = [text for text in sorted({*strings(whole), *own}) if not text.startswith(ADDED)]
        items = AWKWARD + [made for text in known for made in around(text)]
        items += mixed(known, 2000, seed=1)
        found = apart([(i, task) for i in items], phrases.parse_bbh, theirs)
        assert len(items) > 5000 and found == []

    def test_multiple_choice_takes_the_same_template_and_guesses_where_the_script_does(
        self, scripts
    ):
        whole = defined(scripts, "voicebench_process_results_mcq")
        inner = [node for node in whole.body if isinstance(node, ast.FunctionDef)]
        own = [text.replace("@", "[CHOICE]") for text in phrases.load_phrases()["mcq"]]
        known = [
            text.replace("[CHOICE]", letter)
            for text in sorted({*strings(whole), *own})
            for letter in "abcde"
        ]
        items = AWKWARD + [made for text in known for made in around(text)]
        items += mixed(known, 2000, seed=2)
        theirs = running(scripts, inner)["extract_answer"]
        found = apart([(i,) for i in items], phrases.parse_mcq_letter, theirs)
        assert len(items) > 5000 and found == []

    def test_refusals_are_the_same(self, scripts):
        whole = defined(scripts, "voicebench_process_results_harm")
        harm = running(scripts, [whole])[whole.name]
        known = [*strings(whole), *phrases.load_phrases()["refusal"]]
        items = AWKWARD + [made for text in known for made in around(text)]
        items += [text[1:-1] for text in known] + mixed(AWKWARD, 500, seed=3)
        found = apart(
            [(i,) for i in items],
            lambda text: phrases.score_refusal(text)["official"].numerator * 100,
            lambda text: harm(None, [text])["accuracy"],
        )
        assert len(items) > 1500 and found == []

    def test_pedant_is_told_reference_answer_and_question_as_it_names_them(self, monkeypatch):
        file = folder("qa_metrics", "qa_metrics==0.2.42 (--no-deps)") / "pedant.py"
        named = [argument.arg for argument in defined(file, "evaluate").args.args[1:]]
        told: list[Any] = []
        scorer = SimpleNamespace(evaluate=lambda *given: told.extend(given))
        monkeypatch.setattr(voicebench, "_load_pedant", lambda: (scorer, ""))
        voicebench.pedant_verdict("Paris", "In PARIS.", "Where?")
        assert dict(zip(named, told, strict=True)) == {
            "reference": ["paris"],
            "candidate": "in paris.",
            "question": "where?",
        }


# What responses are made of: each instruction has pieces here that follow it and that spoil it.
PIECES = [
    "a", "hey Hey", "Blue and red", "a cat.", "concatenate", "zZz", "two words", "One. Two.",
    "Dr. Who!", "So, b", "'So' it is", '"so? yes"', "so", "[a] [b]", "[]", "[address", "P.S. y",
    "p. s. y", "P.P.S z", "p. p. s", "PS: q", "* a\n- b", "** a", "- a\n  - b\n*c",
    "My answer is no.", "My answer is maybe", "*a* b", "**b** c", "* *", "****", "*a\nb*",
    "Section 1\nSection 2", "SECTION3 x", "Section", "{}", '```json\n{"a": 1}\n```',
    "```JSON [1]```", "{a: 1}", "<<a>>", "<< >>", "<a>", "***", "******", "Say it",
    "say it. Then more", "bye.", 'Bye."', '"x"', '"', "AN AND Ok", "U.S.A. NATO-LED", "12 + 1.5",
    "£5,", "naïve café", "你好。", "Ａ", "\u200b", "\t", "ééé", "x; y - z", "e.g. this",  # noqa: RUF001
]  # fmt: skip
TALK = [
    "ALL OF THIS IS ENGLISH TEXT", "all of this is english text", "All of this is English, too.",
    "C'est la vie, mon ami, et voilà.", "Das ist so, wie es immer war.", "DAS IST SO, WIE IMMER",
    "你好，世界。", "12 + 1.5", "<3", "ok", "OK", "no no no", "Привет, мир", "", " ", "\u200b",  # noqa: RUF001
]  # fmt: skip
SPEECH = ["language:response_language", "change_case:english_capital"]
SPEECH += ["change_case:english_lowercase"]
ASKED = [(name, given) for name, given, _, _ in FOLLOWED] + [
    ("keywords:existence", {"keywords": ["so", "a.c"]}),
    ("keywords:frequency", {"keyword": " a ", "frequency": 3, "relation": "less than"}),
    ("keywords:forbidden_words", {"forbidden_words": ["it", "bye", "a"]}),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 4, "let_relation": "at least"}),
    ("length_constraints:number_words", {"num_words": 6, "relation": "at least"}),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 1}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "Hey"},
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ("detectable_content:postscript", {"postscript_marker": "PS:"}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 3}),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION ", "num_sections": 1}),
    ("startend:end_checker", {"end_phrase": " a CAT. "}),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "less than"},
    ),
    *[("language:response_language", {"language": code}) for code in ("en", "fr", "de")],
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
]


def responses(count: int, seed: int) -> list[str]:
    """Every piece alone, and pieces joined by what instructions look at."""
    kept = [*PIECES, *AWKWARD]
    for number, gap in enumerate((" ", "\n", "\n\n", "\n***\n", "******", ". ")):
        kept += mixed(PIECES, count // 6, seed + number, gap)
    return kept


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Google's instruction checkers with their strict and loose rules, as lm-eval carries them.

    Both sides cut sentences by nltk's punkt model: the one that is there, else an almost empty
    one made here, so that nothing is downloaded (on rank 0 the checkers would, when imported).
    """
    for needed in ("nltk", "langdetect", "immutabledict"):
        folder(needed, IFEVAL)
    nltk, langdetect = import_module("nltk"), import_module("langdetect")
    made = tmp_path_factory.mktemp("nltk_data")
    model = made / "tokenizers" / "punkt_tab" / "english"
    model.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (model / name).write_text("")
    (model / "abbrev_types.txt").write_text("dr\ne.g\nu.s.a\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [*nltk.data.path, str(made)])
        patch.setattr(langdetect.DetectorFactory, "seed", 0)
        patch.setenv("LOCAL_RANK", "1")
        yield module("lm_eval.tasks.ifeval.utils", IFEVAL)


def checker(google: ModuleType, name: str, given: dict[str, Any]) -> Callable[[str], bool]:
    """What Google's strict rule says of responses to one instruction."""
    asked = google.InputExample(0, [name], "?", [given])
    return lambda text: (
        google.test_instruction_following_strict(asked, text).follow_all_instructions
    )


class TestIFEval:
    """Google's checkers, which VoiceBench adds up."""

    def test_every_kind_of_instruction_is_compared(self, google):
        kinds = set(google.instructions_registry.INSTRUCTION_DICT)
        assert kinds == set(ifeval.CHECKS) == {name for name, _ in ASKED}

    @pytest.mark.parametrize(
        ("name", "given"), ASKED, ids=[f"{n}-{name}" for n, (name, _) in enumerate(ASKED)]
    )
    def test_an_instruction_is_followed_by_the_same_responses(self, google, name, given):
        items = [*TALK, *mixed(TALK, 20, seed=4)] if name in SPEECH else responses(600, seed=4)
        theirs = checker(google, name, given)
        found = apart(
            [(i,) for i in items], lambda i: ifeval.follows_instruction(i, name, given), theirs
        )
        assert found == []
        assert {theirs(text) for text in items} == {True, False}

    def test_strict_and_loose_readings_add_up_to_the_same_four_numbers(self, google):
        draw = random.Random(5)
        rows, sums = [], [0.0] * 5
        for number, text in enumerate(responses(300, seed=6), start=1):
            asked = draw.sample([a for a in ASKED if a[0] not in SPEECH], draw.randint(1, 3))
            names = [name for name, _ in asked]
            given = [{"unused": None, **one} for _, one in asked]
            example = google.InputExample(number, names, "?", given)
            text = "x" + text  # nothing that VoiceBench would strip
            strict = google.test_instruction_following_strict(example, text)
            loose = google.test_instruction_following_loose(example, text)
            said = (strict.follow_all_instructions, loose.follow_all_instructions)
            lists = (strict.follow_instruction_list, loose.follow_instruction_list)
            parts = (*map(float, said), *(float(sum(each)) for each in lists), float(len(names)))
            fields = {"prompt": "?", "instruction_id_list": names, "kwargs": given}
            assert ifeval.score_ifeval(fields, text)["official"].counts == parts, text
            rows.append(Item(number, {**fields, "response": text}))
            sums = [a + b for a, b in zip(sums, parts, strict=True)]
        report, _ = score_items(load_suite("voicebench", "ifeval"), rows, resamples=1)
        four = [sums[0] / len(rows), sums[1] / len(rows), sums[2] / sums[4], sums[3] / sums[4]]
        assert report["official"]["accuracy"] == pytest.approx(sum(four) / 4, abs=1e-6)


SPOKEN = re.findall(
    r"\S+",
    """
    one two three twelve twenty thirty ninety nine hundred thousand million point five half and a
    oh zero double triple first second third twentieth hundredth ones sixes tens hundreds minus
    plus dollars dollar cents pounds euros percent per cent $20 £3 €5 ¢7 20% 1,000 3.14 1960s 21st
    2nd 7 12 1/2 ½ ٣ mr mrs dr. st. don't can't won't let's ain't i'm he's been she'd gone they've
    we'll i'ma gonna wanna cause kinda colour centre organise favourite behaviour grey uh um hmm
    mhm [noise] (laughs) <tag> Beyoncé naïve œuvre ß Hello, world. . , ! ? - -- ' 's o'clock $ %
    你好 THE
    """,
)


def spoken(count: int, seed: int) -> list[str]:
    """Transcripts of random words, some empty."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(SPOKEN, k=draw.randint(0, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def whisper() -> ModuleType:
    """OpenAI's own normalisers; with them ours finds their list of British spellings."""
    return module("whisper.normalizers.english", WHISPER)


class TestTranscripts:
    """Whisper's normalisers and jiwer's word errors."""

    def test_english_is_normalised_as_by_whisper(self, whisper):
        theirs = whisper.EnglishTextNormalizer()
        items = [
            *AWKWARD,
            *PIECES,
            *spoken(2000, seed=7),
            *mixed([*words.british_spellings()], 500, seed=8),
        ]
        found = apart([(i,) for i in items], words.whisper_words, lambda text: theirs(text).split())
        assert len(words.british_spellings()) > 1000 and found == []

    def test_characters_are_those_of_whispers_basic_normaliser(self, whisper):
        theirs = module("whisper.normalizers.basic", WHISPER).BasicTextNormalizer()
        items = [*AWKWARD, *PIECES, *spoken(1000, seed=9), "你好，世界。", "か゚", "e\u0301"]  # noqa: RUF001
        found = apart(
            [(i,) for i in items],
            words.whisper_characters,
            lambda text: list("".join(theirs(text).split())),
        )
        assert found == []

    def test_edits_are_as_many_as_jiwer_counts(self):
        jiwer = pytest.importorskip("jiwer", reason="pip install jiwer==4.0.0 (brings rapidfuzz)")
        draw = random.Random(10)
        texts = [" ".join(draw.choices("abcd", k=draw.randint(0, 12))) for _ in range(4000)]

        def errors(reference: str, said: str) -> tuple[int, int]:
            found = jiwer.process_words(reference, said)
            kinds = found.substitutions + found.deletions + found.insertions
            return kinds, found.insertions - found.deletions

        def ours(reference: str, said: str) -> tuple[int, int]:
            found = words.count_edits(reference.split(), said.split())
            return found.errors, found.insertions - found.deletions

        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        assert apart(pairs, ours, errors) == []

    def test_a_corpus_has_jiwers_word_error_rate_after_whispers_normaliser(self, whisper):
        jiwer = pytest.importorskip("jiwer", reason="pip install jiwer==4.0.0 (brings rapidfuzz)")
        clean = whisper.EnglishTextNormalizer()
        wanted, draw = spoken(400, seed=11), random.Random(12)
        said = [" ".join(w for w in text.split() if draw.random() < 0.8) for text in wanted]
        said[::7] = spoken(len(said[::7]), seed=13)
        rows = [
            Item(number, {"text": text, "hypothesis": heard})
            for number, (text, heard) in enumerate(zip(wanted, said, strict=True), start=1)
        ]
        report, _ = score_items(load_suite("asr"), rows, resamples=1)
        theirs = jiwer.wer([clean(text) for text in wanted], [clean(text) for text in said])
        assert report["fixed"]["wer"] == pytest.approx(theirs, abs=1e-6)
