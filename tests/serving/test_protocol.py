"""What clients of OpenAI's protocol use beyond a plain question."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
import torch
from helpers.serving import question, recording, serving, text64
from hypothesis import given
from hypothesis import strategies as st

import diffa
from diffa.audio import read
from diffa.serving.streaming import TextStream, cut_at_stop


@pytest.fixture(scope="module")
def client():
    model = diffa.build(diffa.Spec.read("tiny").change({"prompt.max_tokens": 16}))
    with serving(model) as (_, address):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(client, **options):
    more = {"model": "tiny", "messages": question(recording()), "max_tokens": 16, **options}
    return client.chat.completions.create(**more)


def encoded(format_name, codec, rate, seconds=0.5):
    """Bytes of a tone in a format of FFmpeg's."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=format_name) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        wave = 0.3 * torch.sin(torch.arange(int(seconds * rate)) * 2 * math.pi * 440 / rate)
        frame = av.AudioFrame.from_ndarray(wave[None].numpy(), format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, "mono", rate, frame_size=960)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "container", "codec"),
    [("webm", "webm", "libopus"), ("m4a", "ipod", "aac"), ("opus", "ogg", "libopus")],
)
def test_recordings_of_browsers_and_phones_are_read(client, name, container, codec):
    data = encoded(container, codec, 48000)
    wave, rate = read(data, trusted=False)
    assert len(wave) / rate == pytest.approx(0.5, abs=0.1) and float(wave.abs().max()) > 0.1
    messages = question(data, form=name)
    assert ask(client, messages=messages).choices[0].message.content is not None
    text = client.audio.transcriptions.create(model="tiny", file=(f"a.{name}", data)).text
    assert isinstance(text, str)


@pytest.mark.parametrize("head", [b"\x1a\x45\xdf\xa3", b"\x00\x00\x00\x20ftypM4A "])
def test_a_damaged_container_names_its_field(client, head):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=question(head + b"x" * 500))
    assert caught.value.body["param"] == "messages[0].content[0].input_audio.data"
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(model="tiny", file=("a.webm", head + b"x" * 500))
    assert caught.value.body["param"] == "file"


@pytest.mark.parametrize("line_break", ["\n", "\r\n", " "])
def test_base64_may_have_line_breaks(client, line_break):
    text = text64(recording())
    lines = line_break.join(text[at : at + 76] for at in range(0, len(text), 76))
    part = {"type": "input_audio", "input_audio": {"data": lines, "format": "wav"}}
    content = [part, {"type": "text", "text": "What is heard?"}]
    broken = ask(client, messages=[{"role": "user", "content": content}])
    assert broken.choices[0].message.content == ask(client).choices[0].message.content


def test_the_answer_ends_before_a_stop_whole_and_streamed(client):
    whole = ask(client).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    for stops in (stop, ["\0none", stop]):
        cut = ask(client, stop=stops).choices[0]
        assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
        pieces = [piece.choices[0] for piece in ask(client, stop=stops, stream=True)]
        text = "".join(piece.delta.content or "" for piece in pieces)
        assert text == cut.message.content and pieces[-1].finish_reason == "stop"


@given(st.text("abc ", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_streamed_text_never_passes_a_stop(text, stops):
    text = text.strip()
    chat = SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens.tolist())).strip())
    stream, tokens = TextStream(chat, stops), torch.tensor([ord(letter) for letter in text])
    pieces = [
        stream.push(SimpleNamespace(final=torch.arange(len(text)) < size, tokens=tokens))
        for size in range(1, len(text) + 1)
    ]
    assert "".join([*pieces, stream.finish(tokens.long())]) == cut_at_stop(text, stops)


def test_several_answers_have_seeds_drawn_from_the_requests(client):
    options = {"temperature": 1.0, "seed": 7}
    one, several, again = ask(client, **options), *(ask(client, n=4, **options) for _ in range(2))
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] == one.choices[0].message.content and len(set(texts)) > 1
    assert several.usage.prompt_tokens == one.usage.prompt_tokens
    assert several.usage.completion_tokens > one.usage.completion_tokens


def test_logprobs_are_of_the_tokens_when_they_were_written(client):
    choice = ask(client, logprobs=True).choices[0]
    entries = choice.logprobs.content
    assert entries and all(-70 < entry.logprob <= 0 for entry in entries)
    assert "".join(entry.token for entry in entries).strip() == choice.message.content
    last = list(ask(client, logprobs=True, stream=True))[-1].choices[0]
    assert [entry.logprob for entry in last.logprobs.content] == [e.logprob for e in entries]
    assert ask(client).choices[0].logprobs is None


def test_streams_of_several_answers_are_the_answers(client):
    options = {"n": 4, "temperature": 1.0, "seed": 7, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, **options)
    texts, last, usage = [""] * 4, {}, None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            assert choice.index not in last, "text after the end"
            if choice.finish_reason:
                last[choice.index] = choice
    assert texts == [choice.message.content for choice in whole.choices]
    for index, choice in enumerate(whole.choices):
        pairs = zip(last[index].logprobs.content, choice.logprobs.content, strict=True)
        for streamed, entry in pairs:  # rounding depends on which rows share a forward pass
            assert streamed.token == entry.token
            assert streamed.logprob == pytest.approx(entry.logprob, abs=1e-4)
            assert len(streamed.top_logprobs) == 2
    assert [last[i].finish_reason for i in range(4)] == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage


@pytest.mark.parametrize("sampler", ["exact", {"threshold": 0.004}, {"name": "wino"}])
def test_the_likeliest_tokens_begin_with_the_greedy_one(client, sampler):
    options = {"logprobs": True, "extra_body": {"diffa": {"sampler": sampler}}}
    entries = ask(client, top_logprobs=5, **options).choices[0].logprobs.content
    assert entries and [entry.top_logprobs for entry in entries] != [[]] * len(entries)
    for entry in entries:
        values = [one.logprob for one in entry.top_logprobs]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert entry.top_logprobs[0].token == entry.token
        assert values[0] == pytest.approx(entry.logprob, abs=1e-4)
    plain = ask(client, **options).choices[0].logprobs.content
    assert [one.token for one in plain] == [one.token for one in entries]
    assert all(one.top_logprobs == [] for one in plain)


def test_requests_with_and_without_likeliest_tokens_share_a_canvas(client):
    with ThreadPoolExecutor(4) as pool:
        counts = [0, 1, 3, 0]
        futures = [pool.submit(ask, client, logprobs=True, top_logprobs=n) for n in counts]
        answers = [future.result().choices[0] for future in futures]
    assert len({answer.message.content for answer in answers}) == 1
    for answer, count in zip(answers, counts, strict=True):
        assert {len(entry.top_logprobs) for entry in answer.logprobs.content} == {count}
