"""Steps are yielded as they are made, and streamers get them as transformers sends them."""

import pytest
import torch
from transformers.generation.streamers import TextDiffusionStreamer

import diffa
from diffa.errors import SpecError

PROMPT = torch.tensor([65, 66, 67])


@pytest.fixture(scope="module")
def model():
    return diffa.build("tiny")


class PlainStreamer:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.final, self.ended = [], False

    def put(self, value):
        assert not self.ended and len(value)
        self.final += value.tolist()

    def end(self):
        self.ended = True


class DraftStreamer(PlainStreamer):
    def __init__(self):
        super().__init__()
        self.drafts = []

    def put_draft(self, value):
        self.drafts.append((len(self.final), value.tolist()))


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


def test_a_streamer_gets_final_tokens_once_and_the_draft_behind_them(model):
    streamer, steps = DraftStreamer(), []
    keep = lambda step: steps.append(step._replace(tokens=step.tokens.clone()))  # noqa: E731
    made = model.generate(PROMPT, max_tokens=12, streamer=streamer, on_step=keep)
    assert streamer.final == made.tokens[0].tolist() and streamer.ended
    assert streamer.drafts
    for step, (count, draft) in zip(steps, streamer.drafts, strict=False):
        assert draft == step.tokens[0, count:].tolist()


def test_a_streamer_without_drafts_gets_the_final_tokens_alone(model):
    streamer = PlainStreamer()
    made = model.generate(PROMPT, max_tokens=6, streamer=streamer)
    assert streamer.final == made.tokens[0].tolist() and streamer.ended


def test_transformers_own_streamer_shows_an_answer(model, capsys):
    model.generate(PROMPT, max_tokens=6, streamer=TextDiffusionStreamer(model.backbone.tokenizer))
    assert "\033[33m" in capsys.readouterr().out


def test_a_streamer_for_several_prompts_is_refused_before_decoding(model):
    with pytest.raises(SpecError, match="shows one answer, got 2 prompts"):
        model.generate([PROMPT, PROMPT], max_tokens=4, streamer=PlainStreamer())


def test_generation_begins_with_a_draft(model):
    made = model.generate(PROMPT, max_tokens=6, draft=torch.tensor([70, 71, 72]))
    assert made.tokens[0][:3].tolist() == [70, 71, 72]
    assert made.num_forwards == 3
    mixed = model.generate([PROMPT, PROMPT], max_tokens=6, draft=[None, torch.tensor([70, 71])])
    assert mixed.tokens[1][:2].tolist() == [70, 71]
    with pytest.raises(SpecError, match="longer than 2"):
        model.generate(PROMPT, max_tokens=2, draft=torch.tensor([70, 71, 72]))
