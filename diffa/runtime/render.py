"""Show an answer forming: what is written, what is still masked, how sure the model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from diffa.types import Step, Vocab

MASK_GLYPH, END_GLYPH = "░", "·"
CONFIDENT = 0.9


def render_step(step: Step, row: int, tokenizer: Any, vocab: Vocab) -> Text:
    """Draw one row of a step: masks as shaded blocks, ends as dots, doubtful tokens dimmer."""
    text = Text()
    tokens = step.tokens[row].tolist()
    for place, token in enumerate(tokens):
        if token == vocab.mask:
            text.append(MASK_GLYPH, style="dim")
        elif token in (vocab.eos, vocab.pad):
            text.append(END_GLYPH, style="dim")
        else:
            sure = float(step.confidence[row, place]) >= CONFIDENT
            text.append(
                token_text(token, tokens, place, tokenizer), style="bold" if sure else "yellow"
            )
    return text


def token_text(token: int, tokens: list[int], place: int, tokenizer: Any) -> str:
    """Return a token's own letters, its leading space kept, special tokens left out.

    Tokenizers drop a space at the start of a text, so the token is decoded behind its neighbour.
    """
    if token in tokenizer.all_special_ids:
        return ""
    before = [tokens[place - 1]] if place and tokens[place - 1] < len(tokenizer) else []
    with_neighbour = str(tokenizer.decode([*before, token]))
    without = str(tokenizer.decode(before)) if before else ""
    return with_neighbour[len(without) :] if with_neighbour.startswith(without) else with_neighbour


def new_tokens(step: Step, before: Tensor | None) -> int:
    """Count the tokens that this step decided."""
    settled = int(step.final.sum())
    return settled if before is None else settled - int(before.sum())
