"""Tokenizers whose chat templates behave like those of published models, with readable ids.

Every family has the same ids for the same role in a conversation; only the texts differ.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS, OPEN, CLOSE, END = range(6)  # special tokens; OPEN and CLOSE are around a role
WORDS = [
    "system", "user", "assistant", "model",  # 6 ... 9
    "\n", "\n\n",  # 10, 11
    "Be", " brief", ".",  # 12 ... 14
    "Hear", " <audio>", " What", "?",  # 15 ... 18
    "three", " five",  # 19, 20
    "You", " help",  # 21, 22
    "<think>", "</think>",  # 23, 24
    " three", "<audio>", "What", " Hear", " You", "five", " ", "  ",  # 25 ... 32
]  # fmt: skip

LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
)
LLAMA3_HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = CHATML.replace(
    "m['role'] + '\n' +",
    "m['role'] + '\n' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') +",
)
SILENT = (  # leaves system turns out without an error
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPACED = (  # like Llama 2: the header ends in a space, which belongs to the answer's first word
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)


class Family(NamedTuple):
    """A chat template with the texts of its special tokens BOS, EOS, OPEN, CLOSE and END."""

    template: str | None
    special: tuple[str, str, str, str, str]


_LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_TOKENS = ("<|bos|>", "<|endoftext|>", "<|im_start|>", "<|unused|>", "<|im_end|>")
_GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<unused0>", "<end_of_turn>")
FAMILIES = {
    "llada": Family(LLAMA3 + LLAMA3_HEADER, ("<|startoftext|>", "<|endoftext|>", *_LLAMA_TOKENS)),
    "llama3": Family(
        LLAMA3 + "{% if add_generation_prompt %}" + LLAMA3_HEADER + "{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", *_LLAMA_TOKENS),
    ),
    "sdar": Family(CHATML, _CHATML_TOKENS),
    "dream": Family(DEFAULT_SYSTEM + CHATML, _CHATML_TOKENS),
    "smollm2": Family(DEFAULT_SYSTEM + CHATML, _CHATML_TOKENS),
    "gemma": Family(GEMMA, _GEMMA_TOKENS),
    "thinking": Family(THINKING, _CHATML_TOKENS),
    "silent": Family(SILENT, _CHATML_TOKENS),
    "spaced": Family(SPACED, _CHATML_TOKENS),
    "none": Family(None, _CHATML_TOKENS),
}


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family: whole words, each with the space before it."""
    template, special = FAMILIES[name]
    vocab = {word: i for i, word in enumerate(["<unk>", *special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" ?</?\w+>| ?\w+|\n+|[^\s\w]"), behavior="isolated"
    )
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[0], eos_token=special[1]
    )
    tokenizer.chat_template = template
    return tokenizer
