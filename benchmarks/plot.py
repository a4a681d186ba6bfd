"""A scatter of named points as an SVG file, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, EDGE = 720, 440, 56


class Point(NamedTuple):
    """Where a point is, what it is called, and how uncertain its height is."""

    x: float
    y: float
    name: str
    spread: float = 0.0


def scatter(points: Sequence[Point], path: Path, *, x: str, y: str, title: str) -> None:
    """Draw points with labels and error bars; axes begin at round numbers around the data."""
    left, right = 0.0, max(point.x for point in points) * 1.15
    low = min(point.y - point.spread for point in points)
    high = max(point.y + point.spread for point in points)
    margin = max(high - low, 1e-3) * 0.15
    low, high = low - margin, high + margin

    def at(px: float, py: float) -> tuple[float, float]:
        across = EDGE + (px - left) / (right - left) * (WIDTH - 2 * EDGE)
        return across, HEIGHT - EDGE - (py - low) / (high - low) * (HEIGHT - 2 * EDGE)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{EDGE}" y="24" font-size="14">{escape(title)}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x)}</text>',
        f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {HEIGHT / 2})">{escape(y)}</text>',
    ]
    for step in range(5):
        across, _ = at(left + (right - left) * step / 4, low)
        _, down = at(left, low + (high - low) * step / 4)
        parts.append(
            f'<path d="M{EDGE} {down:.1f}H{WIDTH - EDGE}" stroke="#ddd"/>'
            f'<text x="{EDGE - 6}" y="{down + 4:.1f}" text-anchor="end">'
            f"{low + (high - low) * step / 4:.3g}</text>"
            f'<text x="{across:.1f}" y="{HEIGHT - EDGE + 16}" text-anchor="middle">'
            f"{left + (right - left) * step / 4:.3g}</text>"
        )
    for point in points:
        across, down = at(point.x, point.y)
        _, top = at(point.x, point.y + point.spread)
        _, bottom = at(point.x, point.y - point.spread)
        parts.append(
            f'<path d="M{across:.1f} {top:.1f}V{bottom:.1f}" stroke="#36c"/>'
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="#36c"/>'
            f'<text x="{across + 7:.1f}" y="{down - 5:.1f}">{escape(point.name)}</text>'
        )
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
