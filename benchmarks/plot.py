"""A scatter plot of named points with error bars, as an SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure


class Point(NamedTuple):
    """A point, its name, and the uncertainty of its height."""

    x: float
    y: float
    name: str
    spread: float = 0.0


def scatter(points: Sequence[Point], path: Path, *, x: str, y: str, title: str) -> None:
    """Draw points with names and error bars, with axis titles ``x`` and ``y``."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    axes.grid(axis="y", color="#dddddd")
    for point in points:
        axes.errorbar(point.x, point.y, yerr=point.spread, fmt="o", color="#3366cc")
        axes.annotate(
            point.name, (point.x, point.y), xytext=(7, 5), textcoords="offset points", fontsize=8
        )
    axes.set_xlim(0, max(point.x for point in points) * 1.15)
    with matplotlib.rc_context({"svg.hashsalt": "diffa", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
