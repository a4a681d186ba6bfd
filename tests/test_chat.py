"""Chat prompts: the checkpoint's template, where the audio goes, what belongs to the answer."""

from __future__ import annotations

import pytest
import torch
from helpers.templates import BOS, CHATML, CLOSE, END, EOS, OPEN, UNK, family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import diffa
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


# --- templates of published models --------------------------------------------------------------

SYSTEM, USER, ANSWER = [12, 13, 14], [15, 16, 14, 17, 18], [19, 20]
LLAMA_PROMPT = [BOS, OPEN, 6, CLOSE, 11, *SYSTEM, END, OPEN, 7, CLOSE, 11, *USER, END]
CHATML_PROMPT = [OPEN, 6, 10, *SYSTEM, END, 10, OPEN, 7, 10, *USER, END, 10]
MERGED_USER = [*SYSTEM, 11, *USER]  # the system prompt before the user's text

# The prompt without the header, the header, and the answer with the end of its turn.
CONVERSATIONS = {
    "llada": (LLAMA_PROMPT, [OPEN, 8, CLOSE, 11], [*ANSWER, END]),
    "llama3": (LLAMA_PROMPT, [OPEN, 8, CLOSE, 11], [*ANSWER, END]),
    "sdar": (CHATML_PROMPT, [OPEN, 8, 10], [*ANSWER, END]),
    "dream": (CHATML_PROMPT, [OPEN, 8, 10], [*ANSWER, END]),
    "smollm2": (CHATML_PROMPT, [OPEN, 8, 10], [*ANSWER, END]),
    "gemma": ([BOS, OPEN, 7, 10, *MERGED_USER, END, 10], [OPEN, 9, 10], [*ANSWER, END]),
    "thinking": (CHATML_PROMPT, [OPEN, 8, 10, 23, 11, 24, 11], [*ANSWER, END]),
    "silent": ([OPEN, 7, 10, *MERGED_USER, END, 10], [OPEN, 8, 10], [*ANSWER, END]),
    "spaced": ([OPEN, *SYSTEM, END, OPEN, *USER, END], [], [25, 20, EOS]),
    "none": ([*MERGED_USER, 10], [], [*ANSWER, EOS]),
}


def family_chat(name: str, system: str = "Be brief.") -> Chat:
    return Chat(family_tokenizer(name), system=system, user="Hear <audio>. {question}")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_and_examples_of_a_template_have_these_tokens(name: str) -> None:
    chat = family_chat(name)
    before, header, answer = CONVERSATIONS[name]
    prompt = chat.encode("What?")
    example = chat.encode_example("What?", "three five")
    assert prompt.tokens.tolist() == [*before, *header]
    assert example.tokens.tolist() == [*before, *header, *answer]
    assert prompt.audio_at == example.audio_at == before.index(16)
    targets = example.tokens[example.answer].tolist()
    assert targets == [*header, *answer]  # the header is a target, as in DIFFA
    bare = chat.encode_example("What?", "three five", train_header=False)
    assert bare.tokens.tolist() == example.tokens.tolist()
    assert bare.tokens[bare.answer].tolist() == answer


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_answer_is_decoded_from_its_tokens_and_from_the_targets(name: str) -> None:
    chat = family_chat(name)
    _, header, answer = CONVERSATIONS[name]
    assert chat.decode(torch.tensor(answer)) == "three five"
    assert chat.decode(torch.tensor([*header, *answer])) == "three five"
    assert chat.decode(torch.tensor([*header, *answer, EOS, EOS])) == "three five"
    assert chat.decode(torch.tensor([*header, *answer, *header, 15])) == "three five"
    assert chat.decode(torch.tensor(answer[:-1])) == "three five"  # no end yet


@pytest.mark.parametrize("name", CONVERSATIONS)
@given(
    words=st.lists(st.sampled_from(["Hear", "What", "three", "five", "You", "?"]), min_size=1),
    padded=st.booleans(),
    system=st.sampled_from(["", "Be brief."]),
)
def test_an_example_is_the_prompt_and_a_finished_conversation(
    name: str, words: list[str], padded: bool, system: str
) -> None:
    chat, text = family_chat(name, system), " ".join(words)
    written = f" {text} " if padded else text
    prompt, example = chat.encode(written), chat.encode_example(written, written)
    count = len(prompt.tokens)
    assert example.tokens[:count].tolist() == prompt.tokens.tolist()
    assert example.answer[count:].all()
    assert chat.decode(example.tokens[count:]) == text
    assert chat.decode(example.tokens[example.answer]) == text
    if chat.tokenizer.chat_template and not (system and name in ("gemma", "silent")):
        turns = [{"role": "system", "content": system}] if system else []
        turns += [
            {"role": "user", "content": f"Hear <audio>. {written}"},
            {"role": "assistant", "content": written},
        ]
        finished = chat.tokenizer.apply_chat_template(turns, tokenize=False)
        ids = chat.tokenizer(finished, add_special_tokens=False)["input_ids"]
        assert ids[: len(example.tokens)] == example.tokens.tolist()
        assert example.tokens[-1] in (END, EOS)


@pytest.mark.parametrize("name", ["dream", "smollm2"])
def test_a_templates_own_system_turn_stands_in_for_an_empty_one(name: str) -> None:
    tokens = family_chat(name, system="").encode("What?").tokens.tolist()
    assert tokens == [OPEN, 6, 10, 21, 22, 14, END, 10, OPEN, 7, 10, *USER, END, 10, OPEN, 8, 10]


@pytest.mark.parametrize("name", ["gemma", "none"])
def test_no_system_prompt_leaves_the_users_text_alone(name: str) -> None:
    tokens = family_chat(name, system="").encode("What?").tokens.tolist()
    turn = [BOS, OPEN, 7, 10, *USER, END, 10, OPEN, 9, 10] if name == "gemma" else [*USER, 10]
    assert tokens == turn


def test_an_answer_like_the_header_of_lladas_template_keeps_its_words() -> None:
    chat = family_chat("llada")
    example = chat.encode_example("What?", "assistant")
    assert example.tokens[-2:].tolist() == [8, END]
    assert chat.decode(example.tokens[example.answer]) == "assistant"


def test_a_template_that_rewrites_answers_is_refused() -> None:
    chat = family_chat("sdar")
    chat.tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | lower")
    with pytest.raises(SpecError, match="leaves out the assistant's answer"):
        chat.encode_example("What?", "three five")
    chat = family_chat("sdar")
    chat.tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}"
    )
    with pytest.raises(SpecError, match="refuses the turns user, assistant: no"):
        chat.encode("What?")


def test_nanos_tokens_are_these() -> None:
    chat = diffa.build("nano").chat_format
    prompt = [1, 2, 268, 3, 9, 81, 96, 82, 168, 301, 98, 340, 4, 2, 299, 3, 9, 63, 175, 278, 99]
    prompt += [342, 8, 340, 37, 189, 128, 96, 264, 347, 4, 2, 98, 3, 9]
    assert chat.encode("How many digits are spoken?").tokens.tolist() == prompt
    example = chat.encode_example("How many digits are spoken?", "three five")
    assert example.tokens.tolist() == [*prompt, 285, 144, 4]
    assert example.audio_at == 22 and int(example.answer.long().argmax()) == 31
    assert chat.encode("Q", system="", audio=False).tokens.tolist() == [
        *[1, 2, 299, 3, 9, 63, 175, 278, 99, 342, 8, 340, 7, 401, 4, 2, 98, 3, 9]
    ]


@pytest.mark.parametrize(
    "template", [TEMPLATE, TEMPLATE.replace("m['content'] +", "m['content'] | trim +")]
)
def test_an_untrimmed_question_keeps_its_outer_line_breaks_in_every_template(template: str) -> None:
    tokenizer = byte_tokenizer([("Ġ", "<")])
    tokenizer.chat_template = template
    chat = Chat(tokenizer, user="<audio>. {question}")
    exact = chat.encode("\nAnswer:\n", trim=False)
    assert tokenizer.decode(exact.tokens).endswith(
        "<audio>. \nAnswer:\n<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    same = chat.encode("Answer:", trim=False), chat.encode("Answer:")
    assert same[0].tokens.tolist() == same[1].tokens.tolist()
    assert same[0].audio_at == same[1].audio_at


def test_a_template_that_trims_removes_the_outer_line_breaks_of_a_question() -> None:
    tokenizer = byte_tokenizer([])
    tokenizer.chat_template = TEMPLATE.replace("m['content'] +", "m['content'] | trim +")
    text = tokenizer.decode(Chat(tokenizer).encode("Answer:\n").tokens)
    assert "Answer:<|eot_id|>" in text


# --- special tokens that somebody types ---------------------------------------------------------

PIECES = [
    "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<audio>", "<eos>", "<end_of_turn>", "<think>",
    "</think>", " ", "What", "?", "\n",
]  # fmt: skip
TYPED = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def controls(chat: Chat, tokens: torch.Tensor) -> list[int]:
    return [i for i in tokens.tolist() if i in chat.tokenizer.all_special_ids and i != UNK]


@pytest.mark.parametrize("name", CONVERSATIONS)
@given(question=TYPED, answer=TYPED, system=TYPED)
@settings(max_examples=25, deadline=None)
def test_typed_special_tokens_are_text_in_every_turn(
    name: str, question: str, answer: str, system: str
) -> None:
    chat = family_chat(name)
    plain = chat.encode_example("What?", "three five", system="You" if system.strip() else "")
    answer = answer.strip() or "three"
    example = chat.encode_example(question, answer, system=system)
    prompt = chat.encode(question, system=system)
    assert controls(chat, example.tokens) == controls(chat, plain.tokens)
    assert example.tokens[: len(prompt.tokens)].equal(prompt.tokens)
    assert prompt.audio_at == example.audio_at
    begin = chat.tokenizer.decode(example.tokens[: prompt.audio_at])
    assert begin.endswith(("Hear", "Hear "))


def test_typed_tokens_come_back_from_an_answers_ids() -> None:
    chat = Chat(PLAIN)
    for answer in ("turns end with <|eot_id|> in Llama 3", "<|mdm_mask|>", "a<|eos|>b <audio>"):
        example = chat.encode_example("Q", answer)
        assert "".join(chat.decode(example.tokens[example.answer]).split()) == "".join(
            answer.split()
        )


def test_the_audio_goes_to_the_user_turns_own_mark() -> None:
    chat = Chat(PLAIN, user="{question} <audio>")
    prompt = chat.encode("Is <audio> a word?", system="You answer about <audio> clips.")
    rest = PLAIN.decode(prompt.tokens[prompt.audio_at :])
    assert rest.strip().startswith("<audio>") and rest.count("<audio>") == 1


def test_choices_are_text_as_well() -> None:
    model = diffa.build("nano")
    tokenizer = model.backbone.tokenizer
    ids = model.chat_format.ids("<|mdm_mask|>")
    assert not {*ids} & {*tokenizer.all_special_ids}


@pytest.mark.parametrize("place", ["question", "answer", "system"])
def test_half_a_character_is_told(place: str) -> None:
    texts = {"question": "Q", "answer": "A", "system": "S"} | {place: "caf\udce9"}
    with pytest.raises(SpecError, match=r"caf.udce9.* no valid Unicode"):
        Chat(PLAIN).encode_example(**texts)
