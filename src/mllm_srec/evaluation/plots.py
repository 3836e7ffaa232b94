"""Plots of a run's report: SVG that stands inside a page, in the page's colours, the same bytes for the same figures.

No window, no script, no date; texts stay texts, so that they can be read aloud, searched and printed sharply.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mllm_srec.store_files import fingerprint

WIDTH = 4.7
"""Inches. A panel of that width can still be read on a telephone, where it shrinks by a quarter."""

# Colours that stand in the drawing for those of the page, which differ between light and dark.
INK, MUTED, LINE, OURS, THEIRS, PAPER = (f"#{n:02x}{n:02x}{n:02x}" for n in range(1, 7))
PAGE = {INK: "ink", MUTED: "muted", LINE: "line", OURS: "ours", THEIRS: "theirs", PAPER: "paper"}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mllm-srec",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, and, where it is to be compared, the mean of the reference on the same targets."""

    label: str
    mean: float
    low: float
    high: float
    reference: float | None = None
    group: str = ""
    """Rows of one group stand together under its name."""


@dataclass(frozen=True)
class Bin:
    """Predictions of about the same size: how many, their mean, and the share that came true."""

    count: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Stage:
    """How many targets are left after a stage, and how many of them are cold; fractions come from ties."""

    name: str
    targets: float
    cold: float


def intervals(rows: Sequence[Estimate], metric: str, names: tuple[str, str], alt: str) -> Markup:
    """Points with their intervals, one row each from top to bottom; a diamond where the reference is.

    Args:
        rows: at least one.
        names: of the system, and of the reference.
        alt: what a reader who cannot see it should know.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(0.9 + 0.25 * _lines(rows))
        at = _rows(axes, rows)
        axes.hlines(at, [row.low for row in rows], [row.high for row in rows], color=OURS, linewidth=2)
        axes.plot([row.mean for row in rows], at, "o", color=OURS, markersize=5, label=names[0], clip_on=False)
        told = [(row.reference, y) for row, y in zip(rows, at, strict=True) if row.reference is not None]
        if told:
            x, y = zip(*told, strict=True)
            axes.plot(x, y, "D", color=THEIRS, markersize=4, markerfacecolor="none", label=names[1], clip_on=False)
            _legend(axes)
        axes.set_xlim(left=0)
        axes.set_xlabel(metric)
        return _svg(figure, alt)


def gains(rows: Sequence[Estimate], metric: str, alt: str) -> Markup:
    """Differences with their intervals, one row each, and a line where there is none; at least one row."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(0.9 + 0.25 * _lines(rows))
        at = _rows(axes, rows)
        axes.axvline(0, color=MUTED, linewidth=1, linestyle="--")
        axes.hlines(at, [row.low for row in rows], [row.high for row in rows], color=OURS, linewidth=2)
        axes.plot([row.mean for row in rows], at, "o", color=OURS, markersize=5)
        axes.set_xlabel(metric)
        return _svg(figure, alt)


def reliability(bins: Sequence[Bin], base_rate: float, alt: str) -> Markup:
    """Share that came true against what was predicted, both from 0 to 1, with the line where they are the same."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.3)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="calibrated")
        axes.axhline(base_rate, color=THEIRS, linewidth=1, linestyle=":", label="base rate")
        predicted, observed = [of.predicted for of in bins], [of.observed for of in bins]
        axes.plot(predicted, observed, "o-", color=OURS, markersize=5, linewidth=1, label="odds of Yes", clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability that the odds state", ylabel="share that are the target")
        axes.grid()
        _legend(axes)
        return _svg(figure, alt)


def shares(bins: Sequence[Bin], base_rate: float, alt: str) -> Markup:
    """The share that came true by bin, the lowest odds first: where it rises, the odds put items in the right order."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.3)
        number = list(range(1, len(bins) + 1))
        axes.bar(number, [of.observed for of in bins], width=0.7, color=OURS)
        axes.axhline(base_rate, color=THEIRS, linewidth=1.5, linestyle=":", label="base rate")
        axes.set(xticks=number, xlabel="bin, from the lowest odds to the highest", ylabel="share that are the target")
        axes.grid(axis="y")
        _legend(axes)
        return _svg(figure, alt)


def curve(x: Sequence[float], y: Sequence[float], names: tuple[str, str], alt: str) -> Markup:
    """A line through the points, whole numbers along x; `names` of the axes."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(2.8)
        axes.plot(x, y, color=OURS, linewidth=1.5, marker="o" if len(x) <= 30 else "", markersize=4)
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid()
        return _svg(figure, alt)


def funnel(stages: Sequence[Stage], alt: str) -> Markup:
    """What is left after each stage, cold targets apart; shares are of the first stage, which holds a target."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(0.9 + 0.45 * len(stages))
        at = [-float(n) for n in range(len(stages))]
        warm = [stage.targets - stage.cold for stage in stages]
        axes.barh(at, warm, height=0.55, color=OURS, label="item seen before")
        axes.barh(at, [stage.cold for stage in stages], left=warm, height=0.55, color=THEIRS, label="cold item")
        for y, stage in zip(at, stages, strict=True):
            share = stage.targets / stages[0].targets
            text = f"{stage.targets:,.0f} ({100 * share:.0f} %)"
            axes.annotate(text, (stage.targets, y), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(at, [stage.name for stage in stages])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.3 * stages[0].targets)  # room for the numbers
        axes.set_xlabel("test targets")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend(axes)
        return _svg(figure, alt)


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handletextpad=0.5)


def _lines(rows: Sequence[Estimate]) -> int:
    return len(rows) + len({row.group for row in rows if row.group})


def _rows(axes: Axes, rows: Sequence[Estimate]) -> list[float]:
    """The height of each row; rows and groups are named along the left side."""
    at: list[float] = []
    places: list[float] = []
    labels: list[str] = []
    for group, members in groupby(rows, key=lambda row: row.group):
        if group:
            places.append(-len(places))
            labels.append(group)
        for row in members:
            at.append(-len(places))
            places.append(at[-1])
            labels.append(row.label)
    axes.set_yticks(places, labels)
    for place, label in zip(places, axes.get_yticklabels(), strict=True):
        if place not in at:
            label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0, pad=7)  # a point at 0 is as wide as that
    axes.set_ylim(min(places) - 0.6, 0.6)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    return at


def _svg(figure: Figure, alt: str) -> Markup:
    """The drawing as an element of a page: no header, no size of its own, ids that no other plot has, page colours."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    whole = stream.getvalue()
    body = re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)
    opening, _, rest = body.partition(">")
    view = re.search(r'viewBox="[^"]+"', opening)
    assert view is not None  # matplotlib always writes one
    own = f"plot-{fingerprint(alt)[:8]}"
    rest = re.sub(r'\bid="', f'id="{own}-', rest)
    rest = re.sub(r'(url\(|href=")#', rf"\1#{own}-", rest)
    for colour, name in PAGE.items():
        rest = rest.replace(colour, f"var(--{name})")
    return Markup(f'<svg class="plot" role="img" aria-label="{escape(alt)}" {view[0]}>') + Markup(rest.strip())
