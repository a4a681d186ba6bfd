"""The server as its clients see it: the official client, and curl."""

import json
import signal
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from helpers.fakes import SAMPLER, install, site_packages
from helpers.serving import question, recording, serving, text64

import diffa
from diffa.serving.limits import Limits
from diffa.serving.run import create_server
from diffa.serving.sampler_options import SamplerCache
from diffa.serving.service import Service

LIMITS = Limits(
    max_body_bytes=2**20,
    max_audio_seconds=5.0,
    max_tokens=512,
    max_text_chars=2000,
    max_batch_size=4,
    max_waiting=16,
)


@pytest.fixture(scope="module")
def model():
    return diffa.build(diffa.Spec.read("tiny").change({"prompt.max_tokens": 16}))


@pytest.fixture(scope="module")
def place(model):
    with serving(model, limits=LIMITS) as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(place):
    return openai.OpenAI(base_url=f"{place}/v1", api_key="none", max_retries=0)


def ask(client, data=None, **options):
    more = {"model": "tiny", "messages": question(data), "max_tokens": 12, **options}
    return client.chat.completions.create(**more)


@pytest.mark.parametrize("form", ["wav", "mp3", "flac", "ogg"])
def test_answers_about_every_format_are_the_librarys(client, model, tmp_path, form):
    file = tmp_path / f"clip.{form}"
    file.write_bytes(recording(form=form.upper()))
    answered = ask(client, messages=question(file.read_bytes(), form=form))
    expected = model.answer(file, "What is heard?", max_tokens=12)
    assert answered.choices[0].message.content == expected.text
    assert answered.model_extra["diffa"]["num_forwards"] == expected.num_forwards


def test_data_uris_and_system_messages_reach_the_model(client, model, tmp_path):
    file = tmp_path / "clip.wav"
    file.write_bytes(recording())
    url = {"url": f"data:audio/wav;base64,{text64(recording())}"}
    user = [{"type": "audio_url", "audio_url": url}, {"type": "text", "text": "What?"}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]
    answered = ask(client, messages=turns)
    expected = model.answer(file, "What?", system="Be brief.", max_tokens=12)
    assert answered.choices[0].message.content == expected.text


def test_a_question_without_a_recording_is_answered(client, model):
    turns = [{"role": "user", "content": "Why?"}]
    expected = model.answer(None, "Why?", max_tokens=12)
    assert ask(client, messages=turns).choices[0].message.content == expected.text


@pytest.mark.parametrize("options", [{"model": "tiny:balanced"}, {"model": "tiny:fast"}])
def test_sampler_presets_are_models_of_their_own(client, model, options, tmp_path):
    file = tmp_path / "clip.wav"
    file.write_bytes(recording())
    sampler_preset = model.spec.data["sampler_presets"][options["model"].partition(":")[2]]
    expected = diffa.swap(model, sampler=sampler_preset).answer(
        file, "What is heard?", max_tokens=12
    )
    answered = ask(client, recording(), **options)
    assert answered.choices[0].message.content == expected.text
    assert answered.usage.total_tokens > answered.usage.completion_tokens > 0


def test_sampler_options_change_how_an_answer_is_decoded(client):
    one = ask(client, recording(), extra_body={"diffa": {"sampler": {"steps": 12}}})
    few = ask(
        client, recording(), extra_body={"diffa": {"sampler": {"steps": 3, "block_length": 12}}}
    )
    assert one.model_extra["diffa"]["num_forwards"] == 12
    assert few.model_extra["diffa"]["num_forwards"] == 3


def test_sampler_options_change_the_preset_that_the_model_names(model):
    sampler_presets, samplers = model.spec.data["sampler_presets"], SamplerCache(model)
    for base, own in (("fast", sampler_presets["fast"]), (None, model.spec.data["sampler"])):
        sampler = samplers.get({"block_length": 6}, None, "sampler", base)
        assert sampler.key == repr(sorted({**own, "block_length": 6}.items()))
        assert samplers.get(None, None, "sampler", base).key == repr(sorted(own.items()))


def test_a_models_preset_stays_when_a_request_has_options(client, monkeypatch):
    presets, get = [], SamplerCache.get

    def record(samplers, options, temperature, param, preset=None):
        presets.append((options, preset))
        return get(samplers, options, temperature, param, preset)

    monkeypatch.setattr(SamplerCache, "get", record)
    ask(
        client,
        recording(),
        model="tiny:fast",
        extra_body={"diffa": {"sampler": {"block_length": 6}}},
    )
    assert presets == [({"block_length": 6}, "fast")]


def test_the_seed_decides_what_a_temperature_draws(client):
    drawn = [
        ask(client, recording(), temperature=1.0, seed=seed).choices[0].message.content
        for seed in (1, 2, 1)
    ]
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("sampler_preset", ["exact", "fast"])
def test_streamed_pieces_are_the_whole_answer(client, sampler_preset):
    name = f"tiny:{sampler_preset}"
    whole = ask(client, recording(), model=name, max_tokens=48).choices[0].message.content
    more = {"stream": True, "stream_options": {"include_usage": True}}
    heard = list(ask(client, recording(), model=name, max_tokens=48, **more))
    pieces = [chunk.choices[0].delta.content or "" for chunk in heard if chunk.choices]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 1, "nothing was streamed"
    assert heard[-1].usage.completion_tokens > 0
    reasons = [chunk.choices[0].finish_reason for chunk in heard if chunk.choices]
    assert reasons[-1] in ("stop", "length") and set(reasons[:-1]) == {None}


def test_drafts_hold_every_step(client):
    heard = list(ask(client, recording(), stream=True, extra_body={"diffa": {"drafts": True}}))
    drafts = [
        chunk.model_extra["diffa"]["draft"]
        for chunk in heard
        if "draft" in (chunk.model_extra or {}).get("diffa", {})
    ]
    assert [draft["step"] for draft in drafts] == list(range(1, len(drafts) + 1))
    assert len(drafts) > 4
    assert drafts[0]["tokens"].count(None) == 11
    assert all(drafts[-1]["final"])
    plain = list(ask(client, recording(), stream=True))
    assert not any("draft" in (chunk.model_extra or {}).get("diffa", {}) for chunk in plain)


def test_transcriptions_are_json_text_or_events(client, model, tmp_path):
    data = recording()
    (tmp_path / "clip.wav").write_bytes(data)
    expected = model.answer(tmp_path / "clip.wav", "Please transcribe the audio to text.").text
    create = client.audio.transcriptions.create
    assert create(model="tiny", file=("clip.wav", data)).text == expected
    plain = create(model="tiny", file=("clip.wav", data), response_format="text")
    assert plain == expected + "\n"
    more = create(model="tiny", file=("clip.wav", data), response_format="verbose_json")
    assert (more.text, more.duration) == (expected, 0.4)
    events = list(create(model="tiny", file=("clip.wav", data), stream=True))
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == expected


def test_the_list_of_models_holds_the_presets(client):
    names = [found.id for found in client.models.list()]
    assert names == ["tiny", "tiny:exact", "tiny:balanced", "tiny:fast"]
    assert client.models.retrieve("tiny:fast").id == "tiny:fast"


def sampler(**options):
    return {"extra_body": {"diffa": {"sampler": options}}}


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """A package that declares the sampler ``capped``."""
    for site in site_packages(tmp_path, monkeypatch):
        install(site, "acme-diffa", {"sampler": {"capped": "acme:Capped"}}, {"acme": SAMPLER})
        yield site


def test_a_request_sets_options_of_a_third_party_sampler(client, third_party):
    for passes in (2, 5):
        answer = ask(client, recording(), **sampler(name="capped", passes=passes))
        assert answer.model_extra["diffa"]["num_forwards"] == passes


@pytest.mark.parametrize("passes", ["5", 0.5, None, 10**6, [2]])
def test_options_of_a_third_party_sampler_are_checked_by_its_schema(client, third_party, passes):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, recording(), **sampler(name="capped", passes=passes))
    assert caught.value.body["param"] == "sampler.passes"


def test_the_openapi_document_describes_the_bodies(place):
    document = json.loads(curl(f"{place}/openapi.json"))
    schemas, paths = document["components"]["schemas"], document["paths"]
    for path, media_type, field in (
        ("/v1/chat/completions", "application/json", "messages"),
        ("/v1/audio/transcriptions", "multipart/form-data", "response_format"),
    ):
        schema = paths[path]["post"]["requestBody"]["content"][media_type]["schema"]
        name = schema["$ref"].rpartition("/")[2]
        assert field in schemas[name]["properties"]
        for status in ("400", "413", "429", "503", "504"):
            content = paths[path]["post"]["responses"][status]["content"]["application/json"]
            assert content["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
    assert schemas["ErrorResponse"]["properties"]["error"]["$ref"].endswith("/ErrorDetail")
    assert {"message", "type", "param", "code"} == set(schemas["ErrorDetail"]["properties"])
    assert '"$defs"' not in json.dumps(document)
    for part in json.dumps(document).split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in schemas


WRONG = {
    "no such model": ({"model": "other"}, 404, "model"),
    "too many tokens": ({"max_tokens": 10**6}, 400, "max_tokens"),
    "wrong type": ({"max_tokens": "many"}, 400, "max_tokens"),
    "temperature": ({"temperature": 99}, 400, "temperature"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "nine answers": ({"n": 9}, 400, "n"),

    "empty stop": ({"stop": [""]}, 400, "stop[0]"),
    "five stops": ({"stop": list("abcde")}, 400, "stop"),
    "too many alternatives": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "alternatives alone": ({"top_logprobs": 3}, 400, "top_logprobs"),
    "option": (sampler(block_lenth=3), 400, "sampler.block_lenth"),
    "sampler": (sampler(name="none"), 400, "sampler.name"),
    "range": (sampler(block_length=0), 400, "sampler.block_length"),
    "type": (sampler(block_length="8"), 400, "sampler.block_length"),
    "choice of another type": (sampler(cache=0.5), 400, "sampler.cache"),
    "choice": (sampler(cache="all"), 400, "sampler.cache"),
    "rules": (sampler(threshold=0.5, factor=1.0), 400, "sampler"),
    "preset": ({"extra_body": {"diffa": {"sampler": "none"}}}, 400, "sampler"),
    "unknown field": ({"extra_body": {"diffa": {"draft": True}}}, 400, "diffa.draft"),
    "deadline": ({"extra_body": {"diffa": {"deadline": 10**6}}}, 400, "diffa.deadline"),
    "seed": ({"seed": 2**63}, 400, "seed"),
    "stream options": (
        {"stream": True, "stream_options": {"include_usage": 1}}, 400,
        "stream_options.include_usage",
    ),
    "no messages": ({"messages": []}, 400, "messages"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    "no text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400,
        "messages[0].content[0].text",
    ),
    "no part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
        "messages[0].content[0]",
    ),
    "no data": (
        {"messages": [{"role": "user", "content": [
            {"type": "input_audio", "input_audio": {"format": "wav"}}]}]},
        400, "messages[0].content[0].input_audio.data",
    ),
    "long text": ({"messages": question(words="x" * 3000)}, 413, "messages[0]"),
    "not audio": (
        {"messages": question(b"x" * 100)}, 400, "messages[0].content[0].input_audio.data"
    ),
    "long audio": (
        {"messages": question(recording(6.0))}, 413, "messages[0].content[0].input_audio.data"
    ),
    "remote": (
        {"messages": [{"role": "user", "content": [
            {"type": "audio_url", "audio_url": {"url": "http://localhost:1/a.wav"}}]}]},
        400, "messages[0].content[0].audio_url.url",
    ),
    "conversation": ({"messages": [*question(), {"role": "assistant", "content": "x"}]}, 400, "messages"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_have_openais_status_and_name_the_field(client, name):
    options, status, param = WRONG[name]
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **options)
    assert caught.value.status_code == status
    assert caught.value.body["param"] == param
    assert caught.value.body["message"]


def test_json_of_many_values_is_refused_unparsed(place, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it is parsed"))
    request = urllib.request.Request(f"{place}/v1/chat/completions", b"[" + b"1," * 400_000)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 413


def test_a_body_that_is_too_large_is_refused_unread(place):
    request = urllib.request.Request(
        f"{place}/v1/chat/completions", b"x", {"Content-Length": "9" * 15}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code == 413


def curl(*words):
    done = subprocess.run(["curl", "-sS", *words], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_curl_gets_answers_and_transcriptions(place, tmp_path):
    file, body = tmp_path / "clip.flac", tmp_path / "body.json"
    file.write_bytes(recording(form="FLAC"))
    body.write_text(json.dumps({"messages": question(recording()), "max_tokens": 12}))
    answered = json.loads(curl(f"{place}/v1/chat/completions", "-d", f"@{body}"))
    assert answered["choices"][0]["message"]["content"]
    heard = json.loads(curl(f"{place}/v1/audio/transcriptions", "-F", f"file=@{file}"))
    assert set(heard) == {"text"}
    body.write_text(json.dumps({"messages": question(), "max_tokens": 12, "stream": True}))
    events = curl("-N", f"{place}/v1/chat/completions", "-d", f"@{body}").split("\n\n")
    assert events[-2] == "data: [DONE]"


def test_health_and_metrics_count_requests(place, client):
    ask(client)
    assert json.loads(curl(f"{place}/health"))["status"] == "ok"
    text = curl(f"{place}/metrics")
    assert 'diffa_http_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "diffa_forward_batch_size_bucket" in text


def test_concurrent_requests_share_forward_passes_and_get_the_answers_they_get_alone(client, place):
    clips = [recording(0.2 + 0.1 * seed, seed=seed) for seed in range(7)]
    alone = [ask(client, clip, max_tokens=16).choices[0].message.content for clip in clips]
    before = json.loads(curl(f"{place}/health"))
    with ThreadPoolExecutor(7) as pool:
        shared = list(pool.map(lambda clip: ask(client, clip, max_tokens=16), clips))
    after = json.loads(curl(f"{place}/health"))
    assert [one.choices[0].message.content for one in shared] == alone
    assert after["num_rows"] - before["num_rows"] > 1.5 * (
        after["num_forwards"] - before["num_forwards"]
    )


class Slow:
    """Makes every forward of a model take a while."""

    def __init__(self, model, seconds):
        self.body, self.seconds, self.on = model.backbone.forward, seconds, True
        self.backbone = model.backbone

    def __enter__(self):
        self.backbone.forward = self.pause
        return self

    def pause(self, *args):
        time.sleep(self.seconds)
        return self.body(*args)

    def __exit__(self, *args):
        del self.backbone.forward


def wait_until(true, seconds=20):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def test_a_full_queue_refuses_with_retry_after(model):
    limits = LIMITS._replace(max_batch_size=1, max_waiting=1)
    with Slow(model, 0.05), serving(model, limits=limits) as (service, place):
        client = openai.OpenAI(base_url=f"{place}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, client, max_tokens=24)
            wait_until(lambda: service.engine.load().num_running)
            second = pool.submit(ask, client, max_tokens=24)
            wait_until(lambda: service.engine.load().num_waiting)
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert first.result(60).choices and second.result(60).choices


def test_an_answer_beyond_its_deadline_is_cancelled(model):
    with Slow(model, 0.05), serving(model, limits=LIMITS) as (service, place):
        client = openai.OpenAI(base_url=f"{place}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, max_tokens=64, extra_body={"diffa": {"deadline": 0.3}})
        assert caught.value.status_code == 504
        wait_until(lambda: not service.engine.load().num_running)
        assert service.engine.load().num_forwards < 30


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_client_disconnects_leaves_the_batch(model, stream):
    with Slow(model, 0.03), serving(model, limits=LIMITS) as (service, place):
        client = openai.OpenAI(base_url=f"{place}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(ask, client, max_tokens=40)
            wait_until(lambda: service.engine.load().num_running == 1)
            host, port = place.removeprefix("http://").split(":")
            gone = leave(host, int(port), stream)
            wait_until(lambda: service.engine.load().num_running == 2)
            gone.close()
            wait_until(lambda: service.engine.load().num_running < 2, 3)
            assert not other.done(), "the other's answer was over as well: nothing was seen"
            assert other.result(60).choices[0].message.content


def leave(host, port, stream):
    """Send a request for a long answer over a bare socket."""
    import socket

    body = {"messages": question(), "max_tokens": 500, "stream": stream}
    data = json.dumps(body).encode()
    made = socket.create_connection((host, port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    made.sendall(head.encode() + data)
    return made


def test_requests_need_one_of_the_api_keys(model):
    with serving(model, api_keys=["right", "other"]) as (_, place):
        for key in ("right", "other"):
            good = openai.OpenAI(base_url=f"{place}/v1", api_key=key, max_retries=0)
            assert good.models.list().data
        wrong = openai.OpenAI(base_url=f"{place}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        assert json.loads(curl(f"{place}/health"))["status"] == "ok"


def test_downloads_come_from_allowed_hosts_alone_and_follow_no_redirect(model):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    clip = recording()

    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            self.send_header("Location", "/clip.wav")
            self.end_headers()
            self.wfile.write(b"" if moved else clip)

        def log_message(self, *args):
            pass

    files = HTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=files.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{files.server_port}"

    def asked(client, path):
        url = {"type": "audio_url", "audio_url": {"url": f"http://{host}{path}"}}
        turns = [{"role": "user", "content": [url, {"type": "text", "text": "What is heard?"}]}]
        return ask(client, messages=turns)

    with serving(model, allowed_hosts=[host]) as (_, place):
        client = openai.OpenAI(base_url=f"{place}/v1", api_key="none", max_retries=0)
        sent = ask(client, clip).choices[0].message.content
        assert asked(client, "/clip.wav").choices[0].message.content == sent
        with pytest.raises(openai.BadRequestError):
            asked(client, "/moved")
    files.shutdown()


def started(service):
    """A server that a test stops itself, its thread, and a client that asks once."""
    server = create_server(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
    return server, thread, client


def test_after_a_signal_running_requests_finish_and_new_ones_are_refused(model):
    service = Service(model, "tiny", limits=LIMITS)
    server, thread, client = started(service)
    with Slow(model, 0.03), ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, recording(), max_tokens=48)
        wait_until(lambda: service.engine.load().num_running)
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client)
        assert caught.value.status_code == 503
        assert not first.done(), "it was over as well: nothing was seen"
        assert first.result(60).choices[0].message.content
        thread.join(20)
    assert not thread.is_alive() and not service.engine.alive


def test_requests_beyond_the_drain_time_fail_with_503_at_shutdown(model):
    service = Service(model, "tiny", limits=LIMITS._replace(drain_timeout=0.3))
    server, thread, client = started(service)
    with Slow(model, 0.05), ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, max_tokens=400)
        wait_until(lambda: service.engine.load().num_running)
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError) as caught:
            first.result(60)
        assert caught.value.status_code == 503
        thread.join(20)
    assert not thread.is_alive() and not service.engine.alive
