"""Kill -9 at ten random moments of `describe`: the same rows as undisturbed, and only batches in flight made twice."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from fakes import FakeMllm, make_shop, png
from mllm_srec import items, workspace
from mllm_srec.config import Config, ItemsConfig, ModelConfig
from mllm_srec.mllm.base import Answer, Picture, Prompt, Question
from mllm_srec.workspace import Workspace

BATCH, COUNT, KILLS = 4, 120, 10


class CountingMllm(FakeMllm):
    """Writes every picture that it is asked about into a file, before it answers."""

    def __init__(self, log: Path) -> None:
        super().__init__(sees={"The picture shows a": "shoe"}, likelihood=lambda before, _: -6.0)
        self.log = log

    def ask(self, prefixes: Sequence[Prompt], questions: Sequence[Question], max_new_tokens: int) -> list[list[Answer]]:
        seen = [part.sha256 for prefix in prefixes for part in prefix.parts if isinstance(part, Picture)]
        with self.log.open("a", encoding="ascii") as file:
            file.writelines(f"{sha256}\n" for sha256 in seen)
        time.sleep(0.02)  # so that a kill finds the model at work as well as the store
        return super().ask(prefixes, questions, max_new_tokens)


def run(folder: Path, log: Path) -> None:
    workspace.COMMIT_ROWS = BATCH
    items.describe(Workspace.open(folder), CountingMllm(log))


def start(folder: Path, log: Path) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mllm_srec.items", "test_items_killed"])
    process = context.Process(target=run, args=(folder, log))
    process.start()
    return process


def asked(log: Path) -> list[str]:
    return log.read_text(encoding="ascii").split() if log.exists() else []


def test_ten_kills_lose_no_row_and_ask_again_only_for_the_batch_in_flight(tmp_path: Path) -> None:
    pictures = {f"p{n}": png(f"#{n:02x}8844") for n in range(COUNT)}
    catalogue = [{"item_id": f"i{n:03}", "title": f"Thing {n}", "image": f"p{n}"} for n in range(COUNT)]
    config = Config(items=ItemsConfig(questions=("kind",)), model=ModelConfig(batch_size=BATCH))
    shop = make_shop(tmp_path, catalogue, {"u": [("i000", 1, None)]}, config, pictures).root
    disturbed, log = tmp_path / "disturbed", tmp_path / "log"
    shutil.copytree(shop, disturbed)

    generator = random.Random(0)
    kills = 0
    while kills < KILLS:
        before = len(asked(log))
        process = start(disturbed, log)
        moment = before + generator.randrange(1, 3 * BATCH)
        while len(asked(log)) < moment and process.is_alive():
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        assert process.is_alive(), "it ended before it was killed: the shop is too small for so many kills"
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        kills += 1
    last = start(disturbed, log)
    last.join()
    assert last.exitcode == 0

    run(shop, tmp_path / "undisturbed")
    again, whole = (Workspace.open(f).rows(items.ITEM_TEXTS).sort("key") for f in (disturbed, shop))
    assert again.equals(whole)
    assert again.height == COUNT
    times = Counter(asked(log))
    assert len(times) == COUNT
    assert 0 < sum(times.values()) - COUNT <= KILLS * BATCH
    assert sum(Counter(asked(tmp_path / "undisturbed")).values()) == COUNT
