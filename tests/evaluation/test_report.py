"""The report: known figures, a sound page that shows what it must and nothing that data smuggle in, the same twice."""

import base64
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hand_made_run import DAY, HELD, HOSTILE, OURS, PEOPLE, Run, make_run, person, rank
from mllm_srec.config import UsersConfig
from mllm_srec.data.images import PictureError
from mllm_srec.data.split import Targets
from mllm_srec.errors import StoreError
from mllm_srec.evaluation import report_users
from mllm_srec.evaluation.protocol import Places
from mllm_srec.evaluation.report import calibrate, funnel
from mllm_srec.evaluation.report_users import EACH, REASONS, choose, readable
from mllm_srec.mllm.base import PartialFailure
from mllm_srec.windows import window_bounds

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and what is not closed as it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Written once. Read only."""
    made = make_run(tmp_path_factory.mktemp("report"), {5: "long " * 200})
    made.write()
    return made


@pytest.fixture(scope="module")
def html(run: Run) -> str:
    return (run.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def article(html: str, number: int) -> str:
    """The words of one person's part, tags left out."""
    parts = re.split(r"(?=<article)", html)[1:]
    return Page(next(part for part in parts if f">{person(number)} <" in part).split("</article>")[0]).text


def logit(*chances: float) -> np.ndarray:
    values = np.array(chances)
    odds: np.ndarray = np.log(values / (1 - values))
    return odds


# Calibration


def test_calibration_by_hand() -> None:
    found = calibrate(logit(0.8, 0.2, 0.6, 0.2), np.array([True, False, True, False]), bins=2)
    assert found is not None
    assert [(of.count, of.observed) for of in found.bins] == [(2, 0.0), (2, 1.0)]
    assert [of.predicted for of in found.bins] == pytest.approx([0.2, 0.7])
    assert found.ece == pytest.approx((0.2 + 0.3) / 2)
    assert found.brier == pytest.approx((0.04 + 0.04 + 0.16 + 0.04) / 4)
    assert (found.base_rate, found.base_brier) == (0.5, 0.25)
    assert found.predicted == pytest.approx(0.45)
    assert found.count == 4


def test_bins_hold_about_equally_many_and_never_more_than_there_are_values() -> None:
    found = calibrate(np.arange(23.0), np.zeros(23, bool))
    assert found is not None and [of.count for of in found.bins] == [3, 3, 3] + [2] * 7
    few = calibrate(np.array([[1.0, 2.0]]), np.array([[True, False]]))
    assert few is not None and [of.count for of in few.bins] == [1, 1]


def test_odds_without_bound_state_certainty() -> None:
    found = calibrate(np.array([1e4, -1e4, 1e4, -1e4]), np.array([True, False, True, False]), bins=2)
    assert found is not None
    assert (found.ece, found.brier) == (0.0, 0.0)
    wrong = calibrate(np.array([1e4, -1e4]), np.array([False, True]), bins=2)
    assert wrong is not None and (wrong.ece, wrong.brier) == (1.0, 1.0)


def test_calibration_of_nothing_is_none_and_of_other_shapes_refused() -> None:
    assert calibrate(np.zeros((0, 5)), np.zeros((0, 5), bool)) is None
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        calibrate(np.zeros((2, 3)), np.zeros(6, bool))


# What is lost where


def test_funnel_by_hand() -> None:
    cold = np.arange(PEOPLE) == 11
    stages = funnel(rank(), cold, OURS)
    assert [(stage.targets, stage.cold) for stage in stages] == [(12.0, 1.0), (8.0, 0.0), (6.0, 0.0)]
    first = funnel(rank(), np.arange(PEOPLE) == 0, OURS)
    assert [stage.cold for stage in first] == [1.0, 1.0, 1.0]


def test_a_target_tied_across_the_tenth_place_counts_by_its_chance() -> None:
    ranked = rank()
    greater, ties = ranked.places[OURS].greater.copy(), ranked.places[OURS].ties.copy()
    greater[0], ties[0] = 8, 3  # places 9 to 12: two of four are within ten
    tied = replace(ranked, places={OURS: Places(greater, ties)})
    assert funnel(tied, np.zeros(PEOPLE, bool), OURS)[2].targets == pytest.approx(5.5)


def test_what_is_not_retrieved_is_lost_there_even_if_its_place_is_among_the_first() -> None:
    ranked = rank()
    near = ranked.places[OURS].greater.copy()
    near[11] = 8  # behind eight candidates of a short list
    assert funnel(replace(ranked, places={OURS: Places(near, near * 0)}), np.zeros(PEOPLE, bool), OURS)[2].targets == 6


# Who is shown


def test_five_found_and_five_missed_are_drawn_by_the_seed() -> None:
    ranked, wanted = rank(), (np.arange(PEOPLE) + 3)
    chosen = choose(ranked, wanted, seed=0)
    assert len(chosen) == 2 * EACH and len(set(chosen)) == 2 * EACH
    assert set(chosen[:EACH]) < set(range(6))
    assert set(chosen[EACH:]) < set(range(6, PEOPLE))
    assert choose(ranked, wanted, seed=0) == chosen
    assert len({tuple(choose(ranked, wanted, seed=seed)) for seed in range(5)}) > 1


def test_a_person_with_many_targets_is_shown_once() -> None:
    ranked = rank()
    user = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2])
    of_few = replace(ranked, targets=Targets(user, ranked.targets.position, ranked.targets.end))
    chosen = choose(of_few, np.arange(PEOPLE) + 3, seed=3)
    assert Counter(user[chosen].tolist()) == {0: 1, 1: 1, 2: 1}


def test_fewer_are_shown_where_there_are_fewer(tmp_path: Path) -> None:
    ranked = rank()
    assert len(choose(replace(ranked, held=np.zeros(PEOPLE, bool)), np.arange(PEOPLE) + 3, 0)) == EACH


# The page


def test_the_page_is_sound(page: Page) -> None:
    assert page.open == [] and page.wrong == []
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert str(link["href"]).removeprefix("#") in ids
    assert page.all("script") == [] and page.all("iframe") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_needs_nothing_from_outside(html: str, page: Page) -> None:
    assert "http" not in html.lower()
    assert "@import" not in html and "<link rel=stylesheet" not in html
    pictures = page.all("img")
    assert pictures and all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in pictures)
    assert not re.search(r"url\((?!#)", html)
    assert len(html.encode()) < 3_000_000


def test_everything_can_be_heard(page: Page) -> None:
    assert all(image["alt"] for image in page.all("img"))
    plots = [svg for svg in page.all("svg") if svg["role"] == "img" and svg["aria-label"]]
    assert len(plots) == len(page.all("svg")) == 6
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def test_thumbnails_are_small(page: Page) -> None:
    for image in page.all("img"):
        data = base64.b64decode(str(image["src"]).partition(",")[2])
        assert max(Image.open(io.BytesIO(data)).size) <= 96


def test_what_data_say_is_text(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain")
    nasty = {n: f"a < b & \"hat\" '{{{{ 7 * 7 }}}}' {n}" for n in range(1, 20)} | {0: ""}
    hostile = make_run(tmp_path / "hostile", nasty, suffix=HOSTILE)
    hostile.result["conditions"]["data"] = hostile.result["conditions"]["model"] = "<img src=x onerror=y>|`*\n# b"
    htmls = [run.write() for run in (plain, hostile)]
    pages = [Page(html) for html in htmls]
    assert [tag for tag, _ in pages[0].tags] == [tag for tag, _ in pages[1].tags]
    assert pages[1].wrong == [] and pages[1].open == []
    assert "<script" not in htmls[1] and "&lt;script&gt;alert(1)" in htmls[1]
    text = pages[1].text
    assert any(person(n) + HOSTILE in text for n in range(6))
    assert f"i0{HOSTILE}" in text, "an item without a title is called by its id"
    assert "a < b & \"hat\" '{{ 7 * 7 }}' 5" in text
    assert any(image["alt"] == "a < b & \"hat\" '{{ 7 * 7 }}' 5" for image in pages[1].all("img"))
    assert "<img src=x onerror=y>|`* # b" in text
    cards = [(run.folder / "MODEL_CARD.md").read_text(encoding="utf-8") for run in (plain, hostile)]
    assert len(cards[0].splitlines()) == len(cards[1].splitlines())
    assert "<img" not in cards[1] and "&lt;img src=x onerror=y&gt;\\|\\`\\* # b" in cards[1]


def test_long_titles_are_cut(html: str) -> None:
    assert "long " * 15 in html and "long " * 20 not in html


def test_the_page_says_what_was_run_and_how_it_went(page: Page, run: Run) -> None:
    text = page.text
    of = run.result["systems"][OURS]["NDCG@10"]
    for said in (
        "leave-last-out: each person's last event",
        "file order: events at the same time",
        "Candidates the model reranks 12",
        "Model embedded",
        "Seed 0",
        "Version mllm-srec 0.1.0",
        "Items in the catalogue 20",
        "fusion: odds 0.25",
        f"NDCG@10 of MLLM-SRec: {of['mean']:.3f} [{of['low']:.3f}, {of['high']:.3f}] ; of retrieval alone: 0.667",
        f"Difference −{-of['gain']:.3f} [−{-of['gain_low']:.3f}, −{-of['gain_high']:.3f}]",
        "MLLM-SRec is worse than retrieval on these targets",
        "Of 12 targets, 4 are lost in retrieval: they are not among the 12 candidates",
        "which occur in no event that could be seen: 1)",
        "Of the 8 that are retrieved, 2 are lost in ranking",
        "retrieval alone has 8 targets among its first 10",
        "so the base rate is 0.083",
        "96 candidates of the 8 lists that hold their target",
        "history length medium (3 < events <= 3) 0 0 no targets",
    ):
        assert said in text, said


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ((0.1, 0.2, 0.3), "MLLM-SRec is better than retrieval"),
        ((-0.3, -0.2, -0.1), "MLLM-SRec is worse than retrieval"),
        ((-0.1, 0.1, 0.3), "the interval holds 0, so these targets do not tell the two apart"),
        ((-0.3, -0.1, 0.1), "the interval holds 0, so these targets do not tell the two apart"),
    ],
)
def test_the_headline_claims_what_the_interval_allows(
    tmp_path: Path, gain: tuple[float, float, float], said: str
) -> None:
    run = make_run(tmp_path)
    names = ("gain_low", "gain", "gain_high")
    run.result["systems"][OURS]["NDCG@10"] |= dict(zip(names, gain, strict=True)) | {"p": 0.0004}
    text = Page(run.write()).text
    assert f"p < 0.001 : {said}" in text


# People


def test_what_became_of_each_target(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    ranked = run.ranked
    said = {
        2: f"{person(2)} found MLLM-SRec has the next item at place 3, retrieval alone at place 1.",
        6: "lost in ranking The next item is among the 12 candidates (retrieval alone: place 1), but MLLM-SRec has it "
        "at place 11, behind the first 10.",
        9: "lost in retrieval The next item is not among the 12 candidates: retrieval has it at place 16.",
        11: "(a cold item)",
    }
    for number, words in said.items():
        alone = np.array([number])
        run.ranked = replace(
            ranked,
            targets=ranked.targets.take(alone),
            items=ranked.items[alone],
            retrieval=ranked.retrieval[alone],
            held=ranked.held[alone],
            fused=ranked.fused[alone],
            odds=ranked.odds[alone] if number < HELD else ranked.odds[:0],
            places={name: Places(of.greater[alone], of.ties[alone]) for name, of in ranked.places.items()},
        )
        html = run.write()
        assert words in article(html, number)
        assert len(re.findall("<article", html)) == 1
        read = number < HELD
        assert ("Log-odds" in article(html, number)) == read
        assert ("in the order of retrieval: the model did not read it" in article(html, number)) != read
        assert ("No list holds its target" in html) != read


def test_an_item_chosen_again_is_said_to_be_masked(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    last_visible = run.ranked.targets.position - (np.arange(PEOPLE) >= HELD)
    run.ranked = replace(run.ranked, targets=replace(run.ranked.targets, position=last_visible))
    html = run.write()
    shown = [number for number in range(HELD, PEOPLE) if f">{person(number)} <" in html]
    assert len(shown) >= 3
    assert all("what was chosen before is not recommended again" in article(html, number) for number in shown)


def test_a_person_is_told_in_full(html: str) -> None:
    number = max(number for number in range(6) if f">{person(number)} <" in html)
    text = article(html, number)
    assert "Newest 3 of 3 events, oldest first, then the item chosen next" in text
    assert "2023-11-15" in text and "2023-11-18" in text
    assert "Window of events 1 to 2 (2023-11-15 to 2023-11-16)" in text
    assert "Window of events 3 to 3 (2023-11-17)" in text
    assert "Profile, slow" in text and "Preference, now" in text
    assert text.count("(composed from evidence)") == 3
    assert text.count("chosen next") == 3  # heading, strip, list
    rows = html.split(f">{person(number)} <")[1].split("</article>")[0].split("<tbody>")[1]
    listed = [Page(row).text for row in rows.split("</tr>")[:10]]
    places = ["chosen next" in row for row in listed]
    assert places.index(True) == number and sum(places) == 1
    for place, row in enumerate(listed, start=1):
        odds = f"{(number - place) / 4:+.3f}".replace("-", "−").replace("+0.000", "0.000")
        assert re.search(rf"^{place} .* −{place}\.000 \d\.\d\d\d {re.escape(odds)}( |$)", row), row


def test_pictures_that_are_not_there_are_named(tmp_path: Path) -> None:
    text = make_run(tmp_path).write()
    page = Page(text)
    named = Counter(str(tag.get("aria-label")) for tag in page.all("span") if tag.get("role") == "img")
    assert named["item 16 the title: no picture given"] > 0
    assert named["item 17 the title: picture file missing"] > 0
    assert named["item 18 the title: picture not a picture"] > 0
    assert all(re.match(r"item 1[678] ", name) for name in named)
    assert not any(re.match(r"item 1[678] ", str(image["alt"])) for image in page.all("img"))


def test_a_stored_picture_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)

    def refuse(data: bytes, side: int) -> None:
        raise PictureError("damaged", "cannot be decoded")

    monkeypatch.setattr(report_users, "open_picture", refuse)
    page = Page(run.write())
    assert page.all("img") == [] and "picture damaged" in page.text


@pytest.mark.parametrize("kind", ["count", "session"])
@pytest.mark.parametrize(("size", "step"), [(1, 1), (4, 4), (6, 3), (5, 2), (3, 1)])
def test_a_window_was_the_newest_one_when_it_was_closed(kind: str, size: int, step: int) -> None:
    """So that the state after its last event brings its text."""
    config = UsersConfig.model_validate({"windows": kind, "window": size, "step": step})
    time = np.cumsum(np.random.default_rng(size).integers(1, 3 * DAY, 40))
    for end in range(1, 41):
        for start, stop in window_bounds(end, time, config):
            assert window_bounds(stop, time, config)[-1] == (start, stop)


def test_windows_are_written_without_the_adapter_and_reasons_with_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.write()
    assert run.mllm.taken_off == 1
    assert set(run.mllm.words) == {"fake-1", "fake-1:adapter"}
    assert run.mllm.words.index("fake-1:adapter") > 0


def test_a_model_that_fails_costs_the_reasons_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)

    def fail(*_: Any) -> Any:
        raise PartialFailure([None], {0: "the server is gone"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.mllm, "ask", fail)
        assert "composed from evidence" not in run.write()
    assert set(run.workspace.rows(REASONS)["status"]) == {"error"}
    assert "composed from evidence" in run.write()


def test_a_second_report_is_the_same_and_asks_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, training_rows=8)
    first, card = run.write(), (run.folder / "MODEL_CARD.md").read_bytes()
    calls = run.mllm.calls()
    assert calls > 0
    assert run.write() == first and (run.folder / "MODEL_CARD.md").read_bytes() == card
    assert run.mllm.calls() == calls
    run.mllm.identity = "fake-2:adapter"  # another adapter gives other reasons
    run.write()
    assert run.mllm.calls() > calls


def test_two_workspaces_of_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    assert make_run(tmp_path / "a").write() == make_run(tmp_path / "b").write()


# Curves


def test_curves_are_drawn_where_they_were_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, training_rows=8)
    assert "8 rows; the losses were not kept." in Page(run.write()).text
    adapter = run.folder / "adapter"
    adapter.mkdir()
    (adapter / "losses.json").write_text(json.dumps([{"step": n + 1, "loss": 2 / (n + 1)} for n in range(900)]))
    run.result["choices"]["retriever_epochs"] = [[1, 0.1], [2, 0.15], [3, 0.12]]
    page = Page(run.write())
    labels = {str(svg["aria-label"]) for svg in page.all("svg")}
    assert {"Loss of the fine-tuning by step", "Retriever: NDCG@10 on validation by epoch"} <= labels
    assert "not kept" not in page.text and "retriever epochs" not in page.text


def test_without_fine_tuning_an_old_curve_is_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.folder / "adapter").mkdir()
    (run.folder / "adapter" / "losses.json").write_text('[{"step": 1, "loss": 2}]')
    text = Page(run.write()).text
    assert "The model was not fine-tuned." in text and "Not fine-tuned" in (run.folder / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("damaged", ["{", "[1]", '[{"step": 1}]', '[{"step": 1, "loss": null}]'])
def test_a_damaged_curve_is_refused_by_name(tmp_path: Path, damaged: str) -> None:
    run = make_run(tmp_path, training_rows=8)
    (run.folder / "adapter").mkdir()
    (run.folder / "adapter" / "losses.json").write_text(damaged)
    with pytest.raises(StoreError, match=r"losses\.json is damaged"):
        run.write()


# The model card


def test_the_card_says_what_the_run_knows(run: Run, tmp_path: Path) -> None:
    card = (run.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    of = run.result["systems"][OURS]["NDCG@10"]
    assert f"| {OURS} |" in card and f"{of['mean']:.3f} [{of['low']:.3f}, {of['high']:.3f}]" in card
    for said in (
        "33.3 % of the test targets are not among the 12 candidates",
        "- item, cold (n = 1): NDCG@10 0.000",
        "Recommender(Workspace.open(",
        "identity fake-1:adapter",
        "have licences of their own",
    ):
        assert said in card, said
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 and len({line.count("|") for line in rows}) == 1
    trained = make_run(tmp_path, training_rows=8)
    trained.write()
    card = (trained.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "on 8 rows of the data set shop" in card and "Not fine-tuned" not in card


def test_readable_cuts_lines_and_controls() -> None:
    assert readable("a\n\tb\x00\x1b c", 20) == "a b c"
    assert readable("x" * 10, 10) == "x" * 10
    assert readable("x" * 11, 10) == "x" * 9 + "…"
