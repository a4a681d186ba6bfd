"""A study as an SVG: every run a faint dot, every mean a dot with its interval."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from diffa.ablation.table import SummaryRow
from diffa.errors import DiffaError

_COLOR = "#3366cc"


def import_matplotlib() -> Any:
    """Return matplotlib; raises DiffaError if it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise DiffaError("plots need matplotlib: pip install 'diffa-audio[eval]'") from error
    return matplotlib


def plot_summary(rows: Sequence[SummaryRow], metric: str, title: str) -> str:
    """Plot one metric of every row that has it.

    Args:
        rows: Rows of a study's table.
        metric: Metric to plot.
        title: Title of the plot.

    Returns:
        The text of an SVG file; the same for the same rows.
    """
    matplotlib = import_matplotlib()
    rows = [row for row in rows if metric in row.means]
    figure = matplotlib.figure.Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot(title=title if rows else f"{title}: nothing measured yet")
    axes.set(xlabel=metric, yticks=range(len(rows)), yticklabels=[row.label for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd")
    for y, row in enumerate(rows):
        mean, values = row.means[metric], list(row.by_seed[metric].values())
        axes.scatter(values, [y] * len(values), s=16, color=_COLOR, alpha=0.3)
        axes.errorbar(mean.mean, y, xerr=mean.half or 0, fmt="o", color=_COLOR)
    text = io.StringIO()
    # A fixed salt and no date: the file changes only if the numbers do.
    with matplotlib.rc_context({"svg.hashsalt": "diffa", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
