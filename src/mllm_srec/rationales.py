"""Step 3 of the chain of thought for training rows: from the evidence, or from a larger model whose words are checked.

The larger model ("teacher") is shown what ranking is shown, nothing newer, and the right answer; it is asked why.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mllm_srec.catalogue import Catalogue
from mllm_srec.config import Config, build_config
from mllm_srec.errors import MllmSrecError, UsageError
from mllm_srec.facts import content_words, unsupported_words
from mllm_srec.mllm.base import Mllm, PartialFailure, Prompt, told
from mllm_srec.mllm.load import load_mllm
from mllm_srec.mllm.remote import RemoteMllm
from mllm_srec.progress import say
from mllm_srec.prompts import ranking as prompts
from mllm_srec.records import LAST_BRACKET, find_evidence, ranking_request, rationale, title
from mllm_srec.user_states import UserState
from mllm_srec.workspace import Job, Table, Workspace, fingerprint

RATIONALES = Table(
    "rationales",
    pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("answer", pa.string()), ("text", pa.string())]),
)
"""What a teacher wrote, as it wrote it; one row per prompt, whose fingerprint is the key."""

TEACHER_TOKENS = 80
SENTENCES = 2

DENIAL = re.compile(
    r"\b(?:no|not|none|nor|never|nothing|neither|cannot|without|lacks?|lacking|against|unlike|instead|rather|away|"
    r"fades|faded)\b|n't\b",
    re.IGNORECASE,
)
"""Words by which a sentence says what an item is not."""

_NAME = "\0"
_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bJr\.)(?<!\bvs\.)\s+"
)
"""Behind a sentence, not behind an initial or "Mr."."""


@dataclass(frozen=True)
class Wanted:
    """A rationale to be: the state that the target sees, a candidate (catalogue position) and whether it was chosen.

    `history` and `disliked` are the events that the state was made of, oldest first, as catalogue positions.
    """

    state: UserState
    item: int
    history: np.ndarray
    chosen: bool
    disliked: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))


def load_teacher(config: Config) -> RemoteMllm:
    """The larger model of `training.teacher`; its key is in the variable that model.api_key_variable names.

    Raises:
        UsageError: address or name are missing, or the address is none.
        ModelError: the key is not in the environment.
    """
    settings = config.training
    if not (settings.teacher and settings.teacher_name):
        raise UsageError(
            "training.rationales=model needs a server and the name of its model: "
            "set training.teacher=http://host:8000 and training.teacher_name"
        )
    asked = config.model.model_dump() | {"server": settings.teacher, "name": settings.teacher_name}
    teacher = load_mllm(build_config({"model": asked}, "training.teacher").model)
    assert isinstance(teacher, RemoteMllm)  # the configuration names a server
    return teacher


def written(workspace: Workspace, teacher: Mllm | None, catalogue: Catalogue, wanted: Sequence[Wanted]) -> list[str]:
    """Step 3 and the answer for each of `wanted`: the teacher's, or without one the evidence's.

    What the teacher writes is stored and reused. What it invents, and what argues against the answer, is rejected,
    counted and told on stderr; the evidence's stands in its place.

    Raises:
        MllmSrecError: a history holds more events than the state has seen: it would know the answer.
        ModelError: the teacher's server does not answer or does not serve it.
    """
    for one in wanted:
        if len(one.history) + len(one.disliked) > one.state.end:
            raise MllmSrecError(
                f"user {one.state.user_id!r}: a history of {len(one.history) + len(one.disliked)} events for a state "
                f"that has seen {one.state.end}: it may hold the answer"
            )
    texts = [
        rationale(find_evidence(one.state, catalogue, one.item, one.history, one.disliked), catalogue, one.chosen)
        for one in wanted
    ]
    if teacher is None or not wanted:
        return texts
    rejected: Counter[str] = Counter()
    failure = ""
    for at, (one, row) in enumerate(zip(wanted, _taught(workspace, teacher, catalogue, wanted), strict=True)):
        if row["status"] == "error":
            rejected["have failed"] += 1
            failure = failure or f" (first failure: {row['reason']})"
            continue
        text, wrong = check(str(row["text"]), one, catalogue)
        if wrong:
            rejected[wrong] += 1
        else:
            texts[at] = prompts.rationale([text], one.chosen)
    counted = ", ".join(f"{count:,} {why}" for why, count in sorted(rejected.items())) or "none rejected"
    instead = ": the evidence's stand in their place" if rejected else ""
    say(f"train: {len(wanted):,} rationales of the teacher, {counted}{failure}{instead}")
    return texts


def check(text: str, wanted: Wanted, catalogue: Catalogue) -> tuple[str, str]:
    """(the first sentences of a teacher's text without the answer, "") or ("", why they are rejected)."""
    item, names = wanted.item, names_of(catalogue, [*wanted.history, *wanted.disliked, wanted.item])
    answer, other = ("yes", "no") if wanted.chosen else ("no", "yes")
    parts = [(sentence, rest) for sentence, rest, _ in sentences(text, names) if rest.strip(" .!").lower() != answer]
    parts = [(sentence, rest) for sentence, rest in parts if sentence.endswith((".", "!", "?"))][:SENTENCES]
    if not parts:
        return "", "have no whole sentence"
    rest = " ".join(rest for _, rest in parts)
    known = ranking_request(wanted.state, catalogue, ()).prefix.parts
    history = [catalogue.lines[i] for i in (*wanted.history, *wanted.disliked)]
    item_facts = [*catalogue.facts[item], catalogue.candidates[item]]
    sources = [part for part in known if isinstance(part, str)] + history + item_facts
    if unsupported_words(rest, *sources, prompts.RATIONALE_WORDS):
        return "", "name what nobody told"
    # Why not can only be said by what an item is not, and why by what it is.
    if re.search(rf"\b{other}\b", rest, re.IGNORECASE) or wanted.chosen == bool(DENIAL.search(rest)):
        return "", "argue against the answer"
    return " ".join(sentence for sentence, _ in parts), ""


def names_of(catalogue: Catalogue, items: Iterable[int]) -> dict[str, list[int]]:
    """How texts may call `items` (in short form, by title, by title without year) -> those called so, in order."""
    names: dict[str, list[int]] = {}
    for item in map(int, items):
        line = catalogue.lines[item]
        bare = LAST_BRACKET.sub("", line)
        for name in {line, bare, LAST_BRACKET.sub("", bare), title(catalogue, item)}:
            if content_words(name) or len(name.split()) > 1:  # "It" would be found everywhere
                names.setdefault(name, []).append(item)
    return names


def sentences(text: str, names: Iterable[str]) -> list[tuple[str, str, list[str]]]:
    """The sentences of `text`: each as it is, without the `names` in it, and these, in order.

    No sentence ends within a name, and what a name says ("Nothing to Lose", "The Black Hat") the sentence does not.
    """
    text = " ".join(text.replace(_NAME, " ").split())
    found: list[str] = []
    present = sorted((name for name in names if name in text), key=len, reverse=True)
    if present:
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, present))})(?!\w)"
        found = re.findall(pattern, text)
        text = re.sub(pattern, _NAME, text)
    made, waiting = [], iter(found)
    for masked in _END.split(text):
        inside = [next(waiting) for _ in range(masked.count(_NAME))]
        between = masked.split(_NAME)
        sentence = "".join(part for pair in zip(between, [*inside, ""], strict=True) for part in pair)
        made.append((sentence, " ".join(between), inside))
    return [part for part in made if part[0]]


def _prompt(catalogue: Catalogue, wanted: Wanted) -> Prompt:
    prefix, candidate = ranking_request(wanted.state, catalogue, ()).prefix, catalogue.candidate(wanted.item)
    shown = (candidate,) if isinstance(candidate, str) else candidate
    return Prompt((*prefix.parts, *shown, prompts.ask_rationale(wanted.chosen)), system=prefix.system)


def _taught(
    workspace: Workspace, teacher: Mllm, catalogue: Catalogue, wanted: Sequence[Wanted]
) -> list[dict[str, object]]:
    """The stored row of each of `wanted`, made where it is missing."""
    marks, jobs = [], {}
    for one in wanted:
        prompt = _prompt(catalogue, one)
        mark = fingerprint(told(prompt.parts), prompt.system, TEACHER_TOKENS, prompts.VERSION, teacher.identity)
        marks.append(mark)
        jobs[mark] = Job(mark, mark, (one, prompt))  # equal prompts are asked once

    def write(batch: list[Job]) -> list[dict[str, object]]:
        errors: Mapping[int, str] = {}
        try:
            texts: Sequence[str | None] = teacher.generate([job.payload[1] for job in batch], TEACHER_TOKENS)
        except PartialFailure as failure:
            texts, errors = failure.results, failure.errors
        return [
            {
                "status": "error" if at in errors else "ok",
                "reason": errors.get(at, ""),
                "user_id": job.payload[0].state.user_id,
                "item_id": catalogue.ids[job.payload[0].item],
                "answer": "Yes" if job.payload[0].chosen else "No",
                "text": text or "",
            }
            for at, (job, text) in enumerate(zip(batch, texts, strict=True))
        ]

    batch = workspace.config.model.batch_size
    workspace.produce(RATIONALES, list(jobs.values()), write, batch=batch, label="train: rationales")
    rows = {row["key"]: row for row in workspace.rows(RATIONALES).iter_rows(named=True)}
    return [rows[mark] for mark in marks]
