"""The report of a run for somebody who was not there, and its model card: one page without scripts, one Markdown file.

All figures come from metrics.json and from what the run knows of its test targets; nothing is chosen or measured anew.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mllm_srec import metrics
from mllm_srec.calibration import brier, equal_bins, expected_error, sigmoid
from mllm_srec.catalogue import Catalogue
from mllm_srec.data.dataset import Histories
from mllm_srec.data.split import Split
from mllm_srec.errors import StoreError
from mllm_srec.evaluation import plots
from mllm_srec.evaluation.plots import Bin, Estimate, Stage
from mllm_srec.evaluation.protocol import target_items
from mllm_srec.evaluation.report_users import LISTED, Neighbours, Ranked, examples, readable
from mllm_srec.evaluation.slices import cold_items
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.remote import RemoteMllm
from mllm_srec.recommender import ADAPTER, RUN
from mllm_srec.tuning import LOSSES
from mllm_srec.workspace import Workspace, atomic_write

__all__ = ["Ranked", "Reliability", "calibrate", "funnel", "write_report"]

REPORT, CARD = "report.html", "MODEL_CARD.md"
BINS = 10
CURVE_POINTS = 500
"""Points of a training curve at most; longer ones are averaged over neighbours."""

WORDS = {
    "leave_last_out": "leave-last-out: each person's last event is the test target, the one before it validation; "
    "other people's later events may be seen",
    "global_time": "global time split: the newest tenth of all events is the test, the tenth before it validation; "
    "nothing after a cut is seen",
    "file_order": "file order: events at the same time count as ordered as the file has them",
    "strict": "strict: only events at an earlier time are visible to a target",
    "first": "first: only a person's first event with an item counts",
    "keep": "keep: every repeat counts",
}
"""What the words of metrics.json mean."""

ABOUT = {
    "data": "Data",
    "users": "People with a test target",
    "targets": "Test targets",
    "items": "Items in the catalogue",
    "protocol": "Protocol",
    "tie_rule": "Ties in time",
    "repeats": "Repeats",
    "repeats_dropped": "Repeats dropped",
    "min_history": "Events a person needs",
    "users_too_short": "People with too few events",
    "targets_without_history": "Targets without visible history",
    "catalogue": "What competes",
    "ties": "Ties in scores",
    "reranked": "Candidates the model reranks",
    "intervals": "Intervals",
    "model": "Model",
    "seed": "Seed",
}
"""Conditions in the order of the report; those that are not named here follow as they are."""

CHANGES = {
    "pictures_missing": (
        "What pictures showed left out of the items' texts",
        "Below 0: the lists use what the pictures showed; 0: they hang on the texts alone.",
    ),
    "pictures_swapped": (
        "What pictures showed exchanged between items",
        "Below 0: it matters whose picture it is.",
    ),
    "history_shuffled": (
        "History in random order",
        "Below 0: the order of the choices is used; 0: only what was chosen counts, not when.",
    ),
    "preference_of_another": (
        "Profile and preference of another person",
        "Below 0: what is said of a person is used beyond the newest choices.",
    ),
}
"""Honesty checks that change one thing: name, and how to read the difference that this makes."""


@dataclass(frozen=True)
class Checked:
    """One row of the honesty checks, in words."""

    check: str
    figure: str
    interval: str
    reading: str


@dataclass(frozen=True)
class Reliability:
    """How far sigmoid(odds) is the chance of being the target, over all candidates of the lists that were read.

    ece: expected calibration error, the mean distance of predicted and observed over equal-count bins. brier: mean
    squared error; base_brier: that of saying the base rate each time.
    """

    bins: tuple[Bin, ...]
    count: int
    base_rate: float
    predicted: float
    ece: float
    brier: float
    base_brier: float


def calibrate(odds: np.ndarray, is_target: np.ndarray, bins: int = BINS) -> Reliability | None:
    """Bins of about equal count, from the lowest odds to the highest; fewer bins where there are fewer values.

    Args:
        odds: any shape, log-odds.
        is_target: bool, the same shape.

    Returns:
        None without values.

    Raises:
        ValueError: the shapes differ.
    """
    if odds.shape != is_target.shape:
        raise ValueError(f"odds have shape {odds.shape}, is_target {is_target.shape}")
    if odds.size == 0:
        return None
    stated, rate = sigmoid(odds), float(is_target.mean())
    return Reliability(
        bins=tuple(Bin(*of) for of in equal_bins(stated, is_target, bins)),
        count=stated.size,
        base_rate=rate,
        predicted=float(stated.mean()),
        ece=expected_error(stated, is_target, bins),
        brier=brier(stated, is_target),
        base_brier=rate * (1 - rate),
    )


def funnel(ranked: Ranked, cold: np.ndarray, system: str) -> tuple[Stage, ...]:
    """Targets left after each stage: all, those among the candidates, those in the first ten after reranking.

    Args:
        cold: bool (T,), the target's item stands in no event that models may have seen.
        system: the reranked one in `ranked.places`.
    """
    places = ranked.places[system]
    listed = metrics.recall(places.greater, places.ties, LISTED)
    held = ranked.held.astype(np.float64)
    stages = (
        ("test targets", np.ones(len(held))),
        ("retrieved", held),
        (f"in the first {LISTED}", np.minimum(listed, held)),
    )
    return tuple(Stage(name, float(left.sum()), float(left[cold].sum())) for name, left in stages)


def honesty(found: dict[str, Any]) -> tuple[Checked, ...]:
    """What `honesty.measure` found, row by row; none where it found nothing."""
    if not found:
        return ()
    prior, order = found["label_prior"], found["order_shuffled"]
    verdict = "more than rounding: the order decides" if order["moved"] else "rounding"
    rows = [
        Checked(
            "An empty item for an empty person",
            f"log-odds {_signed(prior['empty'])}",
            f"(in the lists {_signed(prior['mean'])}, standard deviation {_figure(prior['deviation'])})",
            f"Before it reads anything the model says Yes with {_figure(prior['chance'])}; odds are for comparing "
            "candidates, not for taking at their word.",
        ),
        Checked(
            "Candidates in another order",
            f"largest change of a score {order['largest']:.2g}",
            f"(difference {_signed(order['gain'])} {_between(order, 'gain_')})",
            f"No score may move by more than {order['rounding']:.2g}, which is rounding; this is {verdict}.",
        ),
    ]
    for key, (name, reading) in CHANGES.items():
        of = found[key]
        if "left_out" in of:
            rows.append(Checked(name, "not checked", "", f"{of['left_out'].capitalize()}."))
            continue
        changed = f"Prompts that changed: {of['lists_changed']} of {found['lists']}."
        note = f" {of['note'].capitalize()}." if "note" in of else ""
        interval = f"{_between(of, 'gain_')} {_p(of['p'])}"
        rows.append(Checked(name, f"difference {_signed(of['gain'])}", interval, f"{reading} {changed}{note}"))
    for key, of in found["popularity"].items():
        name, known = f"Popularity and {key}", "left_out" not in of
        figure = f"rank correlation {_signed(of['mean'])}" if known else "not checked"
        reading = (
            f"1: popular items stand first; 0: popularity says nothing. Lists: {of['lists']}."
            if known
            else f"{of['left_out'].capitalize()}."
        )
        rows.append(Checked(name, figure, _between(of) if known else "", reading))
    return tuple(rows)


def write_report(
    workspace: Workspace,
    mllm: LocalMllm | RemoteMllm,
    histories: Histories,
    split: Split,
    catalogue: Catalogue,
    result: dict[str, Any],
    ranked: Ranked,
    retriever: Neighbours,
) -> Path:
    """Write report.html and MODEL_CARD.md beside metrics.json; the same run gives the same bytes.

    Texts of the users shown are stored and reused, so a second report asks the model nothing.

    Args:
        mllm: as it ranked, with its adapter.
        result: what metrics.json holds.
        ranked: its test targets, in its order.
        retriever: as it made the candidates.

    Returns:
        The report's path.

    Raises:
        StoreError: the folder or the store cannot be written, or the file of the training's losses is damaged.
    """
    folder = workspace.run(RUN)
    ours, reference = str(result["slices"]["system"]), str(result["reference"])
    wanted = target_items(histories, ranked.targets)
    inside = ranked.items[ranked.held] == wanted[ranked.held][:, None]
    stages = funnel(ranked, cold_items(histories, split.seen_test, ranked.targets).of == 0, ours)
    losses = _losses(folder / ADAPTER / LOSSES) if result["training_rows"] else None
    facts: dict[str, Any] = {
        "result": result,
        "ours": ours,
        "reference": reference,
        "headline": _headline(result, ours, reference),
        "conditions": _conditions(result),
        "choices": _flat({k: v for k, v in result["choices"].items() if k != "retriever_epochs"}),
        "metrics": list(result["systems"][ours]),
        "cuts": {cut: rows for cut, rows in result["slices"].items() if isinstance(rows, dict)},
        "stages": stages,
        "retrieval_listed": funnel(ranked, np.zeros(len(ranked.held), bool), reference)[-1].targets,
        "calibration": calibrate(ranked.odds, inside),
        "lists_read": int(ranked.held.sum()),
        "candidates": ranked.items.shape[1],
        "listed": LISTED,
        "losses": losses,
        "epochs": result["choices"].get("retriever_epochs"),
        "honesty": honesty(result.get("honesty") or {}),
        "robustness": result.get("robustness") or {},
        "config": workspace.config,
        "identity": mllm.identity,
    }
    page = _environment().get_template("report.html.j2")
    people = examples(workspace, mllm, catalogue, histories, split, ranked, (ours, reference), retriever)
    atomic_write(folder / CARD, _environment().get_template("model_card.md.j2").render(facts))
    atomic_write(folder / REPORT, page.render(facts | _plots(facts) | {"people": people}))
    return folder / REPORT


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mllm_srec.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"count": _count, "figure": _figure, "signed": _signed, "p": _p, "plain": _plain}
    return environment


def _count(value: float) -> str:
    """With one digit behind the point where ties leave a fraction."""
    return f"{value:,.0f}" if abs(value - round(value)) < 1e-9 else f"{value:,.1f}"


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    return text.replace("-", "−") if float(text) else "0.000"


def _between(row: dict[str, Any], prefix: str = "") -> str:
    return f"[{_signed(row[f'{prefix}low'])}, {_signed(row[f'{prefix}high'])}]"


def _p(value: float) -> str:
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def _plain(text: object) -> Markup:
    """A text in Markdown that means nothing but itself."""
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", readable(str(text), 300))
    return Markup(escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _headline(result: dict[str, Any], ours: str, reference: str) -> dict[str, Any]:
    """The first metric to look at, of both systems, and what the difference says."""
    row = result["systems"][ours]
    metric = result["slices"]["metric"] if result["slices"]["metric"] in row else next(iter(row))
    of = row[metric]
    if of["gain_low"] > 0:
        verdict = f"{ours} is better than {reference} on these targets"
    elif of["gain_high"] < 0:
        verdict = f"{ours} is worse than {reference} on these targets"
    else:
        verdict = "the interval holds 0, so these targets do not tell the two apart"
    return {"metric": metric, "of": of, "against": result["systems"][reference][metric], "verdict": verdict}


def _conditions(result: dict[str, Any]) -> list[tuple[str, str]]:
    conditions = {key: result["conditions"][key] for key in ABOUT if key in result["conditions"]}
    conditions |= result["conditions"]
    rows = [(ABOUT.get(key, key.replace("_", " ")), _worded(value)) for key, value in conditions.items()]
    trained = f"{result['training_rows']:,} rows" if result["training_rows"] else "none"
    return [*rows, ("Fine-tuning", trained), ("Version", f"mllm-srec {result['version']}")]


def _worded(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return WORDS.get(str(value), readable(str(value), 300))


def _flat(values: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{above}{key.replace('_', ' ')}"
        rows += _flat(value, f"{name}: ") if isinstance(value, dict) else [(name, readable(str(value), 300))]
    return rows


def _losses(path: Path) -> list[tuple[float, float]] | None:
    """(step, loss) as the training kept them; None where it kept none."""
    try:
        rows = [(float(row["step"]), float(row["loss"])) for row in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}): run `mllm-srec train WS` again") from error
    return rows or None


def _plots(facts: dict[str, Any]) -> dict[str, Any]:
    result, ours, reference, head = facts["result"], facts["ours"], facts["reference"], facts["headline"]
    metric, names = head["metric"], (ours, reference)
    systems = [
        Estimate(name, of[metric]["mean"], of[metric]["low"], of[metric]["high"])
        for name, of in result["systems"].items()
    ]
    sliced = [(cut, name, row) for cut, rows in facts["cuts"].items() for name, row in rows.items() if row["n"]]
    of_slice = [
        Estimate(f"{name}, n = {row['n']}", row["mean"], row["low"], row["high"], row["mean"] - row["gain"], cut)
        for cut, name, row in sliced
    ]
    differences = [
        Estimate(f"{name}, n = {row['n']}", row["gain"], row["gain_low"], row["gain_high"], group=cut)
        for cut, name, row in sliced
    ]
    at = result["slices"]["metric"]
    made: dict[str, Any] = {
        "systems_plot": plots.intervals(systems, metric, names, f"{metric} of every system with its interval"),
        "slices_plot": plots.intervals(of_slice, at, names, f"{at} of {ours} and {reference} by slice of the targets"),
        "gains_plot": plots.gains(differences, f"gain in {at}", f"Gain of {ours} over {reference} by slice"),
        "funnel_plot": plots.funnel(facts["stages"], "Test targets that are left after each stage"),
        "reliability_plot": None,
        "shares_plot": None,
        "losses_plot": None,
        "epochs_plot": None,
    }
    if found := facts["calibration"]:
        made["reliability_plot"] = plots.reliability(
            found.bins, found.base_rate, "Reliability diagram: share of targets against the probability that odds state"
        )
        made["shares_plot"] = plots.shares(found.bins, found.base_rate, "Share of targets by bin of the odds")
    if facts["losses"]:
        x, y = _thinned(facts["losses"])
        made["losses_plot"] = plots.curve(x, y, ("optimiser step", "loss"), "Loss of the fine-tuning by step")
    if facts["epochs"]:
        x, y = (list(map(float, column)) for column in zip(*facts["epochs"], strict=True))
        made["epochs_plot"] = plots.curve(
            x, y, ("epoch", f"validation {at}"), f"Retriever: {at} on validation by epoch"
        )
    return made


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    parts = np.array_split(np.asarray(points, np.float64), min(len(points), CURVE_POINTS))
    return [float(part[:, 0].mean()) for part in parts], [float(part[:, 1].mean()) for part in parts]
