"""What stage 1 has stored is made again only where it failed or no longer holds."""

from dataclasses import replace
from pathlib import Path

import pytest

from fakes import shown
from mllm_srec import items
from mllm_srec.config import ItemsConfig
from mllm_srec.items import ITEM_TEXTS, describe, load_items
from mllm_srec.prompts import items as prompts
from mllm_srec.workspace import Counts
from test_items import BLUE_HASH, RED_HASH, Eyes, asked_of, rows, shop

# Failures of single rows


def test_a_picture_that_failed_is_named_and_asked_again_alone(tmp_path: Path) -> None:
    workspace = shop(tmp_path, batch_size=32)
    assert describe(workspace, Eyes(fails=(BLUE_HASH,))) == Counts(reused=0, made=5, failed=1)
    made = rows(workspace)
    assert (made["picture"]["status"], made["picture"]["reason"]) == ("error", "HTTP 500")
    assert {row["status"] for key, row in made.items() if key != "picture"} == {"ok", "skipped"}
    assert made["both"]["visual"] == "red running shoe"
    again = Eyes()
    assert describe(workspace, again) == Counts(reused=5, made=1, failed=0)
    assert asked_of(again, f"Picture: <{RED_HASH}>") == []
    assert rows(workspace)["picture"]["visual"] == "blue bag"
    assert describe(workspace, again) == Counts(reused=6, made=0, failed=0)


def test_a_sentence_that_failed_is_named_and_written_again_alone(tmp_path: Path) -> None:
    workspace = shop(tmp_path, batch_size=32, fusion="generate")
    assert describe(workspace, Eyes(fails=("Title: Hat",))) == Counts(reused=0, made=5, failed=1)
    made = rows(workspace)
    assert (made["broken"]["status"], made["broken"]["reason"]) == ("error", "HTTP 500")
    assert (made["broken"]["description"], made["broken"]["fused_by"]) == ("", "rule")
    assert {row["reason"] for row in made.values() if row["status"] == "ok"} == {""}
    again = Eyes(say=lambda prompt: "A hat.")
    assert describe(workspace, again) == Counts(reused=5, made=1, failed=0)
    assert [shown(prompt).count("Title: Hat") for prompt in again.generated] == [1]
    assert (rows(workspace)["broken"]["description"], rows(workspace)["broken"]["fused_by"]) == ("A hat.", "model")


# Making again


@pytest.mark.parametrize(
    ("change", "made"),
    [("nothing", 0), ("model", 6), ("settings", 6), ("prompts", 6), ("rules", 6), ("other section", 0)],
)
def test_rows_are_made_again_only_when_what_made_them_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, made: int
) -> None:
    workspace = shop(tmp_path)
    describe(workspace, Eyes())
    before = workspace.rows(ITEM_TEXTS)
    again = Eyes("fake-2" if change == "model" else "fake-1")
    if change == "settings":
        workspace.save_config(workspace.config.model_copy(update={"items": ItemsConfig(text_words=9)}))
    if change == "other section":
        workspace.save_config(workspace.config.model_copy(update={"seed": 9}))
    if change == "prompts":
        monkeypatch.setattr(prompts, "VERSION", "items-next")
    if change == "rules":
        monkeypatch.setattr(items, "RULES", "next")
    assert describe(workspace, again) == Counts(reused=6 - made, made=made, failed=0)
    assert len(again.asked) == (3 * 3 if made else 0)  # three questions to two pictures and to none
    assert again.calls() == (3 * 3 + 2 if made else 0)
    assert workspace.rows(ITEM_TEXTS).drop("fingerprint").equals(before.drop("fingerprint"))


@pytest.mark.parametrize(
    ("changed", "looked_at"),
    [
        ({"title": "Bag"}, BLUE_HASH),
        ({"description": "Large."}, BLUE_HASH),
        ({"category": "Bags"}, BLUE_HASH),
        ({"cleaned": "html"}, BLUE_HASH),
        ({"picture_sha256": RED_HASH}, RED_HASH),
        ({"picture_sha256": None, "picture_state": "missing"}, None),
    ],
)
def test_only_the_item_that_changed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], looked_at: str | None
) -> None:
    workspace = shop(tmp_path)
    describe(workspace, Eyes())
    catalogue = [replace(item, **changed) if item.item_id == "picture" else item for item in load_items(workspace)]
    monkeypatch.setattr(items, "load_items", lambda _: catalogue)
    again = Eyes()
    assert describe(workspace, again) == Counts(reused=5, made=1, failed=0)
    prefixes = dict.fromkeys(shown(prefix) for prefix, _ in again.asked)
    assert list(prefixes) == ([f"Picture: <{looked_at}>", prompts.NO_PICTURE] if looked_at else [])
    assert len(again.asked) == 3 * len(prefixes)
