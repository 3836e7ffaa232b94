"""Plots show what they are given, in the page's colours, the same each time, and let no label become markup."""

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from mllm_srec.evaluation import plots
from mllm_srec.evaluation.plots import Bin, Estimate, Stage

ROWS = [
    Estimate("cold", 0.1, 0.05, 0.2, 0.15, "item"),
    Estimate("warm", 0.3, 0.2, 0.4, 0.25, "item"),
    Estimate("short", 0.2, 0.1, 0.25, 0.2, "history"),
]
BINS = [Bin(5, 0.2, 0.0), Bin(5, 0.6, 0.2)]
STAGES = [Stage("all", 40, 1), Stage("retrieved", 7, 0), Stage("listed", 3.5, 0)]

DRAWN: dict[str, Callable[[], Markup]] = {
    "intervals": lambda: plots.intervals(ROWS, "NDCG@10", ("ours", "theirs"), "alt of intervals"),
    "gains": lambda: plots.gains(ROWS, "gain", "alt of gains"),
    "reliability": lambda: plots.reliability(BINS, 0.1, "alt of reliability"),
    "shares": lambda: plots.shares(BINS, 0.1, "alt of shares"),
    "curve": lambda: plots.curve([1, 2, 3], [3.0, 2.0, 2.5], ("step", "loss"), "alt of curve"),
    "funnel": lambda: plots.funnel(STAGES, "alt of funnel"),
}


def parsed(svg: str) -> ElementTree.Element:
    """The drawing as XML; a page knows the prefix, XML has to be told."""
    return ElementTree.fromstring(f'<r xmlns:xlink="x">{svg}</r>')[0]


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in parsed(svg).iter("text")]


def points(svg: str) -> list[tuple[float, float]]:
    """Where markers stand, in drawing order; y grows downwards."""
    return [(float(use.attrib["x"]), float(use.attrib["y"])) for use in parsed(svg).iter("use") if "x" in use.attrib]


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_is_sound_and_takes_the_pages_colours(name: str) -> None:
    svg = DRAWN[name]()
    root = parsed(svg)
    assert root.tag == "svg" and root.attrib["aria-label"] == f"alt of {name}" and "viewBox" in root.attrib
    assert "width" not in root.attrib and "height" not in root.attrib
    assert "var(--ink)" in svg and "var(--ours)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg.replace("url(#", "")), "a colour that is not the page's"
    assert "metadata" not in svg and "http" not in svg


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_is_the_same_twice(name: str) -> None:
    assert DRAWN[name]() == DRAWN[name]()


def test_no_two_plots_share_an_id() -> None:
    ids = [node.attrib["id"] for draw in DRAWN.values() for node in parsed(draw()).iter() if "id" in node.attrib]
    assert len(ids) == len(set(ids)) > 50
    for draw in DRAWN.values():
        svg = draw()
        used = re.findall(r'(?:url\(|href=")#([^)"]+)', svg)
        assert used and all(f'id="{one}"' in svg for one in used)


def test_intervals_name_rows_under_their_groups_and_stand_in_order() -> None:
    svg = DRAWN["intervals"]()
    assert [text for text in texts(svg) if text in ("item", "cold", "warm", "history", "short")] == [
        *("item", "cold", "warm", "history", "short")
    ]
    assert {"ours", "theirs", "NDCG@10"} <= set(texts(svg))
    markers = points(svg)[-8:-2]  # ours, then the reference; the legend has one of each
    ours, theirs = markers[:3], markers[3:]
    scale = (ours[1][0] - ours[0][0]) / 0.2
    assert (ours[2][0] - ours[0][0]) == pytest.approx(0.1 * scale, rel=1e-3)
    assert [(b[0] - a[0]) / scale for a, b in zip(ours, theirs, strict=True)] == pytest.approx(
        [0.05, -0.05, 0.0], abs=1e-4
    )
    assert [a[1] for a in ours] == [b[1] for b in theirs] == sorted(a[1] for a in ours)


def test_without_a_reference_there_is_no_legend() -> None:
    svg = plots.intervals([Estimate("one", 0.1, 0.0, 0.2)], "MRR", ("ours", "theirs"), "alone")
    assert "theirs" not in texts(svg) and "one" in texts(svg)


def test_a_falling_curve_falls() -> None:
    (_, first), (_, second), (_, third) = points(DRAWN["curve"]())[-3:]
    assert first < third < second


def test_the_funnel_tells_counts_and_shares_of_the_first_stage() -> None:
    assert {"40 (100 %)", "7 (18 %)", "4 (9 %)", "cold item"} <= set(texts(DRAWN["funnel"]()))


def test_a_bin_is_drawn_where_it_stands() -> None:
    svg = DRAWN["reliability"]()
    (x0, y0), (x1, y1) = points(svg)[-3:-1]
    assert (y0 - y1) / (x1 - x0) == pytest.approx((0.2 - 0.0) / (0.6 - 0.2) * _stretch(svg), rel=1e-2)


def _stretch(svg: str) -> float:
    """Height of one unit of y over width of one unit of x: the dashed diagonal goes from corner to corner."""
    diagonals = re.findall(r'd="M ([\d.]+) ([\d.]+) \s*L ([\d.]+) ([\d.]+) \s*" clip-path', svg)
    x0, y0, x1, y1 = next(tuple(map(float, one)) for one in diagonals if one[0] != one[2] and one[1] != one[3])
    return (y0 - y1) / (x1 - x0)


def test_labels_are_text() -> None:
    nasty = "<b onload='x'>&$a_b$"
    svg = plots.gains([Estimate(nasty, 0.0, -1.0, 1.0, group=nasty)], nasty, '"><script>')
    root = parsed(svg)
    assert texts(svg).count(nasty) == 3
    assert root.attrib["aria-label"] == '"><script>'
    assert not list(root.iter("b")) and not list(root.iter("script"))


@pytest.mark.parametrize("value", [0.0, 1e-12, 1.0])
def test_rows_without_spread_can_be_drawn(value: float) -> None:
    row = [Estimate("x", value, value, value, value)]
    assert parsed(plots.intervals(row, "m", ("a", "b"), "flat")).tag == "svg"
    assert parsed(plots.gains(row, "m", "flat gain")).tag == "svg"
    assert parsed(plots.curve([1.0], [value], ("x", "y"), "point")).tag == "svg"
