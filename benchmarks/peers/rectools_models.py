"""The peers, fitted and asked with RecTools; `run.py` calls this program in the peers' own environment.

    benchmarks/peers/.venv/bin/python benchmarks/peers/rectools_models.py FOLDER --models EASE,SASRec

FOLDER holds validation.npz and test.npz (`exchange.Part`). Here come the scores of the test targets, and peers.json.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import implicit
import numpy as np
import pandas as pd
import pytorch_lightning as lightning
import rectools
import torch
from implicit.nearest_neighbours import CosineRecommender, TFIDFRecommender
from rectools import Columns
from rectools.dataset import Dataset, IdMap, Interactions
from rectools.models import BERT4RecModel, EASEModel, ImplicitItemKNNWrapperModel, PopularModel, SASRecModel

sys.path.append(str(Path(__file__).resolve().parents[2] / "src"))

from choosing import Scorer, Settings, System, choose_and_refit, read_parts
from exchange import PEERS, RESULTS, Asked, Part, write_json

SEED = 0
SESSION = 100
BATCH = 32
"""Users per optimiser step: RecTools' 128 would make these small logs' epochs eight steps long."""
BLOCK = 500
"""Targets asked for together; bounds the memory that their lists of the whole catalogue take."""

Fitted = Iterator[tuple[Settings, Scorer]]


def main() -> None:
    """Fit what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=",".join(PEERS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the libraries to one another
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    parts = read_parts(options.folder)
    known = systems()
    results = {name: choose_and_refit(name, known[name], parts, options.folder) for name in options.models.split(",")}
    write_json(options.folder / RESULTS, results)


def systems() -> dict[str, System]:
    """All peers by name."""
    versions = (rectools.__version__, implicit.__version__, lightning.__version__, torch.__version__, np.__version__)
    made_of = "\n".join([Path(__file__).read_text(encoding="utf-8"), *versions])
    neighbours = [{"weights": weights, "K": k} for k in (10, 30, 100, 300, 1000) for weights in ("cosine", "tfidf")]
    causal = [{**network, "epochs": [15, 30]} for network in networks((64, 0.3), (64, 0.1), (128, 0.3))]
    masked = [{**network, "epochs": [15, 30, 45]} for network in networks((64, 0.3), (128, 0.1))]

    def sasrec(part: Part, settings: Settings) -> Fitted:
        return fit_transformer(SASRecModel, part, settings)

    def bert4rec(part: Part, settings: Settings) -> Fitted:
        return fit_transformer(BERT4RecModel, part, settings)

    return {
        "popularity": System([{}], fit_popularity, made_of),
        "item-kNN": System(neighbours, fit_neighbours, made_of),
        "EASE": System([{"lambda": value} for value in (50, 100, 200, 500, 1000)], fit_ease, made_of),
        "SASRec": System(causal, sasrec, made_of),
        "BERT4Rec": System(masked, bert4rec, made_of),
    }


def networks(*of: tuple[int, float]) -> list[Settings]:
    """Settings of (factors, dropout) pairs."""
    return [{"factors": factors, "dropout": dropout} for factors, dropout in of]


def fit_popularity(part: Part, settings: Settings) -> Fitted:
    """How many users have chosen an item."""
    data = fitting_data(part)
    yield settings, scorer(PopularModel().fit(data), data, part)


def fit_neighbours(part: Part, settings: Settings) -> Fitted:
    """Item-kNN: each item keeps its K nearest."""
    kind = {"cosine": CosineRecommender, "tfidf": TFIDFRecommender}[settings["weights"]]
    data = fitting_data(part)
    yield settings, scorer(ImplicitItemKNNWrapperModel(kind(K=settings["K"])).fit(data), data, part)


def fit_ease(part: Part, settings: Settings) -> Fitted:
    """Embarrassingly shallow autoencoder (Steck, 2019)."""
    data = fitting_data(part)
    yield settings, scorer(EASEModel(regularization=float(settings["lambda"])).fit(data), data, part)


def fit_transformer(kind: type[Any], part: Part, settings: Settings) -> Fitted:
    """SASRec or BERT4Rec as RecTools has them: 2 blocks, 4 heads, cross-entropy over the whole catalogue.

    One training passes through all epochs that are looked at.
    """
    lightning.seed_everything(SEED, workers=True, verbose=False)
    data = fitting_data(part)
    model = kind(
        n_blocks=2,
        n_factors=settings["factors"],
        dropout_rate=settings["dropout"],
        loss="softmax",
        batch_size=BATCH,
        session_max_len=session_length(part),
        get_trainer_func=trainer,
        recommend_torch_device="cpu",
    )
    done = 0
    for epochs in settings["epochs"]:
        model.fit_partial(data, min_epochs=epochs - done, max_epochs=epochs - done)
        done = epochs
        yield {**settings, "epochs": [epochs]}, scorer(model, data, part)


def trainer() -> lightning.Trainer:
    """Quiet, repeatable, without files; `fit_partial` says for how many epochs."""
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def session_length(part: Part) -> int:
    """Newest events that are read: RecTools' 100, or where hardly any user has as many what all but 5 % of them have.

    Padding costs as much as events do. One is added for BERT4Rec's mask.
    """
    lengths = np.bincount(part.seen_user)
    return min(SESSION, int(np.percentile(lengths[lengths > 0], 95)) + 1)


# Data


def events(user: np.ndarray, item: np.ndarray) -> pd.DataFrame:
    """RecTools' columns. The place in the table stands for the time: only the order within a user counts."""
    order = pd.to_datetime(np.arange(len(user)), unit="s")
    return pd.DataFrame({Columns.User: user, Columns.Item: item, Columns.Weight: 1.0, Columns.Datetime: order})


def fitting_data(part: Part) -> Dataset:
    """The events that may be seen."""
    return Dataset.construct(events(part.seen_user, part.seen_item))


def scorer(model: Any, data: Dataset, part: Part) -> Scorer:
    """Scores by `recommend`, what a target sees masked; items that the model does not list get -inf.

    A model that lists nothing for a target, because it knows nothing of what the target sees, falls back on popularity.
    """
    ids = np.asarray(data.item_id_map.external_ids, dtype=np.int64)
    known = np.zeros(part.items, dtype=bool)
    known[ids] = True
    popularity = np.bincount(part.seen_item, minlength=part.items).astype(np.float32)

    def scores_of(asked: Asked) -> np.ndarray:
        scores = np.full((len(asked), part.items), -np.inf, dtype=np.float32)
        for start in range(0, len(asked), BLOCK):
            user, item = asked.pseudo_users(start, start + BLOCK, known)
            if len(user) == 0:
                continue
            # One more user, whom nobody asks for, has chosen everything, so that no item is missing in the matrix.
            frame = events(np.append(user, np.full(len(ids), -1)), np.append(item, ids))
            users = IdMap.from_values(frame[Columns.User].to_numpy())
            pseudo = Dataset(users, data.item_id_map, Interactions.from_raw(frame, users, data.item_id_map))
            listed = model.recommend(
                np.unique(user), pseudo, k=len(ids), filter_viewed=True, add_rank_col=False,
                on_unsupported_targets="ignore",
            )  # fmt: skip
            rows = listed[Columns.User].to_numpy(dtype=np.int64)
            scores[rows, listed[Columns.Item].to_numpy(dtype=np.int64)] = listed[Columns.Score].to_numpy()
        scores[np.isneginf(scores).all(1)] = popularity
        return scores

    return scores_of


if __name__ == "__main__":
    main()
