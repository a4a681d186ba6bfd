"""Pairs differ in one audible attribute, whoever writes them."""

from __future__ import annotations

import json
import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import ChatServer, last

from diffa.data.samples import Fault
from diffa.data.synthesis.preferences import (
    AttributeValues,
    corrupt_row,
    pairs_from_labels,
    pairs_from_writer,
)
from diffa.data.synthesis.remote import EndpointWriter
from diffa.llm.client import ChatClient
from diffa.nano.corpus.examples import Example
from diffa.nano.corpus.questions import TASK_WEIGHTS, true_answer, write_caption
from diffa.nano.corpus.scenes import Labels
from diffa.nano.corpus.sounds import Melody
from diffa.nano.preferences import SOURCE, corrupt_example, pairs

SPOKEN = Labels(
    (3, 7, 7), ((0.1, 0.4), (0.5, 0.8), (0.9, 1.2)), ("a", "a", "b"), ("man", "man", "woman"),
    ("german", "german", "british"), "fast", "loud", "tone", None, 1.5,
)  # fmt: skip
MELODY = Labels((), (), (), (), (), None, "quiet", "melody", Melody("rising", 4), 1.5)
SOUND = Labels((), (), (), (), (), None, "quiet", "chirp", None, 1.5)
OPEN = [
    (task, labels)
    for labels in (SPOKEN, MELODY, SOUND)
    for task in TASK_WEIGHTS
    if true_answer(task, labels) and not (task == "transcribe" and not labels.digits)
]


def example(labels: Labels, task: str, question: str = "?", answer: str | None = None) -> Example:
    import numpy as np

    told = answer or true_answer(task, labels) or ""
    return Example(np.zeros(4, dtype=np.float32), question, told, labels, task, "nano-1-2")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize(("task", "labels"), OPEN)
def test_every_open_answer_can_be_got_wrong(task: str, labels: Labels) -> None:
    for seed in range(20):
        made = corrupt_example(example(labels, task), seed)
        assert made is not None and made.rejected != true_answer(task, labels)
        assert made.explanation.startswith(f"{made.attribute}: ")


@pytest.mark.parametrize("labels", [SPOKEN, MELODY, SOUND])
def test_a_caption_is_wrong_in_one_thing_and_in_every_thing_in_turn(labels: Labels) -> None:
    right, seen = write_caption(labels), set()
    for seed in range(60):
        made = corrupt_example(example(labels, "caption"), seed)
        assert made is not None
        seen.add(made.attribute)
        compared = SequenceMatcher(None, words(made.rejected), words(str(right)), autojunk=False)
        changed = [block for block in compared.get_opcodes() if block[0] != "equal"]
        assert len(changed) == 1, (right, made)
    everything = {
        "text", "accent", "gender", "loudness", "speed", "sound"
    }  # fmt: skip
    assert seen == (
        everything if labels is SPOKEN else {"melody", "notes"} if labels is MELODY else {"sound"}
    )


def test_a_transcript_loses_one_word() -> None:
    made = corrupt_example(example(SPOKEN, "transcribe"))
    assert made is not None and made.attribute == "text"
    assert (
        sum(a != b for a, b in zip(made.rejected.split(), ["three", "seven", "seven"], strict=True))
        == 1
    )


def test_a_choice_is_rejected_with_its_own_letter() -> None:
    question = "How many? Options: A. two B. three C. twenty one D. nine"
    for seed in range(10):
        made = corrupt_example(example(SPOKEN, "count", question, "B. three"), seed)
        assert made is not None
        assert made.rejected in ("A. two", "C. twenty one", "D. nine")


def test_wrong_voices_are_voices() -> None:
    for seed in range(10):
        labels = SPOKEN._replace(genders=("man",) * 3)
        made = corrupt_example(example(labels, "gender"), seed)
        assert made is not None and made.rejected == "woman"


def test_the_same_seed_gives_the_same_pair() -> None:
    one, two = (corrupt_example(example(SPOKEN, "caption"), 5) for _ in range(2))
    assert one == two
    assert len({corrupt_example(example(SPOKEN, "caption"), seed) for seed in range(20)}) > 5


@pytest.mark.fsdd
def test_nano_pairs_are_written_with_the_published_keys(tmp_path: Path) -> None:
    from diffa.data.formats import MANIFEST_FIELDS, PREFERENCE_FIELDS
    from diffa.data.manifest import Manifest
    from diffa.data.validation import validate_manifest
    from diffa.nano.preferences import write_preferences

    path = write_preferences(tmp_path, "test", 3, 12)
    rows = json.loads(path.read_text("utf-8"))
    assert len(rows) == 12 and len({row["audio_id"] for row in rows}) == 12
    for row in rows:
        assert tuple(row) == (*MANIFEST_FIELDS, *PREFERENCE_FIELDS)
        assert row["chosen"] == row["target"] != row["rejected"]
        assert row["dpo_source"] == SOURCE and row["dpo_explanation"]
    assert validate_manifest(path).faults == []
    assert len(Manifest(path, pairs=True)) == 12  # what a preference stage reads


def test_examples_with_nothing_to_get_wrong_are_passed_over() -> None:
    class Three:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Example:
            silent = SOUND._replace(sound="silence", loudness=None)
            return example(SPOKEN if index == 1 else silent, "transcribe", answer="nothing")

    assert [pair.example.labels for pair in pairs(Three())] == [SPOKEN]  # type: ignore[arg-type]


def a_row(number: int, target: str, **attributes: str) -> dict[str, Any]:
    said = attributes.get("text", "")
    return {
        "audio_id": f"clip-{number}",
        "audio_filepath": f"{number}.wav",
        "transcription": said,
        "input": "What can you hear from the audio?",
        "target": target,
        "seed_transcript": f"[00:00-00:02] {said}",
        "attributes": attributes,
    }


CORPUS = [
    a_row(0, "A man speaks; his accent is Scottish.", gender="male", accent="Scottish"),
    a_row(1, "She sounds happy.", gender="female", emotion="happy"),
    a_row(2, "I hear “please call Stella”.", text="please call Stella"),
    a_row(3, "Somebody is angry.", emotion="angry", accent="Irish"),
    a_row(4, "It rains.", gender="male", text="other words"),
]


def test_labels_alone_make_pairs_that_differ_in_one_attribute() -> None:
    faults: list[Fault] = []
    made = pairs_from_labels(CORPUS, faults)
    assert [row["audio_id"] for row in made] == [f"clip-{n}" for n in range(4)]
    assert [fault.row for fault in faults] == [5]
    assert made[3]["rejected"] == "Somebody is happy."
    assert made[3]["dpo_explanation"] == "emotion: happy, not angry"
    assert all(row["chosen"] == row["target"] for row in made)


def test_a_gender_changes_in_all_its_words() -> None:
    row = a_row(0, "A man speaks; his voice is low. He sounds calm.", gender="male")
    made = corrupt_row(row, AttributeValues([row]))
    assert made is not None
    assert made.rejected == "A woman speaks; her voice is low. She sounds calm."


def test_one_word_of_what_is_said_changes() -> None:
    made = corrupt_row(CORPUS[2], AttributeValues([*CORPUS, a_row(9, "", text="other words")]))
    assert made is not None and made.attribute == "text"
    pairs = zip(words(made.rejected), words(CORPUS[2]["target"]), strict=True)
    assert sum(a != b for a, b in pairs) == 1


def test_a_value_that_stands_twice_is_left_alone() -> None:
    row = a_row(0, "A happy man sings a happy song.", emotion="happy")
    assert corrupt_row(row, AttributeValues([row, CORPUS[3]])) is None


def forger(body: dict[str, Any]) -> str:
    asked = last(body)
    if "A: " in asked:
        return "A" if asked.index("right") < asked.index("wrong") else "B"
    told = asked.partition("Right answer: ")[2].replace("right", "wrong")
    return f"```json\n{json.dumps({'rejected': told, 'explanation': 'it is wrong'})}\n```"


def by_endpoint(answer: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    faults: list[Fault] = []
    with ChatServer(answer) as server:
        writer = EndpointWriter(ChatClient(server.url, "qwen3_32b", wait=0.01, attempts=2, key=""))
        made = pairs_from_writer(rows, writer, faults, **options)
    return made, faults, server.asked


def test_an_endpoint_writes_and_judges_pairs() -> None:
    rows = [a_row(n, f"That is right {n}.", gender="male", emotion="sad") for n in range(12)]
    made, faults, asked = by_endpoint(forger, rows)
    assert [row["rejected"] for row in made] == [f"That is wrong {n}." for n in range(12)]
    assert {row["dpo_source"] for row in made} == {"openqa_qwen3_32b_v1"}
    assert not faults and len(asked) == 24
    told = [body["messages"][0]["content"] for body in asked]
    assert any("the gender" in text for text in told) and any(
        "the emotion" in text for text in told
    )
    firsts = [last(body).partition("A: ")[2][:12] for body in asked if "A: " in last(body)]
    assert len(set(firsts)) == 2  # neither side is always the right one


def test_pairs_that_the_judge_cannot_tell_apart_are_left_out() -> None:
    def unsure(body: dict[str, Any]) -> str:
        return "C" if "A: " in last(body) else forger(body)

    rows = [a_row(0, "That is right.", gender="male")]
    made, faults, _ = by_endpoint(unsure, rows)
    assert made == [] and "not clearly better" in faults[0].reason
    made, faults, asked = by_endpoint(unsure, rows, judged=False)
    assert len(made) == 1 and len(asked) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Certainly!", "not the JSON"),
        ('{"rejected": 3}', "not the JSON"),
        ('{"rejected": "that is  RIGHT."}', "is the chosen one"),
        ('{"rejected": "x x x x x x x x x x"}', "times as long"),
        ('{"rejected": "As an AI I am not right."}', "language model"),
    ],
)
def test_useless_wrong_answers_are_left_out(reply: str, reason: str) -> None:
    made, faults, _ = by_endpoint(lambda body: reply, [a_row(0, "That is right.", gender="male")])
    assert made == [] and reason in faults[0].reason


def test_rows_without_attributes_are_told() -> None:
    made, faults, asked = by_endpoint(forger, [a_row(0, "That is right.")])
    assert (made, asked) == ([], []) and "no attribute" in faults[0].reason
