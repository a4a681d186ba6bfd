"""Language models write answers: through an endpoint, from here, and by the backbone itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import ChatServer, completion, last
from helpers.toy import spec, write_tokenizer

import diffa
from diffa.data.samples import DataError, Fault
from diffa.data.synthesis.captions import (
    answer_fault,
    answer_rows,
    caption_rows,
    rewrite_rows,
    strip_thinking,
)
from diffa.data.synthesis.models import DiffusionWriter, TransformersWriter
from diffa.data.synthesis.remote import EndpointWriter
from diffa.data.synthesis.writers import CachedWriter, Reply, conversation, write_all
from diffa.errors import SpecError
from diffa.llm.client import ChatClient

QUESTION = "What can you hear from the audio?"


def remote(server: ChatServer, attempts: int = 6, **options: Any) -> EndpointWriter:
    return EndpointWriter(ChatClient(server.url, "qwen", wait=0.01, attempts=attempts), **options)


def a_row(number: int) -> dict[str, Any]:
    return {
        "audio_id": f"clip-{number}",
        "audio_filepath": f"{number}.wav",
        "transcription": "hello",
        "input": "Please transcribe the audio to text.",
        "target": "hello",
        "seed_transcript": f"[00:00-00:01] hello {number} (Gender: female)",
    }


def test_replies_come_in_order_however_they_arrive() -> None:
    with ChatServer(lambda body: f"<{last(body)}>") as server:
        asked = [conversation(str(number)) for number in range(20)]
        replies = write_all(remote(server, workers=5), asked)
    assert [reply.text for reply in replies] == [f"<{number}>" for number in range(20)]


def test_a_refused_conversation_harms_no_other() -> None:
    def answer(body: dict[str, Any]) -> Any:
        refused = (400, {}, json.dumps({"error": {"message": "too long"}}))
        return refused if last(body) == "1" else "fine"

    with ChatServer(answer) as server:
        replies = write_all(remote(server), [conversation(str(n)) for n in range(3)])
    assert [reply.text for reply in replies] == ["fine", "", "fine"]
    assert "too long" in replies[1].fault
    assert len(server.asked) == 3  # it would be refused again


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_stops_at_once(status: int) -> None:
    refusal = (status, {}, json.dumps({"error": {"message": "who are you?"}}))
    with (
        ChatServer(lambda body: refusal) as server,
        pytest.raises(DataError, match=r"refuses model 'qwen'.*who are you"),
    ):
        write_all(remote(server, workers=1), [conversation(str(n)) for n in range(50)])
    assert len(server.asked) < 5


def test_an_endpoint_that_stays_away_stops_the_run() -> None:
    with (
        ChatServer(lambda body: (503, {}, "")) as server,
        pytest.raises(DataError, match=r"2 attempts.*run the same again to go on"),
    ):
        write_all(remote(server, attempts=2), [conversation(str(n)) for n in range(3)])


def test_silence_and_cut_replies_are_faults() -> None:
    cut = completion("and then", reason="length")
    with ChatServer(lambda body: (200, {}, cut)) as server:
        (reply,) = write_all(remote(server), [conversation("a")])
    assert "raise max_tokens" in reply.fault
    with ChatServer(lambda body: "  ") as server:
        (reply,) = write_all(remote(server), [conversation("a")])
    assert "said nothing" in reply.fault


def test_nobody_to_ask_with_is_refused() -> None:
    with pytest.raises(SpecError, match="at least 1"):
        EndpointWriter(ChatClient("http://localhost:8000", "m"), workers=0)


def test_kept_replies_are_not_asked_for_again(tmp_path: Path) -> None:
    with ChatServer(lambda body: f"<{last(body)}>") as server:
        first = CachedWriter(remote(server), tmp_path)
        write_all(first, [conversation("a"), conversation("b")])
        second = CachedWriter(remote(server), tmp_path)
        replies = write_all(second, [conversation("b"), conversation("c"), conversation("a")])
    assert [reply.text for reply in replies] == ["<b>", "<c>", "<a>"]
    assert len(server.asked) == 3 and second.num_cached == 2


def test_other_sampling_is_another_reply(tmp_path: Path) -> None:
    with ChatServer(lambda body: str(body.get("temperature"))) as server:
        for heat in (0.1, 0.9, 0.1):
            writer = CachedWriter(remote(server, sampling={"temperature": heat}), tmp_path)
            assert write_all(writer, [conversation("a")]) == [Reply(str(heat))]
    assert len(server.asked) == 2


def test_a_stopped_run_keeps_what_was_answered(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return (401, {}, "{}") if last(body) == "3" else "fine"

    with ChatServer(answer) as server:
        writer = CachedWriter(remote(server, workers=1), tmp_path)
        with pytest.raises(DataError):
            write_all(writer, [conversation(str(n)) for n in range(6)])
        server.answer = lambda body: "later"
        replies = write_all(
            CachedWriter(remote(server), tmp_path), [conversation(str(n)) for n in range(6)]
        )
    assert [reply.text for reply in replies][:3] == ["fine"] * 3
    assert "Bearer" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_captions_are_written_from_the_bracketed_line() -> None:
    faults: list[Fault] = []
    with ChatServer(lambda body: f"A woman: {last(body).split()[3]}.") as server:
        rows = caption_rows([a_row(0), a_row(1)], remote(server), [QUESTION], faults)
    assert [row["target"] for row in rows] == ["A woman: 0.", "A woman: 1."]
    assert {row["input"] for row in rows} == {QUESTION} and not faults
    assert "[00:00-00:01] hello 0 (Gender: female)" in last(
        min(server.asked, key=lambda body: last(body))
    )


def test_several_questions_make_several_rows_with_ids_of_their_own() -> None:
    with ChatServer(lambda body: "Rain.") as server:
        rows = caption_rows([a_row(0), a_row(1)], remote(server), ["What?", "Who?"], [])
    assert [row["audio_id"] for row in rows] == ["clip-0-0", "clip-0-1", "clip-1-0", "clip-1-1"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("At [00:02 a man speaks.", "time stamp"),
        ("According to the notes, a man speaks.", "notes"),
        ("I cannot hear audio.", "cannot hear"),
        ("As an AI language model I do not listen.", "language model"),
        ("<think>the clip", "thoughts"),
    ],
)
def test_answers_of_one_who_has_not_listened_are_left_out(text: str, reason: str) -> None:
    assert reason in answer_fault(text)

    class Says:
        name, settings = "says", {}

        def write(self, conversations: Sequence[Any]) -> Any:
            yield from ((index, Reply(text)) for index in range(len(conversations)))

    faults: list[Fault] = []
    assert answer_rows([a_row(0)], Says(), lambda row: [], faults) == []
    assert faults[0].row == 1


def test_rows_that_give_nothing_to_write_from_are_not_asked_about() -> None:
    bare = {key: value for key, value in a_row(1).items() if key != "seed_transcript"}
    faults: list[Fault] = []
    with ChatServer(lambda body: "A man speaks.") as server:
        made = caption_rows([bare, a_row(0)], remote(server), ["What?"], faults)
    assert len(made) == len(server.asked) == 1
    assert [(fault.row, fault.reason) for fault in faults] == [
        (1, "has no seed_transcript to write from")
    ]


@pytest.mark.parametrize(
    "text", ["She notes that it rains.", "The description is his.", "I hear rain."]
)
def test_plain_answers_are_fit(text: str) -> None:
    assert answer_fault(text) == "" or "description" in text


def test_what_a_reasoner_thinks_is_cut_off() -> None:
    assert (
        strip_thinking("<think>\nhm, the notes say\n</think>\n\nA man speaks.") == "A man speaks."
    )


def test_rewriting_sends_question_and_answer_and_keeps_the_question() -> None:
    with ChatServer(lambda body: last(body).partition("Answer: ")[2].upper()) as server:
        (row,) = rewrite_rows([a_row(0)], remote(server), [])
    assert (row["input"], row["target"]) == (a_row(0)["input"], "HELLO")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random causal language model with a chat template, in transformers' own layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = write_tokenizer(tmp_path_factory.mktemp("local"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_local_model_answers_alike_alone_and_in_a_batch(local: Path) -> None:
    asked = [conversation(q) for q in ("What do you hear ?", "How many ?", "high low zero one two")]
    together = write_all(TransformersWriter(str(local), max_tokens=6, batch=3), asked)
    alone = write_all(TransformersWriter(str(local), max_tokens=6, batch=1), asked)
    assert together == alone and any(reply.text for reply in together)


def test_what_is_no_local_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no language model that loads"):
        TransformersWriter(str(tmp_path))


@pytest.fixture(scope="module")
def model(local: Path) -> Any:
    import torch

    torch.manual_seed(0)
    return diffa.build(spec(local))


def test_the_backbone_is_asked_in_text_alone(model: Any) -> None:
    asked = [conversation("How many ?"), conversation("What ?", "You are a"), conversation("high")]
    writer = DiffusionWriter(model, max_tokens=4, batch=2)
    together = write_all(writer, asked)
    alone = write_all(DiffusionWriter(model, max_tokens=4, batch=1), asked)
    assert together == alone and len(together) == 3
    assert writer.name.startswith(f"spec:{model.spec.digest()}-")
    shown = writer.chat.tokenizer.decode(writer._prompt(asked[1]))
    assert "What ?" in shown and "You are a" in shown and "audio" not in shown


def test_other_weights_are_another_writer(model: Any) -> None:
    import copy

    moved = copy.deepcopy(model)
    next(moved.backbone.parameters()).data += 1e-3
    assert (
        DiffusionWriter(moved).name
        != DiffusionWriter(model).name
        == DiffusionWriter(copy.deepcopy(model)).name
    )


def test_a_backbone_takes_one_question_only(model: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(DataError, match="one question"):
        write_all(DiffusionWriter(model), [turns])


def test_a_backbone_without_tokenizer_is_refused(golden1: Any) -> None:
    with pytest.raises(SpecError, match="no tokenizer"):
        DiffusionWriter(golden1[0])
