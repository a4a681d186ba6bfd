"""What one client sends or waits for delays no other: deadlines, downloads, headers, decoding."""

import contextlib
import socket
import socketserver
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from helpers.serving import question, recording, serving

import diffa
import diffa.serving.service as service_module
from diffa.serving.limits import Limits

LIMITS = Limits(max_tokens=64, max_batch_size=4, max_waiting=16)


@pytest.fixture(scope="module")
def model():
    return diffa.build(diffa.Spec.read("tiny").change({"prompt.max_tokens": 8}))


def client_of(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def ask(address, messages=None, **options):
    more = {"model": "tiny", "messages": messages or question(), "max_tokens": 4, **options}
    return client_of(address).chat.completions.create(**more)


def outcome(address, *args, **options):
    """Return the status, the error's code and the seconds that an answer takes."""
    begin = time.monotonic()
    try:
        ask(address, *args, **options)
        status, code = 200, None
    except openai.APIStatusError as error:
        status, code = error.status_code, error.code
    return status, code, time.monotonic() - begin


@contextlib.contextmanager
def dripping_host(head):
    """Yield ``host:port`` of a server that sends ``head``, then a byte every 0.1 seconds."""
    ended = threading.Event()

    class Drip(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(head)
            with contextlib.suppress(OSError):
                while not ended.wait(0.1):
                    self.request.sendall(b"x")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as host:
        host.daemon_threads = True
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{host.server_address[1]}"
        ended.set()
        host.shutdown()


def remote(host):
    url = {"type": "audio_url", "audio_url": {"url": f"http://{host}/clip.wav"}}
    return [{"role": "user", "content": [url, {"type": "text", "text": "What?"}]}]


HEADS = {
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
    "header": b"HTTP/1.1 200 OK\r\nX-Long: ",
}


@pytest.mark.parametrize("part", HEADS)
def test_slow_downloads_delay_no_other_question_and_are_given_up(model, part):
    limits = LIMITS._replace(download_timeout=2.0)
    with (
        dripping_host(HEADS[part]) as host,
        ThreadPoolExecutor(6) as threads,
        serving(model, limits=limits, allowed_hosts=[host]) as (_, address),
    ):
        ask(address)
        slow = [threads.submit(outcome, address, remote(host)) for _ in range(6)]
        time.sleep(0.3)
        assert outcome(address)[2] < 1.5
        results = [each.result(20) for each in slow]
    assert {(status, code) for status, code, _ in results} == {(400, "download_too_slow")}
    assert max(seconds for *_, seconds in results) < 6


def test_a_download_below_the_least_rate_is_given_up(model, monkeypatch):
    monkeypatch.setattr("diffa.serving.download._GRACE", 0.3, raising=False)
    with (
        dripping_host(HEADS["body"]) as host,
        serving(model, limits=LIMITS, allowed_hosts=[host]) as (_, address),
    ):
        status, code, seconds = outcome(address, remote(host))
    assert (status, code) == (400, "download_too_slow") and seconds < 5


def test_the_deadline_counts_while_a_recording_is_downloaded(model):
    with (
        dripping_host(HEADS["body"]) as host,
        serving(model, limits=LIMITS, allowed_hosts=[host]) as (_, address),
    ):
        more = {"extra_body": {"diffa": {"deadline": 0.5}}}
        status, _, seconds = outcome(address, remote(host), **more)
    assert status == 504 and seconds < 1.5


def test_the_deadline_counts_while_a_forward_pass_hangs(model, monkeypatch):
    forward, released = model.backbone.forward, threading.Event()

    def hang(*args):
        released.wait(10)
        return forward(*args)

    with serving(model, limits=LIMITS) as (_, address):
        monkeypatch.setattr(model.backbone, "forward", hang)
        status, _, seconds = outcome(address, extra_body={"diffa": {"deadline": 0.5}})
        released.set()
    assert status == 504 and seconds < 2


def test_long_recordings_delay_no_short_one(model, monkeypatch):
    decode, released = service_module.decode_recording, threading.Event()

    def slow(sent, *args):
        if len(sent.data) > 2_000_000:
            released.wait(10)
        return decode(sent, *args)

    monkeypatch.setattr(service_module, "decode_recording", slow)
    long = question(recording(seconds=70))
    with serving(model, limits=LIMITS) as (_, address), ThreadPoolExecutor(5) as threads:
        ask(address)
        slow_ones = [threads.submit(outcome, address, long) for _ in range(5)]
        time.sleep(1)
        seconds = outcome(address, question(recording()))[2]
        released.set()
        assert all(each.result(60) for each in slow_ones)
    assert seconds < 3


def test_a_recording_that_cannot_fit_is_refused_by_its_header(model, monkeypatch):
    decoded = []
    decode = service_module.decode_recording
    monkeypatch.setattr(model.backbone, "max_length", 100)
    monkeypatch.setattr(
        service_module, "decode_recording", lambda *args: decoded.append(1) or decode(*args)
    )
    with (
        serving(model, limits=LIMITS) as (_, address),
        pytest.raises(openai.BadRequestError, match="cut the recording"),
    ):
        ask(address, question(recording(seconds=50)))
    assert not decoded


@contextlib.contextmanager
def connected(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=8) as connection:
        yield connection


def test_endless_headers_are_refused_after_their_limit(model):
    with serving(model, limits=LIMITS) as (_, address), connected(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(OSError, match=r"reset|[Bb]roken|timed out"):
            for number in range(4 * 1024):
                connection.sendall(b"x-%d: " % number + b"y" * 4096 + b"\r\n")
        assert outcome(address)[0] == 200


def test_a_header_that_drips_is_given_up_and_a_keep_alive_is_not(model):
    with serving(model, limits=LIMITS._replace(header_timeout=0.8)) as (_, address):
        with connected(address) as connection:
            begin = time.monotonic()
            with contextlib.suppress(OSError):
                for letter in b"GET /health HTTP/1.1\r\nHost: " + b"x" * 60:
                    connection.sendall(bytes([letter]))
                    time.sleep(0.05)
            assert time.monotonic() - begin < 3
        with connected(address) as connection:
            for _ in range(3):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
                time.sleep(1)


def test_too_many_headers_are_refused(model):
    with serving(model, limits=LIMITS) as (_, address), connected(address) as connection:
        lines = b"".join(b"x-%d: 1\r\n" % number for number in range(200))
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 431")
