"""Several replicas of the server on Ray: what travels to them, and how they answer and end."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
from helpers.serving import question

import diffa
from diffa.cli import main
from diffa.errors import DiffaError, SpecError
from diffa.nano.demo import recordings
from diffa.serving import ray_serve as replicas
from diffa.serving.limits import Limits
from diffa.serving.ray_serve import Deployment, ReplicaConfig

QUESTIONS = ("What digits are said?", "What can you hear?")


@pytest.fixture
def run_serve(capsys):
    """Run ``diffa serve`` in this process; returns its exit code and stderr."""

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main(["serve", "--spec", "tiny", *words])
        return end.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("words", [("--replicas", "2"), ("--threads", "2"), ("--gpus", "1")])
def test_options_of_replicas_need_ray(run_serve, words):
    code, text = run_serve(*words)
    assert code == 2 and "need --ray" in text


def test_an_address_in_use_is_an_error_before_a_model_is_loaded(run_serve, monkeypatch):
    monkeypatch.setattr(
        replicas.Deployment, "create_service", lambda _: pytest.fail("it was loaded")
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, text = run_serve("--port", port)
    assert code == 2 and f"cannot listen on 127.0.0.1:{port}: " in text
    code, text = run_serve("--host", "192.0.2.1")
    assert code == 2 and "cannot listen on 192.0.2.1:8000: " in text


def test_a_proxy_needs_a_port(run_serve):
    code, text = run_serve("--ray", "local", "--port", "0")
    assert code == 2 and "--port" in text


def test_a_missing_ray_names_the_extra(run_serve, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, text = run_serve("--ray", "local")
    assert code == 2 and "pip install 'diffa-audio[ray]'" in text


def test_a_wrong_spec_is_an_error_before_ray_starts(run_serve, monkeypatch):
    monkeypatch.setattr(replicas, "run_on_ray", lambda *_: pytest.fail("it has started"))
    code, text = run_serve("--ray", "local", "--set", "sampler.block_lenth=8")
    assert code == 2 and "sampler.block_lenth" in text


def test_replicas_get_the_resolved_spec_and_all_limits(monkeypatch, tmp_path):
    passed = []
    monkeypatch.setattr(replicas, "run_on_ray", lambda *given: passed.extend(given))
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    words = ["--max-batch-size", "3", "--max-waiting", "5", "--drain", "7", "--api-keys", str(keys)]
    words += ["--fetch-from", "Files:80", "--set", "sampler.steps=4", "--name", "mine"]
    words += ["--ray", "auto", "--replicas", "2", "--threads", "4", "--gpus", "0.5"]
    with pytest.raises(SystemExit):
        main(["serve", "--spec", "tiny", *words])
    served, host, port, address, each, _ = passed
    assert (host, port, address, each) == ("127.0.0.1", 8000, "auto", ReplicaConfig(2, 4, 0.5))
    assert (
        served.load_model.__self__.device == "cuda"
    )  # of the replica's node; this one may have none
    there = pickle.loads(pickle.dumps(served._replace(load_model=on_cpu(served.load_model))))
    service = there.create_service()
    try:
        assert (service.name, service.api_keys) == ("mine", ("one", "two"))
        assert service.allowed_hosts == ("files:80",)
        assert service.limits == Limits(max_batch_size=3, max_waiting=5, drain_timeout=7)
        tiny = diffa.Spec.read("tiny").set("sampler.steps", 4).resolve()
        assert service.model.spec.digest() == tiny.digest()
    finally:
        service.close()


def on_cpu(load):
    return load.__self__._replace(device="cpu").load


def test_only_the_sampler_of_a_saved_model_can_change(run_serve, tmp_path):
    diffa.save(diffa.build("tiny"), tmp_path / "saved")
    words = ("--spec", str(tmp_path / "saved"), "--ray", "local", "--set", "prompt.max_tokens=3")
    code, text = run_serve(*words)
    assert code == 2 and "only the sampler" in text and "prompt" in text


class Api:
    """What is asked of Ray Serve, written down."""

    def __init__(self, *there, fault=None):
        self.applications = {name: SimpleNamespace(deployments={}) for name in there}
        self.calls, self._fault = [], fault

    def status(self):
        return SimpleNamespace(applications=self.applications)

    def start(self, http_options):
        self.calls.append(("start", http_options))

    def run(self, made, name, route_prefix):
        self.calls.append(("run", name, route_prefix))
        text = f"It failed.\nTraceback:\n  somewhere\n{self._fault}\n"
        self.applications[name] = SimpleNamespace(deployments={"r": SimpleNamespace(message=text)})
        if self._fault:
            raise RuntimeError("Deploying failed: the deployments are unhealthy")

    def delete(self, name):
        self.calls.append(("delete", name))
        if self.calls.count(("delete", name)) == 1:
            raise TimeoutError
        del self.applications[name]

    def shutdown(self):
        self.calls.append(("shutdown",))


@pytest.fixture
def serve_on_fake(monkeypatch):
    """Serve through a given Api; signals have come before."""

    def run(api, address="auto", cpus=2.0, **more):
        ray = SimpleNamespace(
            cluster_resources=lambda: {"CPU": cpus}, shutdown=lambda: api.calls.append(("end",))
        )
        monkeypatch.setattr(replicas, "_connect", lambda _: (ray, api))
        monkeypatch.setattr(replicas, "create_application", lambda *_: None)
        monkeypatch.setattr(replicas, "_catch_signals", lambda: SimpleNamespace(wait=lambda: None))
        served = Deployment(lambda: None, "tiny", Limits(), (), ())
        replicas.run_on_ray(
            served, "h", 1, address, ReplicaConfig(**more), lambda: api.calls.append("ready")
        )

    return run


def test_after_a_signal_the_command_waits_until_the_application_is_deleted(serve_on_fake):
    api = Api()
    serve_on_fake(api)
    assert api.calls == [
        ("start", {"host": "h", "port": 1}), ("run", "diffa-tiny", "/"), "ready",
        ("delete", "diffa-tiny"), ("delete", "diffa-tiny"), ("shutdown",), ("end",),
    ]  # fmt: skip


def test_other_applications_keep_running(serve_on_fake):
    api = Api("other")
    serve_on_fake(api)
    assert list(api.applications) == ["other"] and ("shutdown",) not in api.calls
    api = Api("diffa-tiny")
    with pytest.raises(SpecError, match="serves diffa-tiny already"):
        serve_on_fake(api)
    assert api.calls == [("end",)]


def test_a_model_that_does_not_load_is_one_error_and_leaves_no_application(serve_on_fake):
    fault = "diffa.errors.CheckpointError: no file of that name\nwhile building backbone 'llada'"
    api = Api(fault=fault)
    with pytest.raises(DiffaError) as error:
        serve_on_fake(api)
    assert str(error.value) == f"diffa-tiny does not start: {fault}"
    assert not api.applications and "ready" not in api.calls


def test_a_local_ray_without_enough_cpus_is_an_error(serve_on_fake):
    with pytest.raises(SpecError, match="3 replicas need 6 CPUs: there are 2"):
        serve_on_fake(Api(), "local", num_replicas=3, num_cpus=2)
    with pytest.raises(SpecError, match=r"1 replicas need 0\.5 GPUs: there are 0"):
        serve_on_fake(Api(), "local", num_gpus=0.5)
    serve_on_fake(Api(), "auto", num_replicas=3)  # a cluster may grow


def ask(client, number):
    """Ask plainly or as a stream: text, tokens and the replica's id."""
    clip = (recordings() / "digits.flac").read_bytes()
    messages = question(clip, QUESTIONS[number % 2], form="flac")
    fields = {"model": "nano", "messages": messages, "max_tokens": 24}
    if number % 4 < 2:
        raw = client.chat.completions.with_raw_response.create(**fields)
        found = raw.parse()
        text, usage = found.choices[0].message.content, found.usage
    else:
        more = {"stream": True, "stream_options": {"include_usage": True}}
        raw = client.chat.completions.with_raw_response.create(**fields, **more)
        chunks = list(raw.parse())
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        usage = chunks[-1].usage
    return text, usage.completion_tokens, raw.headers["x-replica"]


def drafts(client, begun):
    """Read a stream to its end; ``begun`` receives every piece."""
    clip = (recordings() / "digits.flac").read_bytes()
    stream = client.chat.completions.create(
        model="nano", messages=question(clip, QUESTIONS[0], form="flac"), max_tokens=256,
        stream=True,
        extra_body={"diffa": {"drafts": True}},
    )  # fmt: skip
    pieces = []
    for chunk in stream:
        pieces.append(chunk)
        begun()
    return "".join(piece.choices[0].delta.content or "" for piece in pieces)


@pytest.fixture
def deployed(tmp_path):
    """A process that serves nano with two replicas on a local Ray, and its port."""
    pytest.importorskip("ray.serve", reason="Ray Serve is in the extra ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--spec", "nano", "--ray", "local", "--replicas", "2", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        made = subprocess.Popen(
            [sys.executable, "-m", "diffa", *words, "--device", "cpu", "--drain", "120"],
            stderr=log,
            env={**os.environ, "DIFFA_API_KEYS": "secret", "OMP_NUM_THREADS": "1"},
        )
        try:
            until = time.monotonic() + 500
            while b"2 replicas" not in (tmp_path / "log").read_bytes():
                assert made.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until, "it never began"
                time.sleep(0.2)
            yield made, port
        finally:
            made.send_signal(signal.SIGTERM)
            try:
                made.wait(120)
            finally:
                made.kill()


@pytest.mark.slow
def test_two_replicas_give_the_models_answers_and_finish_running_requests(deployed):
    openai = pytest.importorskip("openai")
    made, port = deployed
    model, clip = diffa.build("nano"), recordings() / "digits.flac"
    direct = [model.answer(clip, words, max_tokens=24).text for words in QUESTIONS]
    longer = model.answer(clip, QUESTIONS[0], max_tokens=256).text

    url = f"http://127.0.0.1:{port}/v1"
    client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=300)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda number: ask(client, number), range(12)))
    assert [text for text, _, _ in found] == direct * 6
    assert len({replica for _, _, replica in found}) == 2
    with pytest.raises(openai.BadRequestError, match="1024"):
        client.chat.completions.create(model="nano", messages=question(), max_tokens=2000)

    reading, signals = set(), []

    def stop(number):
        reading.add(number)
        if len(reading) == 4 and not signals:
            signals.append(made.send_signal(signal.SIGTERM))

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(drafts, client, partial(stop, number)) for number in range(4)]
        assert [stream.result() for stream in streams] == [longer] * 4
    assert signals and made.wait(120) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
