"""What our environment and the peers' pass to each other, as whole files under names that say what they were made of.

Numpy and the standard library only: both environments import it, and they hold different versions of numpy.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PARTS = ("validation", "test")
SEEN = ("seen_user", "seen_item", "seen_time")
TIE_RULES = ("file_order", "strict")
PEERS = ("popularity", "item-kNN", "EASE", "SASRec", "BERT4Rec")
RESULTS = "peers.json"
"""What the peers' program says of its models: model -> tie rule -> what `choosing.choose_and_refit` returns."""
SCORES = "scores.json"
"""Which files of scores RecTools' metrics are wanted for: tie rule -> system -> file."""


@dataclass(frozen=True)
class Asked:
    """Targets, and what each of them sees. To the peers every target is a user of its own, a pseudo user named by its
    number, whose interactions are what the target sees.

    user int64 (T,): whose target it is. target int32 (T,): the item to be found. now int64 (T,): when it is asked for.
    Target t sees the items history[offsets[t] : offsets[t + 1]], oldest first, and their times; history int32 (H,),
    time int64 (H,), offsets int64 (T + 1,). Times are in ms UTC.
    """

    user: np.ndarray
    target: np.ndarray
    now: np.ndarray
    offsets: np.ndarray
    history: np.ndarray
    time: np.ndarray

    def __len__(self) -> int:
        return len(self.target)

    def histories(self, start: int, stop: int) -> list[np.ndarray]:
        """What each of the targets [start, stop) sees; `stop` may lie behind the last."""
        return [self.history[a:b] for a, b in pairwise(self.offsets[start : stop + 1])]

    def times(self, start: int, stop: int) -> list[np.ndarray]:
        """When each of the events of `histories` was."""
        return [self.time[a:b] for a, b in pairwise(self.offsets[start : stop + 1])]

    def pseudo_users(self, start: int, stop: int, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The events that the targets [start, stop) see, in order, without items outside the mask `known` bool (I,).

        Returns:
            user: int64, number of the target.
            item: int32, catalogue position.
        """
        stop = min(stop, len(self))
        user = np.repeat(np.arange(start, stop), np.diff(self.offsets[start : stop + 1]))
        item = self.history[self.offsets[start] : self.offsets[stop]]
        kept = known[item]
        return user[kept], item[kept]


@dataclass(frozen=True)
class Part:
    """Validation or test of one split: what systems may be fitted on, and what they are asked then, by tie rule.

    items: size of the catalogue; an item is its position in it. seen_user int64 (S,), seen_item int32 (S,), seen_time
    int64 (S,), ms UTC: the events that may be seen, by user, oldest first.
    """

    items: int
    seen_user: np.ndarray
    seen_item: np.ndarray
    seen_time: np.ndarray
    asked: dict[str, Asked]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, flat."""
        flat = {name: getattr(self, name) for name in SEEN} | {"items": np.array(self.items)}
        for rule, asked in self.asked.items():
            flat |= {f"{rule}.{name}": array for name, array in vars(asked).items()}
        return flat

    def mark(self) -> str:
        """Hash of the content."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays().items()):
            digest.update(f"{name} {array.dtype.str} {array.shape} ".encode() + array.tobytes())
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Store all arrays in one file."""
        whole(path, lambda file: np.savez(file, **self.arrays()))

    @classmethod
    def read(cls, path: Path) -> "Part":
        """What `write` stored."""
        with np.load(path) as stored:
            flat = dict(stored)
        asked: dict[str, dict[str, np.ndarray]] = {}
        for name, array in flat.items():
            rule, dot, field = name.partition(".")
            if dot:
                asked.setdefault(rule, {})[field] = array
        of_rules = {rule: Asked(**fields) for rule, fields in asked.items()}
        return cls(int(flat["items"]), *(flat[name] for name in SEEN), of_rules)


# Files


def named(what: str, *made_of: object) -> str:
    """A file's name without suffix: what it is, and the hash of the JSON-like things it is made of."""
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', what)}-{digest[:16]}"


def whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` holds all of it or nothing; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Store `value`."""
    whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def read_json(path: Path) -> Any:
    """What `write_json` stored."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_array(path: Path, array: np.ndarray) -> None:
    """Store `array` for `numpy.load`."""
    whole(path, lambda file: np.save(file, array))


def metrics_file(scores: Path) -> Path:
    """Where RecTools' metrics of a file of scores stand."""
    return scores.with_suffix(".rectools.npy")
