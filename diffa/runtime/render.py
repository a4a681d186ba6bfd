"""Render an answer as it forms: its tokens, what is still masked, how confident the model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

if TYPE_CHECKING:
    from diffa.types import Step, Vocab

MASK_GLYPH, END_GLYPH = "░", "·"
CONFIDENT = 0.9  # probability from which a token is drawn bold


def render_step(step: Step, row: int, tokenizer: Any, vocab: Vocab) -> Text:
    """Return one row of a step: masks as shaded blocks, ends as dots, unsure tokens in yellow."""
    text = Text()
    tokens = step.tokens[row].tolist()
    for position, token in enumerate(tokens):
        if token == vocab.mask:
            text.append(MASK_GLYPH, style="dim")
        elif token in (vocab.eos, vocab.pad):
            text.append(END_GLYPH, style="dim")
        else:
            sure = float(step.confidence[row, position]) >= CONFIDENT
            word = token_text(token, tokens, position, tokenizer)
            text.append(word, style="bold" if sure else "yellow")
    return text


def token_text(token: int, tokens: list[int], position: int, tokenizer: Any) -> str:
    """Return the text of a token with its leading space; "" for a special token.

    Tokenizers drop a space at the start of a text, so the token is decoded after its neighbour.
    """
    if token in tokenizer.all_special_ids:
        return ""
    before = [tokens[position - 1]] if position and tokens[position - 1] < len(tokenizer) else []
    together = str(tokenizer.decode([*before, token]))
    alone = str(tokenizer.decode(before)) if before else ""
    return together[len(alone) :] if together.startswith(alone) else together
