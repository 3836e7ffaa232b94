"""Which adapter is kept, the choice among objectives, and the head start."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mllm_srec import pipeline, tuning
from mllm_srec.mllm.base import Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.pipeline import Pipeline
from mllm_srec.tuning import row_loss, train, validated
from mllm_srec.workspace import read_manifest
from pipeline_helpers import changed
from test_tuning import ADAPTER, RECORDS, RED, Interrupt, record, settings
from tiny_models import tiny_mllm

ASKED: list[Request] = [row.request for row in RECORDS]


class Planned:
    """A look that says the next of `values`, and the same again to the same weights, as a look does after a kill.

    A number is what each of two lists is worth, so that every difference is a clear one.
    """

    def __init__(self, *values: float | tuple[float, ...]) -> None:
        self._left = iter([list(value) if isinstance(value, tuple) else [value] * 2 for value in values])
        self._said: dict[str, list[float]] = {}
        self.scores: list[np.ndarray] = []
        """Of `ASKED`, at each look."""
        self.mllm = tiny_mllm()

    def __call__(self) -> list[float]:
        weights = {name: weight for name, weight in self.mllm.model.named_parameters() if "lora_" in name}
        assert weights
        digest = hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in weights.values())).hexdigest()
        if digest not in self._said:
            self._said[digest] = next(self._left)
        self.scores.append(np.concatenate(self.mllm.score(ASKED)))
        return self._said[digest]


def looks(folder: Path) -> list[tuple[int, float]]:
    return [(made["step"], made["loglik"]) for made in json.loads((folder / "looks.json").read_text())]


def steps(folder: Path) -> list[int]:
    return [made["step"] for made in json.loads((folder / "losses.json").read_text())]


# Which adapter is kept


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ((-9.0, -4.0, -2.0), 2),
        ((-9.0, -2.0, -3.0), 1),
        ((-2.0, -9.0, -1.0), 2),  # a worse one on the way ends nothing
        ((-1.0, -2.0, -2.0), 0),  # nothing is as good as what it began with
        ((-9.0, -2.0, -2.0), 2),  # of equal ones the latest
        ((-2.0, -2.0, -2.0), 2),
        # Of two lists one is read better and one worse: the difference is within two standard errors.
        (((-9.0, -9.0), (-1.0, -4.0), (-4.0, -1.5)), 2),
        # .1 +- 0 counts, .1 +- .1 does not; nor does .1 +- .058, which .17 +- .067 does.
        (((-2.0, -2.0), (-2.1, -2.1), (-2.1, -2.1)), 0),
        (((-2.0, -2.0), (-2.1, -2.1), (-2.0, -2.2)), 2),
        (((-2.0, -2.0, -2.0), (-9.0, -9.0, -9.0), (-2.0, -2.1, -2.2)), 2),
        (((-2.0, -2.0, -2.0), (-9.0, -9.0, -9.0), (-2.1, -2.1, -2.3)), 0),
        (((-2.0,), (-2.1,), (-2.2,)), 0),  # a single list
    ],
)
def test_the_training_ends_at_its_end_and_the_last_adapter_that_is_not_worse_is_kept(
    values: tuple[float | tuple[float, ...], ...], kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    look = Planned(*values)
    train(look.mllm, RECORDS, settings(), tmp_path, look=look)  # 12 steps: looks before it and behind 6 and 12
    means = [float(np.mean(value)) for value in values]
    assert looks(tmp_path) == list(zip((0, 6, 12), map(pytest.approx, means), strict=True))
    assert steps(tmp_path) == list(range(1, 13))
    np.testing.assert_allclose(np.concatenate(look.mllm.score(ASKED)), look.scores[kept], atol=1e-5)
    for at, scores in enumerate(look.scores):
        assert (np.abs(scores - look.scores[kept]).max() > 1e-3) == (at != kept)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(ADAPTER, "adapter_config.json"),
        *("losses.json", "looks.json", "manifest.json"),
    }
    facts = read_manifest(tmp_path)
    assert (facts["kept"]["step"], facts["kept"]["loglik"]) == looks(tmp_path)[kept]
    assert validated(tmp_path) == pytest.approx(means[kept])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "embedded"
    said = capsys.readouterr().err
    assert f"train: step 6 of 12: log-likelihood on validation {means[1]:.4f}" in said
    fresh = tiny_mllm()
    fresh.load_adapter(tmp_path)
    assert fresh.identity == look.mllm.identity
    np.testing.assert_array_equal(np.concatenate(fresh.score(ASKED)), np.concatenate(look.mllm.score(ASKED)))


@pytest.mark.parametrize(("rows", "at"), [(1, [0, 1]), (2, [0, 1, 2]), (3, [0, 2, 3]), (7, [0, 4, 7])])
def test_looks_are_evenly_spaced_and_the_last_one_is_at_the_end(rows: int, at: list[int], tmp_path: Path) -> None:
    look = Planned(0.0, 0.1, 0.2)
    train(look.mllm, (RECORDS * 3)[:rows], settings(epochs=1), tmp_path, look=look)
    assert [step for step, _ in looks(tmp_path)] == at


def test_without_a_look_the_last_adapter_is_kept(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    train(mllm, RECORDS, settings(), tmp_path / "plain")
    assert not (tmp_path / "plain" / "looks.json").exists()
    assert "kept" not in read_manifest(tmp_path / "plain")
    assert validated(tmp_path / "plain") == -math.inf
    look = Planned(0.0, 0.1, 0.2)
    train(look.mllm, RECORDS, settings(), tmp_path / "looked", look=look)  # looking changes nothing
    assert (tmp_path / "looked" / ADAPTER).read_bytes() == (tmp_path / "plain" / ADAPTER).read_bytes()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("values", "stop"),
    [
        ((0.0, 0.5, 0.4), 2),
        ((0.0, 0.5, 0.4), 7),  # behind a look, which the checkpoint before does not know
        ((0.0, 0.1, 0.2), 12),
        ((0.0, 0.1, 0.2), 9),
        ((0.5, 0.1, 0.2), 2),  # before the first checkpoint, and the look before the training is the best
    ],
)
def test_a_killed_training_ends_with_the_same_bytes_and_the_same_looks(
    values: tuple[float, ...], stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Planned(*values)
    train(look.mllm, RECORDS, settings(), tmp_path / "undisturbed", look=look)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "row_loss", Interrupt(stop))
        look.mllm = tiny_mllm()
        with pytest.raises(KeyboardInterrupt):
            train(look.mllm, RECORDS, settings(), tmp_path / "killed", look=look)
    look.mllm = tiny_mllm()
    train(look.mllm, RECORDS, settings(), tmp_path / "killed", look=look)
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("values", "save_steps"),
    [
        ((0.0, 0.5, 0.4), 1),
        ((0.0, 0.5, 0.4), 3),
        ((0.0, 0.1, 0.2), 100),
        ((0.5, 0.4, 0.3), 100),
    ],
)
def test_a_training_killed_when_it_had_ended_does_not_go_on(
    values: tuple[float, ...], save_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, look = settings(save_steps=save_steps), Planned(*values)
    train(look.mllm, RECORDS, config, tmp_path / "undisturbed", look=look)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_save", killed)
        look.mllm = tiny_mllm()
        with pytest.raises(KeyboardInterrupt):
            train(look.mllm, RECORDS, config, tmp_path / "killed", look=look)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    look.mllm = tiny_mllm()
    train(look.mllm, RECORDS, config, tmp_path / "killed", look=look)
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")


def test_looks_of_another_training_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Planned(0.0, 0.9, 0.1, 0.2)  # before the training the same weights say the same
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "row_loss", Interrupt(8))
        with pytest.raises(KeyboardInterrupt):
            train(look.mllm, RECORDS, settings(), tmp_path, look=look)
    look.mllm = tiny_mllm()
    train(look.mllm, RECORDS[::-1], settings(), tmp_path, look=look)
    assert looks(tmp_path) == [(0, 0.0), (6, 0.1), (12, 0.2)]


def test_a_look_during_checkpointed_training_reads_as_without(tmp_path: Path) -> None:
    scores = []
    for checkpointing in (False, True):
        look = Planned(0.0, 0.1, 0.2)
        config = settings(gradient_checkpointing=checkpointing)
        train(look.mllm, RECORDS, config, tmp_path / str(checkpointing), look=look)
        scores.append(look.scores)
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-4)


# Objectives


def planned(values: Iterable[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look of the pipeline says the next of `values`."""
    left = iter(values)
    monkeypatch.setattr(Pipeline, "_look", lambda run: lambda: [next(left)])


def test_of_several_objectives_the_best_on_validation_stays(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Six rows, two per step: a look before, and two.
    planned([0.1, 0.2, 0.3, 0.05, 0.1, 0.4, 0.2, 0.3, 0.4], monkeypatch)
    run = Pipeline(changed(copied, "training.objectives=[odds, sft, listwise]"))
    run.train()
    of = {name: copied / f"runs/main/adapter-{name}" for name in ("odds", "sft", "listwise")}
    assert {name: validated(folder) for name, folder in of.items()} == {"odds": 0.3, "sft": 0.4, "listwise": 0.4}
    assert {name: read_manifest(folder)["objective"] for name, folder in of.items()} == {name: name for name in of}
    assert len({(folder / ADAPTER).read_bytes() for folder in of.values()}) == 3
    assert content(copied / "runs/main/adapter") == content(of["sft"]), "of equal ones the first"
    assert "train: objective sft stays, the best on validation" in capsys.readouterr().err

    # What is trained is not trained again, and evaluation takes the one that stayed.
    monkeypatch.setattr(tuning, "row_loss", Interrupt(1, AssertionError))
    again = Pipeline(changed(copied, "training.objectives=[odds, sft, listwise]"))
    again.train()
    assert content(copied / "runs/main/adapter") == content(of["sft"])
    attach, attached = pipeline.attach_adapter, []

    def stop(*given: object) -> None:
        attached.append(given[1])
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "attach_adapter", stop)
    with pytest.raises(KeyboardInterrupt):
        again.evaluate()
    attach(again.mllm, attached[0], again.config)
    assert again.mllm.identity.endswith(read_manifest(of["sft"])["files"][ADAPTER]["sha256"][:16])


def test_where_validation_cannot_tell_the_first_objective_stays_and_it_is_said(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "_look", lambda run: None)
    Pipeline(changed(copied, "training.objectives=[likelihood, odds]")).train()
    assert content(copied / "runs/main/adapter") == content(copied / "runs/main/adapter-likelihood")
    told = "train: objective likelihood stays, no validation list holds its target: it is the first"
    assert told in capsys.readouterr().err


def test_a_look_is_the_best_fusion_over_validation_lists_that_hold_their_target(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pipeline(changed(copied, "retrieval.candidates=30"))
    run.comprehend()
    look = run._look()
    assert look is not None
    asked: list[Request] = []

    def says_nothing(mllm: LocalMllm, requests: list[Request]) -> list[np.ndarray]:
        asked.extend(requests)
        return [np.zeros((len(request.candidates), 2), np.float32) for request in requests]

    choosing = run.chosen.choosing
    lists = run._lists(choosing, run._retriever("validation"))
    texts = [run.catalogue.candidates[item] for item in pipeline.protocol.target_items(run.histories, choosing)]
    wanted = [text for text, held in zip(texts, lists.held, strict=True) if held]
    assert 0 < len(wanted) < len(texts)
    with monkeypatch.context() as patch:
        patch.setattr(LocalMllm, "score", says_nothing)
        value = look()
    assert len(asked) == len(wanted)
    of_lists = lists.items[lists.held]
    likelihoods = []
    for request, text, items, scores in zip(asked, wanted, of_lists, lists.scores[lists.held], strict=True):
        listed = [run.catalogue.candidates[item] for item in items]
        assert len(request.candidates) == min(pipeline.LOOKED_AMONG, 30)
        assert list(request.candidates) == [other for other in listed if other in request.candidates]
        shown = scores[[other in request.candidates for other in listed]]
        likelihoods.append(((shown - shown.mean()) / shown.std(), request.candidates.index(text)))
    # Readings that tell nothing leave retrieval: no weight of it makes the targets likelier by much.
    at_best = max(
        np.mean([weight * shown[place] - np.log(np.exp(weight * shown).sum()) for shown, place in likelihoods])
        for weight in np.linspace(0.0, 3.0, 301)
    )
    assert at_best - 0.05 < np.mean(value) <= at_best + 1e-4
    assert -math.log(pipeline.LOOKED_AMONG) <= np.mean(value) + 1e-9

    def knows(mllm: LocalMllm, requests: list[Request]) -> list[np.ndarray]:
        return [
            np.array([(float(other == text), 0.0) for other in request.candidates], np.float32)
            for request, text in zip(requests, wanted, strict=True)
        ]

    monkeypatch.setattr(LocalMllm, "score", knows)
    assert np.mean(look()) > np.mean(value)
    assert Pipeline(changed(copied, "retrieval.candidates=2"))._look() is None, "no list holds its target"


# The head start


@pytest.fixture
def head_start(tmp_path: Path) -> Path:
    """An adapter of the form that `settings` has, trained on other rows, in half precision as it is shipped."""
    train(tiny_mllm(), [record("wool"), record("cotton", "wool")], settings(), tmp_path / "first")
    folder = tmp_path / "head_start"
    folder.mkdir()
    save_file(
        {name: weight.bfloat16() for name, weight in load_file(tmp_path / "first" / ADAPTER).items()}, folder / ADAPTER
    )
    return folder


def begun_from(folder: Path | None) -> LocalMllm:
    mllm = tiny_mllm()
    mllm.head_start = folder
    return mllm


def test_training_begins_with_the_head_start(head_start: Path, tmp_path: Path) -> None:
    before = begun_from(None)
    before.attach_adapter(4, 2, 0)
    before.head_start = head_start
    before.take_head_start()
    expected = float(row_loss(before, RECORDS[0]).detach())
    one_row = settings(epochs=1)
    with_it, without, off = begun_from(head_start), begun_from(None), begun_from(head_start)
    train(with_it, RECORDS[:1], one_row, tmp_path / "with")
    train(without, RECORDS[:1], one_row, tmp_path / "without")
    train(off, RECORDS[:1], settings(epochs=1, head_start=False), tmp_path / "off")
    first = {name: json.loads((tmp_path / name / "losses.json").read_text())[0]["loss"] for name in ("with", "without")}
    assert first["with"] == pytest.approx(expected, abs=1e-5)
    assert first["without"] == pytest.approx(float(row_loss(tiny_mllm(), RECORDS[0])), abs=1e-5)
    assert abs(first["with"] - first["without"]) > 1e-2
    assert (tmp_path / "off" / ADAPTER).read_bytes() == (tmp_path / "without" / ADAPTER).read_bytes()
    assert {weight.dtype for weight in load_file(tmp_path / "with" / ADAPTER).values()} == {
        weight.dtype for weight in load_file(tmp_path / "without" / ADAPTER).values()
    }


def test_the_head_start_is_part_of_what_an_adapter_is_made_of(head_start: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({name: 2 * weight for name, weight in load_file(head_start / ADAPTER).items()}, other / ADAPTER)
    marks = [tuning.mark(begun_from(folder), RECORDS, settings()) for folder in (None, head_start, other)]
    assert len(set(marks)) == 3
    assert tuning.mark(begun_from(head_start), RECORDS, settings()) == marks[1]
    off = settings(head_start=False)
    assert tuning.mark(begun_from(head_start), RECORDS, off) == tuning.mark(begun_from(None), RECORDS, off)


@pytest.mark.parametrize("change", [{"rank": 2}, {"top_layers": 3}, {"top_layers": 1}])
def test_a_head_start_of_another_form_is_left_out_and_this_is_said(
    change: dict[str, int], head_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    train(begun_from(head_start), RECORDS[:1], settings(epochs=1, **change), tmp_path / "with")
    assert "train: without the head start, which is for rank 16 and the last 12 layers" in capsys.readouterr().err
    train(begun_from(None), RECORDS[:1], settings(epochs=1, **change), tmp_path / "without")
    assert (tmp_path / "with" / ADAPTER).read_bytes() == (tmp_path / "without" / ADAPTER).read_bytes()


def test_objective_and_notes_and_what_stands_beside_are_part_of_the_mark(tmp_path: Path) -> None:
    mllm, row = tiny_mllm(), RECORDS[0]
    noted = replace(row, request=replace(row.request, notes=("\nNear.", "", "")))
    rows = [row, noted, replace(row, retrieval=(0.0, 0.0, 0.0)), replace(row, retrieval=(0.0, 0.5, 0.0))]
    marks = {tuning.mark(mllm, [one], settings(), of) for one in rows for of in ("odds", "both")}
    assert len(marks) == 2 * len(rows)
    # Among which objectives validation chooses, and where a teacher stands, changes no adapter.
    several = settings(objectives=("both", "odds"), teacher="http://other:1")
    assert tuning.mark(mllm, [row], several) == tuning.mark(mllm, [row], settings())


def test_pictures_of_candidates_move_the_loss_and_the_adapters_mark() -> None:
    mllm = tiny_mllm()
    plain, seen = record(), record()
    shown = tuple((candidate, RED) for candidate in seen.request.candidates if isinstance(candidate, str))
    seen = replace(seen, request=replace(seen.request, candidates=shown))
    assert abs(float(row_loss(mllm, seen)) - float(row_loss(mllm, plain))) > 1e-3
    assert tuning.mark(mllm, [seen], settings()) != tuning.mark(mllm, [plain], settings())
