"""Who may use a server: API keys, addresses beyond this machine, and pages of other sites."""

import importlib
import json
import urllib.error
import urllib.request

import pytest
from helpers.serving import question, serving

import diffa
from diffa.errors import SpecError

serve = importlib.import_module("diffa.cli.serve")
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def model():
    return diffa.build(diffa.Spec.read("tiny").change({"prompt.max_tokens": 4}))


def send(address, headers, method="POST", body=None):
    """Return the status and the headers of a response."""
    body = json.dumps({"messages": question(), "max_tokens": 2}).encode() if body is None else body
    url = f"{address}/v1/chat/completions"
    request = urllib.request.Request(url, body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


@pytest.mark.parametrize("value", ["", " ", ",", " , ,"])
def test_a_variable_for_keys_without_a_key_is_an_error(monkeypatch, value):
    monkeypatch.setenv(serve.KEYS, value)
    with pytest.raises(SpecError, match="holds no key"):
        serve.read_keys(None)


def test_keys_come_from_the_variable_and_none_are_needed_without_it(monkeypatch):
    monkeypatch.setenv(serve.KEYS, "one, two,")
    assert serve.read_keys(None) == ["one", "two"]
    monkeypatch.delenv(serve.KEYS)
    assert serve.read_keys(None) == []


@pytest.mark.parametrize(
    ("host", "keys", "warns"),
    [("0.0.0.0", "", True), ("::", "", True), ("192.0.2.7", "", True), ("host.example", "", True),
     ("0.0.0.0", "key", False), ("127.0.0.1", "", False), ("127.0.0.2", "", False),
     ("::1", "", False), ("localhost", "", False)],
)  # fmt: skip
def test_an_address_beyond_this_machine_without_keys_warns(monkeypatch, host, keys, warns):
    notes = []
    monkeypatch.setattr(serve, "print_note", notes.append)
    monkeypatch.setattr(serve, "_run", lambda *args: None)
    monkeypatch.delenv(serve.KEYS, raising=False)
    if keys:
        monkeypatch.setenv(serve.KEYS, keys)
    serve.serve(host=host)
    assert any("WARNING" in note and host in note for note in notes) == warns


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("origin", [PAGE, "null", "http://127.0.0.1:1"])
def test_posts_of_pages_are_refused_unless_their_origin_is_allowed(model, kind, origin):
    headers = {"Content-Type": kind, "Origin": origin}
    with serving(model) as (_, address):
        assert send(address, headers)[0] == 403
        assert send(address, {"Content-Type": "application/json"})[0] == 200
    with serving(model, allowed_origins=[PAGE]) as (_, address):
        assert send(address, headers)[0] == (200 if origin == PAGE else 403)


@pytest.mark.parametrize("allowed", [PAGE, "*"])
def test_a_preflight_of_an_allowed_origin_is_answered_without_a_key(model, allowed):
    asked = {
        "Origin": PAGE, "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }  # fmt: skip
    with serving(model, allowed_origins=[allowed], api_keys=["key"]) as (_, address):
        status, headers = send(address, asked, "OPTIONS", b"")
        assert status == 200 and headers["Access-Control-Allow-Origin"] in (PAGE, "*")
        assert "authorization" in headers["Access-Control-Allow-Headers"].lower()
        status, headers = send(address, {"Origin": PAGE})  # the refusal can be read by the page
        assert status == 401 and headers["Access-Control-Allow-Origin"] in (PAGE, "*")
        status, headers = send(address, {"Origin": PAGE, "Authorization": "Bearer key"})
        assert status == 200 and headers["Access-Control-Allow-Origin"] in (PAGE, "*")


@pytest.mark.parametrize("origin", ["page.example", "https://page.example/", "https://", ""])
def test_an_origin_without_scheme_or_with_a_path_is_an_error(origin):
    with pytest.raises(SpecError, match="--allow-origin"):
        serve.check_origin(origin)
