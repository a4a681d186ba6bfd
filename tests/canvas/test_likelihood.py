"""Likelihoods: exact where they can be, a bound with the right expectation elsewhere."""

import itertools

import pytest
import torch
from helpers import small

import diffa
from diffa.canvas.kv_cache import AttentionContext
from diffa.canvas.likelihood import masked_queries, score_choices
from diffa.errors import SpecError

MODEL = small.backbone()
PROMPT = torch.tensor([3, 1, 4, 1, 5])
AUDIO = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def logs(answer):
    """Log-probabilities (A, V) at the answer's slots, by a plain pass."""
    embed = MODEL.embed
    embeds = torch.cat([embed(PROMPT[:2]), AUDIO, embed(PROMPT[2:]), embed(torch.tensor(answer))])
    positions = torch.arange(len(embeds))[None]
    with torch.no_grad():
        return MODEL.head(MODEL(embeds[None], positions, AttentionContext()))[
            0, -len(answer) :
        ].log_softmax(-1)


def bound(choice):
    """The bound's expectation, over all counts and all masks."""
    size, total = len(choice), 0.0
    for count in range(1, size + 1):
        ways = list(itertools.combinations(range(size), count))
        for hidden in ways:
            noisy = [small.MASK if i in hidden else token for i, token in enumerate(choice)]
            found = logs(noisy)
            total += sum(float(found[i, choice[i]]) for i in hidden) / count / len(ways)
    return total


def measure(choices, **options):
    options = {"samples": 64, "seed": 0, "batch": 16, **options}
    tensors = [torch.tensor(choice) for choice in choices]
    with torch.no_grad():
        return score_choices(MODEL, PROMPT, AUDIO, 2, tensors, **options)


def test_one_token_answers_are_exact_and_cost_one_forward():
    made = measure([[7], [8], [9], [2]])
    exact = logs([small.MASK])[0]
    assert torch.allclose(made.values.float(), exact[[7, 8, 9, 2]], atol=1e-5)
    assert made.num_forwards == 1
    assert made.best == int(exact[[7, 8, 9, 2]].argmax())


def test_longer_answers_give_the_bound_that_enumeration_gives():
    choices = [[7, 2], [8, 3, 9]]
    made = measure(choices, samples=6000)
    for value, choice in zip(made.values.tolist(), choices, strict=True):
        assert value == pytest.approx(bound(choice), abs=0.08)


def test_choices_share_their_draws():
    _, queries = masked_queries(
        [torch.tensor([7, 2, 5]), torch.tensor([8, 3, 6])], 39, samples=9, seed=3
    )
    places = [[q.position for q in queries if q.choice == choice] for choice in (0, 1)]
    assert places[0] == places[1]
    same = measure([[7, 2, 5], [7, 2, 5]], samples=3)
    assert same.values[0] == same.values[1]


def test_the_batch_does_not_matter():
    choices = [[7, 2], [8, 3, 9], [4]]
    whole, parts = measure(choices, batch=64), measure(choices, batch=1)
    assert torch.allclose(whole.values, parts.values, atol=1e-4)
    assert parts.num_forwards > whole.num_forwards


def test_nothing_to_score_is_an_error():
    for choices in ([], [[7], []]):
        with pytest.raises(SpecError, match="choices to score"):
            measure([torch.tensor(choice, dtype=torch.long) for choice in choices])
    with pytest.raises(SpecError, match="samples must be at least 1"):
        measure([[7]], samples=0)


def test_a_model_scores_the_choices_of_a_question():
    model = diffa.build("tiny")
    wave = torch.randn(8000, generator=torch.Generator().manual_seed(2)) / 10
    made = model.score(wave, "Which?", ["A", "B", "both of them"], samples=4)
    assert made.lengths.tolist() == [1, 1, 12]
    assert torch.isfinite(made.values).all()
    assert made.best == int(made.values.argmax())
