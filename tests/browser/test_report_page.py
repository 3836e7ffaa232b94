"""The report in a real browser: nothing complains, every picture and plot is there, no label is cut off, it fits a
telephone, and it follows light and dark."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hand_made_run import make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium without a window: one on the PATH, else the one that playwright has installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser: playwright is not installed")
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    with playwright.sync_playwright() as running:
        if found is None and not Path(running.chromium.executable_path).exists():
            pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH, and playwright has installed none")
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to be root's
        started = running.chromium.launch(executable_path=found, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every plot, long words and pictures that are missing."""
    run = make_run(tmp_path_factory.mktemp("page"), {6: "Donaudampfschifffahrtsgesellschaft" * 2}, training_rows=8)
    (run.folder / "adapter").mkdir()
    rows = ",".join(f'{{"step": {n + 1}, "loss": {2 + 3 / (n + 1)}}}' for n in range(40))
    (run.folder / "adapter" / "losses.json").write_text(f"[{rows}]")
    run.result["choices"]["retriever_epochs"] = [[n, 0.1 + 0.01 * n] for n in range(1, 9)]
    run.write()
    return run.folder / "report.html"


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, browser: "Browser", report: Path, complaints: list[str]) -> Iterator["Page"]:
    """The report, opened; what the browser says meanwhile, and what it fetches besides the file, is in `complaints`."""
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("requestfailed", lambda failed: complaints.append(f"failed: {failed.url[:80]}"))
    opened.on(
        "request",
        lambda asked: complaints.append(asked.url) if not asked.url.startswith(("data:", report.as_uri())) else None,
    )
    opened.goto(report.as_uri())
    yield opened
    opened.close()


def test_nothing_complains_and_nothing_is_fetched(page: "Page", complaints: list[str]) -> None:
    page.wait_for_load_state("networkidle")
    assert page.title() == "Run report: shop, MLLM-SRec"
    assert complaints == []


def test_a_broken_picture_would_be_noticed(browser: "Browser", tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text('<img src="data:image/jpeg;base64,AAAA"><img src="nowhere.jpg">')
    opened = browser.new_page()
    failed: list[str] = []
    opened.on("requestfailed", lambda asked: failed.append(asked.url))
    opened.goto((tmp_path / "bad.html").as_uri())
    assert opened.evaluate("[...document.images].map(image => image.naturalWidth)") == [0, 0]
    assert len(failed) == 1
    opened.close()


def test_every_picture_is_there(page: "Page") -> None:
    widths = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert len(widths) > 100 and min(widths) > 0


def test_every_plot_is_there_and_no_label_is_cut_off(page: "Page") -> None:
    plots = page.evaluate(
        """[...document.querySelectorAll("svg.plot")].map(svg => {
            const box = svg.getBoundingClientRect();
            const outside = [...svg.querySelectorAll("text")].filter(text => {
                const own = text.getBoundingClientRect();
                return own.left < box.left - 1 || own.right > box.right + 1
                    || own.top < box.top - 1 || own.bottom > box.bottom + 1;
            });
            const marks = svg.querySelectorAll("path, use").length, cut = outside.map(text => text.textContent);
            return [svg.getAttribute("aria-label"), box.width, box.height, marks, cut];
        })"""
    )
    assert len(plots) == 8
    for name, width, height, marks, outside in plots:
        assert width > 300 and height > 100 and marks > 5, name
        assert outside == [], name


def test_the_page_is_no_wider_than_the_screen(page: "Page") -> None:
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1]
    # What is wider than the screen is in boxes that scroll by themselves, and a keyboard can reach them.
    boxes = page.evaluate("[...document.querySelectorAll('.scroll')].map(box => [box.tabIndex, box.clientWidth])")
    assert boxes and all(tab == 0 and 0 < width <= wide[1] for tab, width in boxes)


def test_texts_can_be_read_in_light_and_dark(page: "Page") -> None:
    contrast = """() => {
        const bright = colour => {
            const [r, g, b] = colour.match(/[0-9.]+/g).map(Number)
                .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const paper = bright(getComputedStyle(document.body).backgroundColor);
        const of = colour => {
            const own = bright(colour);
            return (Math.max(own, paper) + 0.05) / (Math.min(own, paper) + 0.05);
        };
        const texts = [...document.querySelectorAll("p, td, th, .note, .outcome, a")];
        const labels = [...document.querySelectorAll("svg.plot text")];
        return [paper, Math.min(...texts.map(node => of(getComputedStyle(node).color)),
                                ...labels.map(node => of(getComputedStyle(node).fill)))];
    }"""
    papers = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        paper, least = page.evaluate(contrast)
        papers.append(paper)
        assert least >= 4.5, scheme
    assert papers[0] > 0.8 and papers[1] < 0.1
