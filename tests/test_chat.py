"""Chat prompts: the checkpoint's template, where the audio goes, what belongs to the answer."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffa.chat import Chat
from diffa.errors import SpecError

TEMPLATE = (
    "{{ '<|startoftext|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPECIAL = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eos|>"]


def byte_tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which a space may merge with what follows, as LLaDA's does."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|eos|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[:4]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


MERGING = byte_tokenizer([("Ġ", "<")])
PLAIN = byte_tokenizer([])


@pytest.mark.parametrize(("tokenizer", "less"), [(MERGING, 1), (PLAIN, 0)])
def test_the_audio_goes_where_the_tokens_before_it_are_settled(
    tokenizer: PreTrainedTokenizerFast, less: int
) -> None:
    prompt = Chat(tokenizer).encode("How many?")
    open_turn = (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful voice "
        "assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nThis is the audio: "
    )
    ahead = tokenizer(open_turn, add_special_tokens=False)["input_ids"]
    assert prompt.audio_at == len(ahead) - less  # DIFFA's count minus one where the space merges
    assert prompt.tokens[: prompt.audio_at].tolist() == ahead[: prompt.audio_at]
    assert tokenizer.decode(prompt.tokens[prompt.audio_at :]).lstrip().startswith("<audio>. How")


def test_the_assistants_header_belongs_to_the_answer() -> None:
    chat = Chat(PLAIN)
    example = chat.encode_example("What?", "three five")
    words = PLAIN.decode(example.tokens[example.answer])
    assert words == "<|start_header_id|>assistant<|end_header_id|>\n\nthree five<|eot_id|>"
    asked = PLAIN.decode(example.tokens[~example.answer])
    assert asked.endswith("What?<|eot_id|>")
    assert chat.encode("What?").audio_at == example.audio_at


def test_an_answer_ends_at_its_turn_or_text_end() -> None:
    chat = Chat(PLAIN)
    eot, eos = PLAIN.convert_tokens_to_ids(["<|eot_id|>", "<|eos|>"])
    letters = PLAIN("two words", add_special_tokens=False)["input_ids"]
    assert chat.decode(torch.tensor([*letters, eot, *letters, eos])) == "two words"
    assert chat.decode(torch.tensor([*letters, eos, eos])) == "two words"
    assert chat.decode(torch.tensor(letters)) == "two words"


def test_a_system_turn_can_be_given_or_left_out() -> None:
    tokens = Chat(PLAIN).encode("Q", system="Be brief.").tokens
    assert "Be brief." in PLAIN.decode(tokens)
    assert "system" not in PLAIN.decode(Chat(PLAIN, system="").encode("Q").tokens)


def test_a_user_turn_without_its_places_is_refused() -> None:
    with pytest.raises(SpecError, match=r"has no \{question\}"):
        Chat(PLAIN, user="<audio> hello")
    with pytest.raises(SpecError, match="has no <audio>"):
        Chat(PLAIN, user="hello {question}").encode("Q")


def test_a_tokenizer_without_a_template_is_refused() -> None:
    bare = byte_tokenizer([])
    bare.chat_template = None
    with pytest.raises(SpecError, match="no chat template"):
        Chat(bare)
