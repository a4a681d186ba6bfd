"""What /openapi.json says is what the server takes and sends."""

import json
import urllib.error
import urllib.request

import jsonschema
import pytest
from helpers.serving import question, recording, serving

import diffa


@pytest.fixture(scope="module")
def address():
    model = diffa.build(diffa.Spec.read("tiny").change({"prompt.max_tokens": 8}))
    with serving(model) as (_, address):
        yield address


@pytest.fixture(scope="module")
def document(address):
    return json.loads(send(f"{address}/openapi.json")[2])


def send(url, body=None, media_type="application/json"):
    """Return status, media type and text of the response."""
    request = urllib.request.Request(url, body, {"Content-Type": media_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.headers.get_content_type(), reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read().decode()


def check(document, path, method, response):
    """Check a response against the document; fields that it does not name fail."""
    status, media_type, text = response
    content = document["paths"][path][method]["responses"][str(status)]["content"]
    schema = {**content[media_type]["schema"], "components": document["components"]}
    validator = jsonschema.Draft202012Validator(strict(schema))
    if media_type == "application/json":
        validator.validate(json.loads(text))
    elif media_type == "text/event-stream":
        events = text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        for event in events[:-2]:
            validator.validate(json.loads(event.removeprefix("data: ")))
    else:
        validator.validate(text)


def strict(schema):
    """Return a schema whose objects have no other fields than those named."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: strict(value) for key, value in schema.items()}
    named = schema.get("type") == "object" and "properties" in schema
    return {**inner, "additionalProperties": False} if named else inner


CHATS = {
    "plain": {},
    "all": {"n": 3, "logprobs": True, "top_logprobs": 2, "temperature": 1.0, "stop": ["e"]},
    "streamed": {"stream": True, "n": 2, "stream_options": {"include_usage": True}},
    "drafts": {"stream": True, "logprobs": True, "top_logprobs": 1, "diffa": {"drafts": True}},
    "refused": {"max_tokens": 0},
    "no model": {"model": "none"},
}


@pytest.mark.parametrize("name", CHATS)
def test_requests_and_responses_of_chats_fit_the_document(address, document, name):
    path, body = "/v1/chat/completions", {"messages": question(recording()), **CHATS[name]}
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fits = jsonschema.Draft202012Validator(
        {**schema, "components": document["components"]}
    ).is_valid(body)
    assert fits == (name != "refused")
    check(document, path, "post", send(address + path, json.dumps(body).encode()))


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": "text"}, {"response_format": "verbose_json"},
               {"stream": "true"}, {"temperature": "9"}],
)  # fmt: skip
def test_responses_of_transcriptions_fit_the_document(address, document, fields):
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        % (key.encode(), value.encode())
        for key, value in fields.items()
    ]
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    body = b"".join(parts) + head + recording() + b"\r\n--x--\r\n"
    path = "/v1/audio/transcriptions"
    response = send(address + path, body, "multipart/form-data; boundary=x")
    assert response[0] == (400 if "temperature" in fields else 200)
    check(document, path, "post", response)


@pytest.mark.parametrize(
    ("path", "name"), [
        ("/v1/models", ""), ("/v1/models/{name}", "tiny"), ("/v1/models/{name}", "none"),
        ("/health", ""), ("/metrics", ""),
    ],
)  # fmt: skip
def test_responses_about_the_server_fit_the_document(address, document, path, name):
    check(document, path, "get", send(address + path.replace("{name}", name)))


def test_every_schema_that_is_named_exists_and_is_used(document):
    schemas, text = document["components"]["schemas"], json.dumps(document)
    names = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names == set(schemas) and '"$defs"' not in text
