"""The one client of chat endpoints: what it asks again, when, what it gives up, what it keeps."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import ChatServer, completion

from diffa.errors import SpecError
from diffa.llm import client
from diffa.llm.cache import ReplyCache
from diffa.llm.client import ChatClient, ChatError, ChatReply, RequestRefused

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]


def endpoint(server: ChatServer, **options: Any) -> ChatClient:
    return ChatClient(server.url, "qwen", **{"wait": 0.01, "key": ""} | options)


def failing(times: int, status: int, **headers: str) -> Any:
    """An answer that is a fault at first."""
    left = [times]

    def answer(body: dict[str, Any]) -> Any:
        left[0] -= 1
        return (status, headers, "{}") if left[0] >= 0 else "at last"

    return answer


def test_the_request_carries_model_messages_settings_and_key() -> None:
    with ChatServer(lambda body: " yes\n") as server:
        asked = endpoint(server, key="secret\n").complete(QUESTION, {"temperature": 0.3, "n": 2})
    assert asked == [ChatReply("yes", "stop")] * 2
    assert server.asked == [{"model": "qwen", "messages": QUESTION, "temperature": 0.3, "n": 2}]
    assert server.keys == ["Bearer secret"]


def test_the_key_is_the_environments_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    with ChatServer(lambda body: "yes") as server:
        for options in ({"key": None}, {"key": "other"}, {"key": ""}):
            endpoint(server, **options).complete(QUESTION)
    assert server.keys == ["Bearer mine", "Bearer other", None]


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_what_passes_is_tried_again(status: int) -> None:
    with ChatServer(failing(2, status)) as server:
        assert endpoint(server).complete(QUESTION) == [ChatReply("at last", "stop")]
    assert len(server.asked) == 3


@pytest.mark.parametrize(("status", "fatal"), [(400, False), (422, False), (401, True),
                                                    (403, True), (404, True),
                                                    (405, True)])  # fmt: skip
def test_what_is_refused_is_not_tried_again(status: int, fatal: bool) -> None:
    refusal = (status, {}, json.dumps({"error": {"message": "not\nlike this"}}))
    with (
        ChatServer(lambda body: refusal) as server,
        pytest.raises(
            RequestRefused, match=r"http.*refuses model 'qwen': 4.*: not like this"
        ) as refused,
    ):
        endpoint(server).complete(QUESTION)
    assert len(server.asked) == 1
    assert refused.value.fatal == fatal == ("OPENAI_API_KEY" in str(refused.value))


@pytest.mark.parametrize("reason", ["nonsense", "{}", '{"choices": []}', '"text"', "[1]"])
def test_what_is_no_completion_is_tried_again_and_then_told(reason: str) -> None:
    with (
        ChatServer(lambda body: (200, {}, reason)) as server,
        pytest.raises(ChatError, match="no answer in 3 attempts"),
    ):
        endpoint(server, attempts=3).complete(QUESTION)
    assert len(server.asked) == 3


def test_nobody_there_is_said_with_what_to_do() -> None:
    with ChatServer(lambda body: "") as server:
        pass
    with pytest.raises(ChatError, match="Is it running") as reason:
        endpoint(server, attempts=2).complete(QUESTION)
    assert server.url in str(reason.value)


def test_an_answer_that_breaks_off_or_does_not_come_is_no_reply() -> None:
    done = threading.Event()
    broken = (200, {"Transfer-Encoding": "chunked"}, "no chunk")
    with (
        ChatServer(lambda body: broken) as server,
        pytest.raises(ChatError, match=r"in 2 attempts.*IncompleteRead"),
    ):
        endpoint(server, attempts=2).complete(QUESTION)
    with (
        ChatServer(lambda body: str(done.wait(2))) as server,
        pytest.raises(ChatError, match="timed out"),
    ):
        endpoint(server, attempts=1, timeout=0.05).complete(QUESTION)
    done.set()


def test_silence_is_a_reply() -> None:
    with ChatServer(lambda body: (200, {}, completion(None, reason="length"))) as server:
        assert endpoint(server).complete(QUESTION) == [ChatReply("", "length")]


class Waits(threading.Event):
    """Nobody sets it; what would be waited for it, in seconds, is only noted."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        return False


def waited(answer: Any) -> list[float]:
    """Seconds before each further attempt, of an endpoint that begins with one second."""
    waits = Waits()
    with ChatServer(answer) as server:
        endpoint(server, wait=1.0).complete(QUESTION, cancel=waits)
    return waits.seconds


def test_each_wait_is_twice_the_last() -> None:
    assert waited(failing(4, 503)) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("reason", "seconds"),
    [("7", 7), ("0.5", 1), ("9999", 60), ("soon", 1), ("nan", 1), ("inf", 1), ("-3", 1)],
)
def test_a_server_says_how_long_to_wait(reason: str, seconds: float) -> None:
    assert waited(failing(1, 429, **{"Retry-After": reason})) == [seconds]


def test_only_the_last_fault_says_how_long_to_wait() -> None:
    reason = iter([(429, {"Retry-After": "7"}, ""), (200, {}, "nonsense"), "at last"])
    assert waited(lambda body: next(reason)) == [7, 2]


def test_a_server_says_until_when_to_wait() -> None:
    until = formatdate(time.time() + 30, usegmt=True)
    (seconds,) = waited(failing(1, 503, **{"Retry-After": until}))
    assert 25 < seconds <= 30


def test_requests_of_all_threads_keep_to_a_rate() -> None:
    begun = []

    def answer(body: dict[str, Any]) -> str:
        begun.append(time.monotonic())
        return "x"

    with ChatServer(answer) as server, ThreadPoolExecutor(4) as pool:
        asked = endpoint(server, per_minute=1200)
        list(pool.map(lambda _: asked.complete(QUESTION), range(5)))
    assert begun[-1] - begun[0] >= 3.5 * 0.05  # 4 gaps, less the server's own delay


def test_once_it_is_over_nothing_waits_or_is_sent() -> None:
    cancel = threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        cancel.set()
        return 503, {"Retry-After": "50"}, ""

    with ChatServer(answer) as server:
        begin, asked = time.monotonic(), endpoint(server, per_minute=1)
        assert asked.complete(QUESTION, cancel=cancel) == []
        assert asked.complete(QUESTION, cancel=cancel) == []
    assert len(server.asked) == 1 and time.monotonic() - begin < 5


@pytest.mark.parametrize("given", ["v1", "v1/", "v1/chat/completions"])
def test_addresses_may_end_in_several_ways(given: str) -> None:
    with ChatServer(lambda body: "yes") as server:
        ChatClient(f"{server.url.removesuffix('v1')}{given}", "m", key="").complete(QUESTION)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("localhost:8000", {}, "begins with http"),
        ("http://localhost", {"attempts": 0}, "at least 1"),
        ("http://localhost", {"per_minute": 0}, "above 0"),
    ],
)
def test_wrong_options_are_refused(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ChatClient(url, "m", **options)


def test_a_key_that_no_header_may_have_is_refused_and_not_shown() -> None:
    for key in ("secret\nkey", "sécret"):
        with pytest.raises(SpecError, match="has a character that no header may have") as refused:
            ChatClient("http://localhost", "m", key=key)
        assert "cret" not in str(refused.value)


def test_a_fault_whose_text_never_comes_is_told_without_it() -> None:
    cancel = threading.Event()

    def serve(held: socket.socket) -> None:
        connection, _ = held.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 9\r\n\r\n")
            cancel.wait(60)

    with socket.create_server(("127.0.0.1", 0)) as held:
        threading.Thread(target=serve, args=(held,)).start()
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with pytest.raises(RequestRefused, match="400 Bad Request"):
            ChatClient(url, "m", key="", timeout=0.5).complete(QUESTION)
        cancel.set()


def test_a_reply_is_found_by_all_that_decided_it(tmp_path: Path) -> None:
    kept = ReplyCache(tmp_path / "kept")
    assert kept.get(["m", QUESTION]) is None
    kept.put(["m", QUESTION], {"text": "größer"})
    assert ReplyCache(tmp_path / "kept").get(["m", QUESTION]) == {"text": "größer"}
    assert kept.get(["n", QUESTION]) is None
    kept.put({"model": "m", "n": 2}, {"text": "in any order"})
    assert kept.get({"n": 2, "model": "m"}) == {"text": "in any order"}


def test_a_reply_that_is_not_whole_is_none(tmp_path: Path) -> None:
    kept = ReplyCache(tmp_path)
    kept.put("question", {"text": "answer"})
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"text": "ans')
    assert kept.get("question") is None


def test_threads_that_keep_the_same_reply_do_not_meet(tmp_path: Path) -> None:
    kept = ReplyCache(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: kept.put("question", {"text": "answer"}), range(200)))
    assert kept.get("question") == {"text": "answer"}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "kept.jsonl").touch()
    with pytest.raises(SpecError, match=r"kept\.jsonl is a file"):
        ReplyCache(tmp_path / "kept.jsonl")


def test_no_redirect_is_followed_and_the_key_goes_nowhere_else() -> None:
    with ChatServer(lambda body: "yes") as other:
        redirect = (302, {"Location": f"{other.url}/chat/completions"}, "{}")
        with (
            ChatServer(lambda body: redirect) as server,
            pytest.raises(RequestRefused, match=r"redirects to .*give that address"),
        ):
            endpoint(server, key="secret").complete(QUESTION)
        assert other.asked == [] and other.keys == []


@pytest.mark.parametrize("body", ["[" * 100_000, '{"choices": ' + "9" * 5000 + "}", "{", "[]"])
def test_a_reply_that_is_no_completion_is_that_requests_fault(body: str) -> None:
    with ChatServer(lambda _: (200, {}, body)) as server, pytest.raises(RequestRefused) as caught:
        endpoint(server, attempts=2).complete(QUESTION)
    assert not caught.value.fatal and len(server.asked) == 2


def test_a_reply_beyond_the_bound_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MAX_REPLY", 1000)
    with (
        ChatServer(lambda body: "x" * 2000) as server,
        pytest.raises(RequestRefused, match="a reply of more than"),
    ):
        endpoint(server, attempts=1).complete(QUESTION)


def test_half_a_character_in_a_reply_is_replaced() -> None:
    text = json.dumps({"choices": [{"message": {"content": "caf\ud83d!"}}]})
    with ChatServer(lambda body: (200, {}, text)) as server:
        assert endpoint(server).complete(QUESTION)[0].text == "caf\ufffd!"
