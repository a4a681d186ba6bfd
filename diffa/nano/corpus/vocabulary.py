"""The closed vocabulary of nano and its tokenizer in Hugging Face's files."""

import json
import re
import string
from pathlib import Path

from diffa.data.corpora.fsdd import DIGIT_WORDS
from diffa.nano.corpus.phrases import CHOICE_PROMPTS, ORDINALS, PHRASES
from diffa.nano.corpus.questions import CHOICES, TEENS

SYSTEM = "You are a helpful voice assistant."
SPECIAL = (
    "<|endoftext|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|mdm_mask|>", "<|blank|>",
)  # fmt: skip
MASK, EOS, EOT, BLANK = "<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>", "<|blank|>"
TEMPLATE = (
    "{{ '<|startoftext|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPACE = "▁"  # the space before a word belongs to it, as in LLaDA's tokenizer
EXTRA_WORDS = (
    "Only speech says say over a and of notes melody noise clicks silence tone chirp Quiet Normal "
    "Loud system user assistant This is the audio nothing twenty thirty yes no none A B C D letter "
    "answer hear can not speaker speakers number both sure I do know you it he she they we me my "
    "your could would will was were with from for by an or if here there please thanks hello why "
    "when where who whose did had has be about like talk talks sing sings music loudly quietly "
    "Why When Where Who Whose Did Has Had Can Could Would Will Does Do Are Was Were I You He She "
    "They We"
)


def build_vocabulary() -> list[str]:
    """Return every word of the corpus, then letters and punctuation."""
    texts = [text for kind in PHRASES.values() for text in kind] + [
        *CHOICE_PROMPTS,
        SYSTEM,
        EXTRA_WORDS,
        *ORDINALS,
        *TEENS,
        *DIGIT_WORDS,
    ]
    texts += [choice for choices in CHOICES.values() for choice in choices]
    words = sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)})
    marks = [SPACE, f"{SPACE}<audio>", f"{SPACE}\n\n", *(SPACE + mark for mark in '"(')]
    pieces = (
        marks
        + [SPACE + word for word in words]
        + [*string.punctuation]
        + [*string.ascii_letters, *string.digits]
    )
    return list(dict.fromkeys(pieces))


def write_tokenizer(folder: str | Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json; any text splits into words or bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = build_vocabulary()
    # Whole words beat letters, letters beat bytes; the model never needs an unknown token.
    scored = [(piece, -20.0) for piece in SPECIAL] + [
        (piece, -1.0 if len(piece) > 1 else -8.0) for piece in words
    ]  # fmt: skip
    scored += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n\n"), "isolated"),
            pre_tokenizers.Metaspace(SPACE, "always", split=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(SPACE, "always"), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>",
        "eos_token": EOS, "pad_token": EOS, "mask_token": MASK,
        "additional_special_tokens": [*SPECIAL[2:5], BLANK],
        "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False, "model_max_length": 4096,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return folder
