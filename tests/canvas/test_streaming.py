"""Streaming: every step is seen as it is made, and a streamer is told as transformers tells it."""

import pytest
import torch
from transformers.generation.streamers import TextDiffusionStreamer

import diffa
from diffa.canvas.streaming import relay
from diffa.errors import SpecError

PROMPT = torch.tensor([65, 66, 67])


@pytest.fixture(scope="module")
def model():
    return diffa.build("tiny")


class Heard:
    """A streamer that writes down what it is told."""

    def __init__(self):
        self.sure, self.drafts, self.ended = [], [], False

    def put(self, value):
        self.sure += value.tolist()

    def put_draft(self, value):
        self.drafts.append((len(self.sure), value.tolist()))

    def end(self):
        self.ended = True


def test_the_last_step_is_what_generate_returns(model):
    steps = list(model.stream(PROMPT, max_tokens=12))
    made = model.generate(PROMPT, max_tokens=12)
    assert steps[-1].tokens[0].tolist() == made.tokens[0].tolist()
    assert len(steps) == made.num_forwards
    assert steps[-1].final.all()


def test_a_step_is_made_only_when_it_is_asked_for(model):
    stream = model.stream(PROMPT, max_tokens=12)
    first = next(stream)
    mask = model.backbone.vocab.mask
    assert int((first.tokens != mask).sum()) == 1
    stream.close()


def test_a_streamer_hears_final_tokens_once_and_drafts_behind_them(model):
    heard = Heard()
    steps = list(relay(model.stream(PROMPT, max_tokens=12), heard))
    assert heard.sure == steps[-1].tokens[0].tolist()
    assert heard.ended
    for step, (count, draft) in zip(steps, heard.drafts, strict=False):
        assert draft == step.tokens[0, count:].tolist()


def test_a_streamer_without_drafts_is_told_what_is_final():
    class Plain:
        put, end = Heard.put, Heard.end
        sure, ended = [], False

    model, plain = diffa.build("tiny"), Plain()
    steps = list(relay(model.stream(PROMPT, max_tokens=6), plain))
    assert plain.sure == steps[-1].tokens[0].tolist()


def test_transformers_own_streamer_shows_an_answer(model, capsys):
    streamer = TextDiffusionStreamer(model.backbone.tokenizer)
    list(relay(model.stream(PROMPT, max_tokens=6), streamer))
    assert "\033[33m" in capsys.readouterr().out


def test_a_streamer_shows_one_row(model):
    with pytest.raises(ValueError, match="one row"):
        list(relay(model.stream([PROMPT, PROMPT], max_tokens=4), Heard()))


def test_generation_begins_with_a_draft(model):
    made = model.generate(PROMPT, max_tokens=6, draft=torch.tensor([70, 71, 72]))
    assert made.tokens[0][:3].tolist() == [70, 71, 72]
    assert made.num_forwards == 3
    mixed = model.generate([PROMPT, PROMPT], max_tokens=6, draft=[None, torch.tensor([70, 71])])
    assert mixed.tokens[1][:2].tolist() == [70, 71]
    with pytest.raises(SpecError, match="longer than 2"):
        model.generate(PROMPT, max_tokens=2, draft=torch.tensor([70, 71, 72]))
    with pytest.raises(SpecError, match="1 prompts but 2 drafts"):
        model.generate(PROMPT, max_tokens=2, draft=[None, None])
