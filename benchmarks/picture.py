"""Draw an answer forming as an animated SVG: python benchmarks/picture.py AUDIO QUESTION OUT."""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

import diffa
from diffa.audio import prepare
from diffa.runtime.render import CONFIDENT, END_GLYPH, MASK_GLYPH, token_text
from diffa.types import Step

WIDE, LINE, LETTER = 860, 34, 9.6
SECONDS = 0.55  # per step; the last one stays three times as long


def main() -> None:
    """Answer a question, record the steps and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio")
    parser.add_argument("question")
    parser.add_argument("out", type=Path)
    parser.add_argument("--spec", default="nano")
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    model = diffa.build(args.spec)
    prompt = model.chat_format.encode(args.question)
    wave = prepare(args.audio, model.encoder.sample_rate)
    steps = list(
        model.stream(prompt.tokens, wave, audio_at=prompt.audio_at, max_tokens=args.max_tokens)
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(draw(args.question, steps, model), encoding="utf-8")
    print(f"{args.out}: {len(steps)} forward passes")


def draw(question: str, steps: list[Step], model: diffa.Model) -> str:
    """Return the SVG: one group per step, each shown in its turn, over and over."""
    total = (len(steps) + 2) * SECONDS
    groups = []
    for index, step in enumerate(steps):
        begin = index * SECONDS / total
        end = 1.0 if index == len(steps) - 1 else (index + 1) * SECONDS / total
        keyframes = f'keyTimes="0;{begin:.4f};{end:.4f};1" values="0;1;{int(end == 1.0)};0"'
        if index == 0:
            keyframes = f'keyTimes="0;{end:.4f};1" values="1;0;0"'
        groups.append(
            f'<g opacity="0"><animate attributeName="opacity" calcMode="discrete" '
            f'dur="{total:.2f}s" repeatCount="indefinite" {keyframes}/>{row(step, model)}'
            f'<text x="20" y="{LINE * 3.4:.0f}" class="dim">forward {index + 1} of {len(steps)}'
            "</text></g>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDE}" height="{LINE * 4}" '
        f'viewBox="0 0 {WIDE} {LINE * 4}"><style>text{{font:16px ui-monospace,monospace;'
        "fill:#1f2328;white-space:pre}.dim{fill:#8c959f;font-size:13px}.doubt{fill:#9a6700}"
        ".mask{fill:#c9d1d9}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="#f6f8fa"/>'
        f'<text x="20" y="{LINE}" class="dim">{escape(question)}</text>{"".join(groups)}</svg>\n'
    )


def row(step: Step, model: diffa.Model) -> str:
    """Return one canvas as SVG text: grey masks, amber doubts, dark certainties."""
    vocab, tokens, parts = model.backbone.vocab, step.tokens[0].tolist(), []
    for place, token in enumerate(tokens):
        if token == vocab.mask:
            parts.append(f'<tspan class="mask">{MASK_GLYPH}{MASK_GLYPH} </tspan>')
        elif token in (vocab.eos, vocab.pad):
            parts.append(f'<tspan class="mask">{END_GLYPH}</tspan>')
        else:
            doubt = "" if float(step.confidence[0, place]) >= CONFIDENT else ' class="doubt"'
            word = escape(token_text(token, tokens, place, model.backbone.tokenizer))
            parts.append(f"<tspan{doubt}>{word}</tspan>")
    return f'<text x="20" y="{LINE * 2.2:.0f}" xml:space="preserve">{"".join(parts)}</text>'


if __name__ == "__main__":
    main()
