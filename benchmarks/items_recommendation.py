"""Section `recommendation`: what each representation of H&M's items is worth to content retrieval, and whether what was
seen agrees with what the texts say.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from common import SEED, Bench, cubes_of_last_five, difference, figure, show, shown

from mllm_srec.data.images import open_picture
from mllm_srec.data.split import Targets, leave_last_out
from mllm_srec.evaluation import protocol
from mllm_srec.facts import VOCABULARIES, canonical, merge, said_in
from mllm_srec.items import ITEM_TEXTS, load_items, visual_summary
from mllm_srec.mllm.base import Picture, Prompt
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.rendering import MAX_SIDE
from mllm_srec.mllm.text_encoder import TextEncoder
from mllm_srec.mllm.visual_table import FEATURES
from mllm_srec.prompts import items as prompts
from mllm_srec.workspace import Job, Table, Workspace, fingerprint

METRICS = ("NDCG@10", "Recall@10")
CONFUSIONS = 15
CHOICES = {"text": "full text", "description": "full text + seen", "model": "model: picture + full text"}
"""`items.embedding` -> the representation it takes."""
PAIRS = (
    ("title + seen", "title"),
    ("full text + seen", "full text"),
    ("model: picture + full text", "full text"),
)
MODEL_BATCH, TEXT_BATCH = 32, 256


def recommendation(bench: Bench) -> dict[str, Any]:
    """Content retrieval alone on validation and test, and what was seen against what is said."""
    workspace = bench.described()
    return {
        "retrieval": bench.kept(
            "recommendation-retrieval",
            __file__,
            [bench.trained.identity, TextEncoder().identity, workspace.dataset().items.height],
            lambda: retrieval(workspace, bench.trained),
        ),
        "agreement": agreement(workspace),
    }


# Representations


def representations(workspace: Workspace, mllm: LocalMllm) -> dict[str, np.ndarray]:
    """Name -> float32 (I, D), rows of length 1, or 0 where nothing is known of an item; stored and reused."""
    items = load_items(workspace)
    made = {row["key"]: row for row in workspace.rows(ITEM_TEXTS).iter_rows(named=True)}
    keys = [item.item_id for item in items]
    hashes = [item.picture_sha256 for item in items]
    titles = [item.title for item in items]
    full = [". ".join(part for part in (i.title, i.category, i.description) if part) for i in items]
    answers = [{a["question"]: a["answer"] for a in made[key]["seen"]} for key in keys]

    def summaries(texts: Sequence[tuple[str, str, str]]) -> list[str]:
        """As a catalogue with these texts alone would say what was seen: no text helps that is not there."""
        facts = [merge(seen, said_in(*text), list(VOCABULARIES)) for seen, text in zip(answers, texts, strict=True)]
        return [prompts.seen(visual_summary(seen, known)) for seen, known in zip(answers, facts, strict=True)]

    without_text = summaries([("", "", "")] * len(items))
    beside_title = summaries([(item.title, "", "") for item in items])
    beside_full = summaries([(item.title, item.category, item.description) for item in items])
    encoder = TextEncoder()

    def of_texts(name: str, texts: Sequence[str]) -> np.ndarray:
        payloads = [text or None for text in texts]
        return _stored(workspace, name, keys, payloads, encoder.identity, encoder.encode, TEXT_BATCH)

    def picture(sha256: str | None) -> tuple[Picture, ...]:
        return (Picture(sha256, workspace.picture(sha256)),) if sha256 else ()

    def fused(name: str, texts: Sequence[str]) -> np.ndarray:
        def embed(batch: Sequence[tuple[str, str | None]]) -> np.ndarray:
            return mllm.embed(
                [
                    Prompt((*((prompts.PICTURE, *picture(sha)) if sha else ()), prompts.represent(text, bool(sha))))
                    for text, sha in batch
                ]
            )

        payloads = list(zip(texts, hashes, strict=True))
        return _stored(workspace, name, keys, payloads, prompts.VERSION + mllm.identity, embed, MODEL_BATCH)

    def look(batch: Sequence[str]) -> np.ndarray:
        return tower_features(mllm, [picture(sha256)[0] for sha256 in batch])

    found = {
        "full text": of_texts("full", full),
        "title": of_texts("title", titles),
        "seen": of_texts("seen", without_text),
        "vision tower": _stored(workspace, "tower", keys, hashes, mllm.identity, look, MODEL_BATCH),
        "title + seen": of_texts("title_seen", _joined(titles, beside_title)),
        "full text + seen": of_texts("full_seen", _joined(full, beside_full)),
        "model: picture + full text": fused("model_full", full),
    }
    for name in ("vision tower", "model: picture + full text"):
        found[f"{name}, centred"] = _centred(found[name])
    return found


def _joined(texts: Sequence[str], seen: Sequence[str]) -> list[str]:
    """As `Catalogue` joins a text with what was seen."""
    return [". ".join(part for part in parts if part) for parts in zip(texts, seen, strict=True)]


def _stored(
    workspace: Workspace,
    name: str,
    keys: Sequence[str],
    payloads: Sequence[Any],
    made_by: str,
    encode: Callable[[Any], np.ndarray],
    batch: int,
) -> np.ndarray:
    """float32 (I, D) from rows stored in the workspace; zeros for the payload None."""
    table = Table(f"bench_{name}", pa.schema([("vector", pa.list_(pa.float32()))]))
    known = [(key, payload) for key, payload in zip(keys, payloads, strict=True) if payload is not None]
    jobs = [Job(key, fingerprint(made_by, repr(payload)), payload) for key, payload in known]

    def compute(due: list[Job]) -> list[dict[str, object]]:
        return [{"status": "ok", "reason": "", "vector": v} for v in encode([job.payload for job in due])]

    workspace.produce(table, jobs, compute, batch=batch, label=f"represent: {name}")
    place = {key: at for at, key in enumerate(keys)}
    wanted = {job.key for job in jobs}
    rows = [(place[k], v) for k, v in workspace.rows(table).select("key", "vector").iter_rows() if k in wanted]
    vectors = np.zeros((len(keys), len(rows[0][1]) if rows else 1), dtype=np.float32)
    for at, vector in rows:
        vectors[at] = vector
    return vectors


def tower_features(mllm: LocalMllm, pictures: Sequence[Picture]) -> np.ndarray:
    """float32 (N, FEATURES): the tower's last features, mean over the picture, of length 1; no language in them."""
    import torch

    images = [open_picture(picture.data, MAX_SIDE) for picture in pictures]
    pixels = mllm.renderer.processor.image_processor(images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        grid = mllm.core.vision_tower(pixels.to(mllm.device, mllm.model.dtype)).last_hidden_state.float()
        pooled = torch.nn.functional.normalize(grid[..., :FEATURES].mean(1), dim=-1)
    return pooled.cpu().numpy()


def _centred(vectors: np.ndarray) -> np.ndarray:
    """Known rows minus their mean, of length 1 again."""
    known = vectors.any(1, keepdims=True)
    moved = np.where(known, vectors - vectors.sum(0) / max(known.sum(), 1), 0)
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.divide(moved, length, out=np.zeros_like(moved), where=length > 0).astype(np.float32)


# Retrieval


def retrieval(workspace: Workspace, mllm: LocalMllm) -> dict[str, Any]:
    """Per part: each representation's metrics, and paired differences."""
    histories = workspace.dataset().histories()
    split = leave_last_out(histories, workspace.config.data.tie_rule, workspace.config.data.min_history)
    vectors = representations(workspace, mllm)
    result: dict[str, Any] = {"items": len(histories.items)}
    for part, targets in (("validation", split.validation), ("test", split.test)):
        values = {
            name: protocol.per_target(
                protocol.place_targets(histories, targets, partial(cubes_of_last_five, of)), (10,)
            )
            for name, of in vectors.items()
        }
        result[part] = {"targets": len(targets), **_compared(values, targets)}
    of_choice = {choice: result["validation"]["systems"][name] for choice, name in CHOICES.items()}
    result["chosen"] = max(of_choice, key=lambda choice: of_choice[choice]["NDCG@10"]["value"])
    return result


def _compared(values: dict[str, dict[str, np.ndarray]], targets: Targets) -> dict[str, Any]:
    systems = {
        name: {metric: figure(of_system[metric], targets.user.tolist()) for metric in METRICS}
        for name, of_system in values.items()
    }
    pairs = {
        f"({one}) - ({other})": {
            metric: difference(values[one][metric], values[other][metric], targets.user) for metric in METRICS
        }
        for one, other in PAIRS
    }
    return {"systems": systems, "differences": pairs}


# What was seen against what is said


def agreement(workspace: Workspace) -> dict[str, Any]:
    """Per attribute: how often it was seen and said, how often both agree, and the most frequent confusions."""
    made = {row["key"]: row for row in workspace.rows(ITEM_TEXTS).iter_rows(named=True)}
    items = [item for item in load_items(workspace) if item.picture_state == "ok"]
    said = [said_in(item.title, item.category, item.description) for item in items]
    return {
        attribute: compare_seen(
            [_seen(made[item.item_id]["seen"], attribute) for item in items], [of[attribute] for of in said]
        )
        for attribute in VOCABULARIES
    }


def _seen(answers: Sequence[dict[str, str]], attribute: str) -> str:
    return next((canonical(attribute, a["answer"]) for a in answers if a["question"] == attribute), "")


def compare_seen(seen: Sequence[str], said: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Seen values ("" if none) against the values that the texts say.

    `agreement`: among items with both, the seen value is one of those said. `by_chance`: the same with the seen values
    dealt out anew among these items. `always_the_commonest`: the same if the commonest said value were always seen.
    """
    both = [(value, values) for value, values in zip(seen, said, strict=True) if value and values]
    result: dict[str, Any] = {
        "items": len(seen),
        "seen": figure([float(bool(value)) for value in seen]),
        "said": figure([float(bool(values)) for values in said]),
        "agreement": figure([float(value in values) for value, values in both]),
    }
    if both:
        dealt = np.random.default_rng(SEED).permutation(len(both))
        common = Counter(value for _, values in both for value in values).most_common(1)[0][0]
        result["by_chance"] = figure(
            [float(both[at][0] in values) for at, (_, values) in zip(dealt, both, strict=True)]
        )
        result["always_the_commonest"] = figure([float(common in values) for _, values in both]) | {"answer": common}
    wrong = Counter((" / ".join(values), value) for value, values in both if value not in values)
    result["confusions"] = [
        {"said": told, "seen": value, "items": count} for (told, value), count in wrong.most_common(CONFUSIONS)
    ]
    return result


def show_recommendation(result: dict[str, Any]) -> None:
    """Validation first, then test, then the agreement."""
    found = result["retrieval"]
    for part in ("validation", "test"):
        of_part = found[part]
        title = f"recommendation: {part}, {of_part['targets']} targets, {found['items']} items, content score alone"
        rows = [(name, *(shown(of[m], 4) for m in METRICS)) for name, of in of_part["systems"].items()]
        show(title, ("representation", *METRICS), rows)
        rows = [(name, *(shown(of[m], 4) for m in METRICS)) for name, of in of_part["differences"].items()]
        show(f"recommendation: {part}, paired differences", ("difference", *METRICS), rows)
    print(f"items.embedding by validation: {found['chosen']}\n")
    rows = []
    for attribute, of in result["agreement"].items():
        chance = shown(of["by_chance"]) if "by_chance" in of else ""
        common = f"{of['always_the_commonest']['value']:.3f} ({of['always_the_commonest']['answer']})" if chance else ""
        row = (attribute, shown(of["seen"]), shown(of["said"]), f"{shown(of['agreement'])} of {of['agreement']['n']}")
        rows.append((*row, chance, common))
    show(
        "what was seen against what the texts say",
        ("attribute", "seen", "said", "agreement", "by chance", "always the commonest"),
        rows,
    )
    for attribute, of in result["agreement"].items():
        rows = [(c["said"], c["seen"], c["items"]) for c in of["confusions"]]
        show(f"most frequent confusions: {attribute}", ("said", "seen", "items"), rows)
