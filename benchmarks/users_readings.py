"""What the model writes and reads for `users.py`, kept in the work folder.

In a file of its own, since all that is kept is made again when the code of this file changes.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import Bench, batches

from mllm_srec import users
from mllm_srec.config import UsersConfig
from mllm_srec.mllm.base import Request
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.progress import Bar
from mllm_srec.prompts import ranking as ranking_prompts
from mllm_srec.prompts import users as prompts
from mllm_srec.user_states import Window
from mllm_srec.users import Summary, summarise

CHECK = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (users, prompts))
"""The code that says what a summary may hold: what was written is written again when it changes."""


def written(bench: Bench, mllm: LocalMllm, windows: Sequence[Window], config: UsersConfig, label: str) -> list[Summary]:
    """The windows' summaries as `comprehend` writes them, in the model's batches; every batch is kept."""
    if config.summary == "compose":
        return summarise(None, windows, config)
    made: list[Summary] = []
    with Bar(f"{label}: windows", len(windows)) as bar:
        for batch in batches(windows, mllm.batch_size):
            made_of = [mllm.identity, config.summary_tokens, CHECK, *(window.prompt for window in batch)]
            rows = bench.kept(
                re.sub(r"\W+", "-", f"summaries {label}"),
                __file__,
                made_of,
                lambda batch=batch: [(made.text, made.by) for made in summarise(mllm, batch, config)],
            )
            made += [Summary(text, by) for text, by in rows]
            bar.advance(len(batch))
    return made


def logliks(bench: Bench, mllm: LocalMllm, requests: Sequence[Request], label: str, size: int) -> list[np.ndarray]:
    """Per request float (C,): the candidates' mean log-likelihood per token; kept for every `size` requests."""
    found: list[np.ndarray] = []
    with Bar(label, len(requests)) as bar:
        for batch in batches(requests, size):
            words = [(request.prefix.system, *request.prefix.parts, *request.candidates) for request in batch]
            kept = bench.kept(
                "likelihoods",  # whatever asks: equal prompts are read once
                __file__,
                [mllm.identity, ranking_prompts.VERSION, *words],
                lambda batch=batch: [scores[:, 1].tolist() for scores in mllm.score(batch)],
            )
            found += [np.array(of_request) for of_request in kept]
            bar.advance(len(batch))
    return found
