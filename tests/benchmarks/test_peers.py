"""What passes between our environment and the peers', how systems are chosen, and the table, without RecTools."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mllm_srec.data.dataset import Dataset
from mllm_srec.data.split import global_time, leave_last_out
from mllm_srec.evaluation import protocol
from mllm_srec.retrieval import CoOccurrence, Likeness, Mix, Retriever, sequence

sys.path += [str(Path(__file__).parents[2] / "benchmarks" / folder) for folder in ("", "peers")]

import choosing
import exchange
import ours
import run
from choosing import Scorer, Settings, System
from exchange import TIE_RULES, Asked, Part

ITEMS = "abcdef"


def dataset(**users: str) -> Dataset:
    """user -> "item time" pairs, in the file's order."""
    rows = [
        (user, events[at], int(events[at + 1])) for user, events in users.items() for at in range(0, len(events), 2)
    ]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    items = pl.DataFrame({"item_id": list(ITEMS)})
    return Dataset.build("shop", items, log, has_time=True, root=None)


# Events d of u and of its neighbour c share a time; w is too short for targets.
SHOP = dataset(u="a1b2c3d3", v="e1a5b6", w="a1b2")


def parts_of(data: Dataset) -> dict[str, Part]:
    histories = data.histories()
    return run.exported(histories, {rule: leave_last_out(histories, rule, 3) for rule in TIE_RULES})


def asked(targets: list[int], histories: list[list[int]], users: list[int] | None = None) -> Asked:
    return Asked(
        user=np.array(users or range(len(targets)), dtype=np.int64),
        target=np.array(targets, dtype=np.int32),
        now=np.full(len(targets), 99, dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64),
        history=np.array([item for history in histories for item in history], dtype=np.int32),
        time=np.array([at for history in histories for at in range(len(history))], dtype=np.int64),
    )


def shown(of: Asked) -> list[tuple[int, list[int], int]]:
    """Per target: user, what is visible, the item."""
    histories = [history.tolist() for history in of.histories(0, len(of))]
    return list(zip(of.user.tolist(), histories, of.target.tolist(), strict=True))


# Between the environments


def test_a_split_is_exported_by_hand() -> None:
    parts = parts_of(SHOP)
    validation, test = parts["validation"], parts["test"]
    assert validation.items == test.items == 6
    assert validation.seen_user.tolist() == [0, 0, 1, 2, 2]
    assert validation.seen_item.tolist() == [0, 1, 4, 0, 1]
    assert test.seen_user.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert test.seen_item.tolist() == [0, 1, 2, 4, 0, 0, 1]
    for rule in TIE_RULES:
        assert shown(validation.asked[rule]) == [(0, [0, 1], 2), (1, [4], 0)]
    assert shown(test.asked["file_order"]) == [(0, [0, 1, 2], 3), (1, [4, 0], 1)]
    assert shown(test.asked["strict"]) == [(0, [0, 1], 3), (1, [4, 0], 1)]
    assert test.seen_time.tolist() == [1, 2, 3, 1, 5, 1, 2]
    assert [times.tolist() for times in test.asked["strict"].times(0, 9)] == [[1, 2], [1, 5]]
    assert test.asked["strict"].now.tolist() == [3, 6]


def test_splits_that_let_different_events_be_seen_are_not_exported_together() -> None:
    histories = dataset(u="a0b1c2d3e4f5a6b7c8d9", v="a0b1c2").histories()
    splits = {"file_order": leave_last_out(histories, "file_order", 3), "strict": global_time(histories, "strict", 3)}
    with pytest.raises(ValueError, match="different events before the validation"):
        run.exported(histories, splits)


def test_a_part_is_read_as_it_was_written(tmp_path: Path) -> None:
    part = parts_of(SHOP)["test"]
    part.write(tmp_path / "new" / "test.npz")
    again = Part.read(tmp_path / "new" / "test.npz")
    assert again.items == part.items and list(again.asked) == list(part.asked)
    for name, array in part.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
        assert again.arrays()[name].dtype == array.dtype
    assert again.mark() == part.mark()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["test.npz"]


def test_another_event_target_or_catalogue_is_another_part() -> None:
    part = parts_of(SHOP)["test"]
    one = part.asked["strict"]
    others = [
        replace(part, items=7),
        replace(part, seen_item=part.seen_item[::-1].copy()),
        replace(part, seen_time=part.seen_time + 1),
        replace(part, asked={**part.asked, "strict": replace(one, target=one.target[::-1].copy())}),
        replace(part, asked={**part.asked, "strict": replace(one, now=one.now + 1)}),
        replace(part, asked={"strict": one}),
    ]
    assert len({part.mark(), *(other.mark() for other in others)}) == 7


def test_each_target_becomes_a_pseudo_user_of_the_known_items_it_sees() -> None:
    of = asked([3, 1, 5], [[0, 1, 2], [4, 0], [2]])
    known = np.array([True, True, False, True, True, True])
    user, item = of.pseudo_users(0, 99, known)
    assert (user.tolist(), item.tolist()) == ([0, 0, 1, 1], [0, 1, 4, 0])
    user, item = of.pseudo_users(1, 2, np.ones(6, dtype=bool))
    assert (user.tolist(), item.tolist()) == ([1, 1], [4, 0])
    assert [history.tolist() for history in of.histories(1, 99)] == [[4, 0], [2]]


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    def killed(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exchange.whole(tmp_path / "one.json", killed)
    assert list(tmp_path.iterdir()) == []
    exchange.write_json(tmp_path / "one.json", {"a": [1]})
    assert exchange.read_json(tmp_path / "one.json") == {"a": [1]}


def test_a_name_tells_what_it_is_made_of() -> None:
    name = exchange.named("content, last 5", "code", {"K": 1, "L": 2})
    assert name.startswith("content-last-5-") and "." not in name
    assert name == exchange.named("content, last 5", "code", {"L": 2, "K": 1})
    assert name != exchange.named("content, last 5", "code", {"K": 1, "L": 3})


# Choosing


class Fake:
    """Settings k give the target's item a score of 1 under the k-th tie rule and of -1 under others; 0 for the rest."""

    def __init__(self, grid: list[Settings], parts: dict[str, Part]) -> None:
        self.parts = parts
        self.fitted: list[tuple[str, Settings]] = []
        self.system = System(grid, self.fit, "fake")

    def fit(self, part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        self.fitted.append(("validation" if part is self.parts["validation"] else "test", settings))
        for k in settings["k"]:

            def scores(of: Asked, k: int = k) -> np.ndarray:
                rule = next(rule for rule, other in part.asked.items() if other is of)
                values = np.zeros((len(of), part.items), dtype=np.float32)
                values[np.arange(len(of)), of.target] = 1 if TIE_RULES[k] == rule else -1
                return values

            yield {"k": [k]}, scores


@pytest.mark.parametrize("grid", [[{"k": [0]}, {"k": [1]}], [{"k": [0, 1]}]])
def test_each_tie_rule_gets_what_its_own_validation_chose(grid: list[Settings], tmp_path: Path) -> None:
    parts = parts_of(SHOP)
    fake = Fake(grid, parts)
    found = choosing.choose_and_refit("fake", fake.system, parts, tmp_path)
    assert {rule: of["settings"] for rule, of in found.items()} == {"file_order": {"k": [0]}, "strict": {"k": [1]}}
    assert [of["validation"] for of in found.values()] == [1.0, 1.0]
    assert fake.fitted == [*(("validation", settings) for settings in grid), ("test", {"k": [0]}), ("test", {"k": [1]})]
    for rule, of in found.items():
        scores = np.load(tmp_path / of["file"])
        assert scores.shape == (2, 6) and scores[[0, 1], parts["test"].asked[rule].target].tolist() == [1, 1]
        assert of["seconds"] >= 0 and of["choosing_seconds"] >= 0

    again = Fake(grid, parts)
    assert choosing.choose_and_refit("fake", again.system, parts, tmp_path) == found
    assert again.fitted == []
    changed = Fake(grid, parts)
    other = System(grid, changed.fit, "another version")
    choosing.choose_and_refit("fake", other, parts, tmp_path)
    assert changed.fitted == fake.fitted


def test_one_refit_serves_both_tie_rules_and_equals_go_to_the_first(tmp_path: Path) -> None:
    parts = parts_of(SHOP)
    fitted: list[Settings] = []

    def fit(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        fitted.append(settings)
        yield settings, lambda of: np.zeros((len(of), part.items), dtype=np.float32)

    found = choosing.choose_and_refit("flat", System([{"x": 1}, {"x": 2}], fit, ""), parts, tmp_path)
    assert fitted == [{"x": 1}, {"x": 2}, {"x": 1}]
    assert [of["settings"] for of in found.values()] == [{"x": 1}] * 2
    # All tied: the mean of the gains of four and of five places, for histories of two items and of one.
    gains = [sum(1 / math.log2(1 + rank) for rank in range(1, n + 1)) / n for n in (4, 5)]
    assert found["strict"]["validation"] == pytest.approx(sum(gains) / 2)


def test_a_fit_is_given_up_when_it_gets_better_for_no_tie_rule(tmp_path: Path) -> None:
    parts = parts_of(SHOP)
    reached: list[int] = []

    def fit(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        for epochs in settings["epochs"]:
            reached.append(epochs)

            def scores(of: Asked, epochs: int = epochs) -> np.ndarray:
                values = np.zeros((len(of), part.items), dtype=np.float32)
                values[np.arange(len(of)), of.target] = {1: 0, 2: 1, 3: 1, 4: 1}[epochs]
                return values

            yield {"epochs": [epochs]}, scores

    found = choosing.choose_and_refit("late", System([{"epochs": [1, 2, 3, 4]}], fit, ""), parts, tmp_path)
    assert reached == [1, 2, 3, 2]
    assert {of["settings"]["epochs"][0] for of in found.values()} == {2}


def test_a_tie_rule_without_test_targets_has_no_scores(tmp_path: Path) -> None:
    parts = parts_of(SHOP)
    nobody = asked([], [])
    parts = {name: replace(of, asked={**of.asked, "strict": nobody}) for name, of in parts.items()}
    found = choosing.choose_and_refit("company", ours.systems(np.eye(6, dtype=np.float32))["mix"], parts, tmp_path)
    assert list(found) == ["file_order"]


def test_what_a_system_does_not_list_is_tied_behind_what_it_lists() -> None:
    nothing = -np.inf
    scores = np.array([[nothing, 0.5, nothing, nothing], [3, 2, 1, nothing]], dtype=np.float32)
    greater, ties = choosing.places(scores, asked([2, 2], [[0], [0]]))
    assert (greater.tolist(), ties.tolist()) == ([1, 1], [1, 0])


def test_settings_in_words() -> None:
    assert choosing.words({"factors": 64, "epochs": [60]}) == "factors 64, epochs 60"
    assert choosing.words({"epochs": [20, 60]}) == "epochs 20/60"
    assert choosing.words({}) == ""


# Our rows


def test_our_rows_are_those_of_retrieval_on_the_events_that_may_be_seen() -> None:
    data = dataset(u="a1b2c3d4e5", v="b1c2d3a4f5", w="c1a2e3b4", x="f1e2d3c4b5a6")
    histories = data.histories()
    split = leave_last_out(histories, "file_order", 3)
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(6, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    part = run.exported(histories, {"file_order": split})["test"]
    seen = protocol.histories_of(histories, split.test)
    company = CoOccurrence.fit(histories, split.seen_test).scores(seen)
    weights = [0.2, 0.4, 0.6, 0.8, 1.0]
    content = np.array(
        [
            sum(w * (vectors @ vectors[i]) ** 3 for w, i in zip(weights[-len(h[-5:]) :], h[-5:], strict=True))
            for h in seen
        ]
    )
    last = vectors[[history[-1] for history in seen]] @ vectors.T
    expected = {
        "co-occurrence": company,
        "content, last item": last,
        "content, last 5": content,
        "mix": company + 2 * content,
    }
    mix = Mix(1.0, 0.5, 2.0, 2)
    everything = np.ones(len(part.seen_item), dtype=bool)
    encoder = sequence.fit(ours.histories_of(part), everything, vectors, 2, 0)
    fitted = Retriever.fit(histories, split.seen_test, Likeness(vectors), mix, encoder)
    expected["retrieval (ours)"] = fitted.scores(seen)
    for name, system in ours.systems(vectors).items():
        settings = {"mix": {"weight": 2.0}, "retrieval (ours)": asdict(mix)}.get(name, {})
        ((_, scorer),) = system.fit(part, settings)
        np.testing.assert_allclose(scorer(part.asked["file_order"]), expected[name], rtol=1e-5, atol=1e-6)


def test_retrieval_is_chosen_by_each_tie_rule_and_refitted_with_that_choice(tmp_path: Path) -> None:
    data = dataset(u="a1b2c3d3e5", v="b1c2d3a3f5", w="c1a2e3b3", x="f1e2d3c3b5a5")
    parts = parts_of(data)
    vectors = np.eye(6, dtype=np.float32)
    system = replace(ours.systems(vectors)["retrieval (ours)"])
    chosen = choosing.choose_and_refit("retrieval", system, parts, tmp_path)
    for rule in TIE_RULES:
        assert set(chosen[rule]["settings"]) == {"content", "sequence", "trend", "epochs"}
        ((_, scorer),) = system.fit(parts["test"], chosen[rule]["settings"])
        np.testing.assert_array_equal(np.load(tmp_path / chosen[rule]["file"]), scorer(parts["test"].asked[rule]))


def test_our_rows_depend_on_the_vectors() -> None:
    one, other = (ours.systems(vectors)["mix"].made_of for vectors in (np.eye(6), np.eye(7)))
    assert one != other


# The table


def scored(folder: Path, of: Asked, **systems: list[list[float]]) -> dict[str, dict[str, object]]:
    """Files of scores with metrics that are written out here, as RecTools would write them."""
    found = {}
    for name, rows in systems.items():
        scores = np.array(rows, dtype=np.float32)
        exchange.write_array(folder / f"{name}.npy", scores)
        exchange.write_array(folder / f"{name}.rectools.npy", listed_metrics(scores, of))
        found[name] = {"file": f"{name}.npy", "settings": {"of": name}, "seconds": 1.0, "choosing_seconds": 2.0}
    return found


def listed_metrics(scores: np.ndarray, of: Asked) -> np.ndarray:
    values = np.zeros((2, len(of)))
    for at, (row, history) in enumerate(zip(scores, of.histories(0, len(of)), strict=True)):
        order = [item for item in np.argsort(-row, kind="stable").tolist() if item not in history.tolist()]
        rank = order.index(int(of.target[at])) + 1
        if rank <= 10:
            values[:, at] = 1 / math.log2(1 + rank), 1
    return values


def test_the_table_by_hand(tmp_path: Path) -> None:
    of = asked([1, 2, 3, 1], [[0]] * 4, users=[0, 0, 1, 2])
    first = [[9, 3, 2, 1], [9, 1, 3, 2], [9, 1, 2, 3], [9, 3, 2, 1]]
    second = [[9, 2, 3, 1], [9, 3, 2, 1], [9, 3, 1, 2], [9, 2, 3, 1]]
    systems = scored(tmp_path, of, second=second, first=first)
    rows = run.compared({"data": "shop", "protocol": "by hand", "tie_rule": "none"}, systems, of, tmp_path)
    assert [(row["system"], row["targets"], row["users"], row["untied"]) for row in rows] == [
        ("second", 4, 3, 4), ("first", 4, 3, 4),
    ]  # fmt: skip
    assert rows[1]["metrics"]["NDCG@10"]["value"] == 1 and rows[1]["p"] == dict.fromkeys(rows[1]["p"])
    assert rows[0]["metrics"]["NDCG@10"]["value"] == pytest.approx(1 / math.log2(3))
    assert rows[0]["p"]["NDCG@10"] == pytest.approx(2 / 1001) and rows[0]["p"]["Recall@10"] == 1
    assert {row["metrics"][f"Recall@{k}"]["value"] for row in rows for k in run.CUTOFFS} == {1}

    lines = run.markdown(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert {len(row) for row in cells} == {len(run.COLUMNS)}
    assert cells[2] == [
        "shop, by hand, none: 4 targets", "second", ".6309 [.6309, .6309]", "0.002", "1.0000 [1.0000, 1.0000]",
        "1.000", "1.0000", "1.0000", "1.0000", "of second", "1.0", "2",
    ]  # fmt: skip
    assert cells[3][:4] == ["", "first", "1.0000 [1.0000, 1.0000]", "best"]
    assert " 8 of 8 times" in lines[-1]


def test_metrics_that_disagree_are_an_error_unless_the_target_is_tied() -> None:
    greater, ties = np.array([0, 1, 4]), np.array([0, 0, 2])
    theirs = np.array([[1, 1 / math.log2(3), 0.5], [1, 1, 1]])
    assert run.agreement("one", theirs, greater, ties) == 2
    theirs[0, 1] += 1e-6
    with pytest.raises(ValueError, match=r"one: RecTools.* of target 1 .* so of 1 targets"):
        run.agreement("one", theirs, greater, ties)
    theirs[0, 1] = np.nan
    with pytest.raises(ValueError, match="of target 1"):
        run.agreement("one", theirs, greater, ties)


# The whole program


def test_the_first_users_keep_the_whole_catalogue() -> None:
    assert run.first_users(SHOP, 0) is SHOP
    few = run.first_users(SHOP, 2)
    assert few.histories().users == ["u", "v"] and len(few.histories().items) == 6
    assert few.histories().of(1).tolist() == SHOP.histories().of(1).tolist()


class Encoder:
    """A letter is a direction."""

    identity = "letters"
    texts: list[str] = []  # noqa: RUF012, all that any was asked for

    def encode(self, texts: list[str]) -> np.ndarray:
        self.texts.extend(texts)
        vectors = np.zeros((len(texts), 128), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            np.add.at(row, [ord(letter) for letter in text], 1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def peers_environment(program: str, folder: str, *arguments: str) -> None:
    """What the peers' programs would write, with a popularity of our own."""
    place = Path(folder)
    parts = choosing.read_parts(place)

    def popularity(part: Part, settings: Settings) -> Iterator[tuple[Settings, Scorer]]:
        counts = np.bincount(part.seen_item, minlength=part.items).astype(np.float32)
        yield settings, lambda of: np.repeat(counts[None], len(of), 0)

    if program == "rectools_models.py":
        assert arguments == ("--models", "popularity")
        found = choosing.choose_and_refit("popularity", System([{}], popularity, ""), parts, place)
        exchange.write_json(place / exchange.RESULTS, {"popularity": found})
        return
    assert program == "rectools_metrics.py" and arguments == ()
    for rule, files in exchange.read_json(place / exchange.SCORES).items():
        for name in files.values():
            values = listed_metrics(np.load(place / name), parts["test"].asked[rule])
            exchange.write_array(exchange.metrics_file(place / name), values)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """hm_sample: eight users of eight events each, two of them at each time."""
    folder = tmp_path / "data" / "hm_sample"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    lines = [
        f"{user},{item},{1_500_000_000 + 86400 * (at // 2 * 3 + user)}"
        for user in range(8)
        for at, item in enumerate(generator.permutation(12)[:8])
    ]
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(lines) + "\n")
    items = [f"{item},thing {chr(97 + item)},,kind" for item in range(12)]
    (folder / "items.csv").write_text("item_id,title,description,category\n" + "\n".join(items) + "\n")
    return folder.parent


def test_one_table_of_both_protocols_and_tie_rules_and_a_second_run_fits_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "call", peers_environment)
    monkeypatch.setattr(run, "TextEncoder", Encoder)
    monkeypatch.setattr(Encoder, "texts", [])
    given = ["--data", str(data), "--work", str(tmp_path / "work"), "--sets", "hm_sample", "--models", "popularity"]
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    run.main()
    out = capsys.readouterr().out
    lines = out.splitlines()
    blocks = [line.split("|")[1].strip() for line in lines if line.startswith("| hm_sample")]
    assert [block.partition(":")[0] for block in blocks] == [
        f"hm_sample, {of}, {rule}" for of in run.PROTOCOLS for rule in TIE_RULES
    ]
    assert blocks[0].endswith(": 8 targets")
    assert sum(line.startswith("|") for line in lines) == 2 + 4 * 6
    assert Encoder.texts[:2] == ["thing a. kind", "thing b. kind"] and len(Encoder.texts) == 12

    stored = json.loads((tmp_path / "work" / "table.json").read_text())
    assert len(stored["rows"]) == 24 and sum(row["p"]["NDCG@10"] is None for row in stored["rows"]) == 4
    row = next(row for row in stored["rows"] if row["system"] == "popularity")
    assert row["protocol"] == "leave_last_out" and row["targets"] == row["users"] == 8

    def refuse(*_: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(CoOccurrence, "fit", refuse)
    run.main()
    assert capsys.readouterr().out == out and len(Encoder.texts) == 12


@pytest.mark.parametrize(
    ("option", "value"), [("--sets", "books"), ("--protocols", "random"), ("--models", "EASE,oracle")]
)
def test_unknown_names_are_refused_with_the_known_ones(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", "nowhere", option, value])
    with pytest.raises(SystemExit):
        run.main()
    message = capsys.readouterr().err
    assert value.split(",")[-1] in message and "choose from" in message


def test_without_the_peers_environment_the_way_to_make_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PYTHON", tmp_path / "python")
    with pytest.raises(SystemExit, match="make peers"):
        run.call("rectools_models.py", "folder")
