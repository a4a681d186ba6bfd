"""An answer's canvas, its numbers and a comparison as HTML that a screen reader can read too."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from diffa.ui.steps import Frame, Replay, Token

# From doubtful to sure, and from early to late: light enough for dark letters, and distinct in
# lightness as well as in hue.
_DOUBT, _SURE = (255, 196, 112), (150, 222, 205)
_EARLY, _LATE = (68, 1, 84), (94, 201, 98)


def mix(first: tuple[int, int, int], last: tuple[int, int, int], share: float) -> str:
    """A colour between two, ``share`` of the way to the last."""
    share = min(1.0, max(0.0, share))
    return "#" + "".join(
        f"{round(a + (b - a) * share):02x}" for a, b in zip(first, last, strict=True)
    )


def canvas(frame: Frame, forward: int, num_forwards: int) -> str:
    """Draw one canvas: background by confidence, line and number by the step of becoming final."""
    if not frame:
        return ""
    visible, behind = _cut(frame)
    inner = "".join(_token(token, num_forwards) for token in visible)
    rest = f'<span class="d-rest">+ {behind} behind the end</span>' if behind else ""
    caption = f"Canvas after forward pass {forward} of {num_forwards}"
    words = escape(_read(visible), quote=True)
    return (
        f'<div class="d-canvas" role="img" aria-label="{caption}: {words}">'
        f'{inner}{rest}</div><p class="d-note">{caption}</p>{_table(visible)}'
    )


def legend() -> str:
    """Return the legend of the colours."""
    sure = f"linear-gradient(90deg,{mix(_DOUBT, _SURE, 0)},{mix(_DOUBT, _SURE, 1)})"
    step = f"linear-gradient(90deg,{mix(_EARLY, _LATE, 0)},{mix(_EARLY, _LATE, 1)})"
    return (
        '<p class="d-note d-legend">'
        f'<span>Background: confidence, 0 <i style="background:{sure}"></i> 1</span>'
        f"<span>Line and number: forward pass that made it final, first "
        f'<i style="background:{step}"></i> last</span>'
        '<span><b class="d-mask"></b> undecided</span><span><b class="d-end">·</b> end</span></p>'
    )


def numbers(replay: Replay) -> str:
    """Return forward passes, tokens per pass and seconds in a line."""
    return (
        f'<p class="d-note"><b>{escape(replay.name)}</b>: {replay.num_forwards} forward passes, '
        f"{replay.pace:.2f} tokens per pass, {replay.seconds:.2f} s</p>"
    )


def comparison(replays: Sequence[Replay]) -> str:
    """A table of two sampler presets; the answers are compared as well."""
    if len(replays) < 2:
        return ""
    first, second = replays
    cells = ""
    for label, values in (
        ("Forward passes", [f"{replay.num_forwards}" for replay in replays]),
        ("Tokens of the answer", [f"{replay.tokens}" for replay in replays]),
        ("Tokens per pass", [f"{replay.pace:.2f}" for replay in replays]),
        ("Seconds", [f"{replay.seconds:.2f}" for replay in replays]),
    ):
        row = "".join(f"<td>{value}</td>" for value in values)
        cells += f'<tr><th scope="row">{label}</th>{row}</tr>'
    heads = "".join(f'<th scope="col">{escape(replay.name)}</th>' for replay in replays)
    same = "The two answers are the same." if first.text == second.text else "The answers differ."
    faster = first.seconds / max(second.seconds, 1e-9)
    ratio = (
        f"The second took {1 / faster:.1f} times as long."
        if faster < 1
        else f"The second was {faster:.1f} times as fast."
    )
    return (
        f'<table class="d-table"><caption>Two sampler presets side by side</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead>"
        f'<tbody>{cells}</tbody></table><p class="d-note">{same} {ratio}</p>'
    )


def error_message(text: str) -> str:
    """A fault as a sentence, announced by screen readers."""
    if not text:
        return ""
    sentence = text[0].upper() + text[1:]
    sentence += "" if sentence.endswith((".", "!", "?")) else "."
    return f'<div class="d-error" role="alert">{escape(sentence)}</div>'


def _cut(frame: Frame) -> tuple[Frame, int]:
    """Leave out what only fills the canvas behind the end; say how much that was."""
    last = max((i for i, token in enumerate(frame) if token.kind != "end"), default=-1)
    keep = min(len(frame), last + 2)
    return frame[:keep], len(frame) - keep


def _token(token: Token, num_forwards: int) -> str:
    if token.kind == "mask":
        return '<span class="d-mask"></span>'
    style = f"background:{mix(_DOUBT, _SURE, token.confidence)}"
    number = ""
    if token.step:
        late = (token.step - 1) / max(1, num_forwards - 1)
        style += f";border-bottom-color:{mix(_EARLY, _LATE, late)}"
        number = f"<sup>{token.step}</sup>"
    text = escape(token.text) if token.kind == "word" else "·"
    title = escape(_describe(token), quote=True)
    return f'<span class="d-{token.kind}" style="{style}" title="{title}">{text}{number}</span>'


def _describe(token: Token) -> str:
    if token.kind == "mask":
        return "undecided"
    when = f"final at pass {token.step}" if token.step else "may still change"
    return f"confidence {token.confidence:.2f}, {when}"


def _read(visible: Frame) -> str:
    """The canvas as words, for who cannot see it."""
    words = {"mask": " undecided ", "end": ""}
    text = "".join(words.get(token.kind, token.text) for token in visible)
    return " ".join(text.split()) or "nothing decided yet"


def _table(visible: Frame) -> str:
    """Every token with its numbers, folded away."""
    rows = ""
    for place, token in enumerate(visible, start=1):
        text = {"mask": "undecided", "end": "end"}.get(token.kind, escape(repr(token.text)[1:-1]))
        sure = "" if token.kind == "mask" else f"{token.confidence:.3f}"
        rows += f"<tr><td>{place}</td><td>{text}</td><td>{sure}</td><td>{token.step or ''}</td>"
        rows += "</tr>"
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("place", "token", "confidence", "final"))
    return (
        "<details><summary>Tokens as a table</summary>"
        f'<table class="d-table"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        "</details>"
    )
