"""One typed tree = one YAML file = the command line's `--set section.key=value` flags.

Unknown keys are refused with the nearest known name. Presets are dictionaries laid over the defaults.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mllm_srec.errors import UsageError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """How a log becomes histories."""

    repeats: Literal["first", "keep"] = "first"
    """Keep a user's first event with an item only, or every repeat."""
    min_history: int = Field(3, ge=3)
    """Users with fewer events get no target; their events still count."""
    protocol: Literal["leave_last_out", "global_time"] = "leave_last_out"
    tie_rule: Literal["file_order", "strict"] = "file_order"
    """`strict`: a history holds only events earlier than the target's time."""
    on_bad_row: Literal["stop", "skip"] = "stop"


class ModelConfig(_Section):
    """Which multimodal LLM, and how it runs."""

    name: str = "embedded"
    """`embedded`, a Hugging Face name, or a folder in transformers' format; with `server` the name it serves."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "auto"
    batch_size: int = Field(32, ge=1)
    """Prompts generated together."""
    server: str = ""
    """Address of an OpenAI-compatible server (vLLM, SGLang, llama.cpp), as "http://host:8000"; empty: no server."""
    api_key_variable: str = ""
    """Name of the environment variable that holds the server's key, never the key itself."""
    concurrency: int = Field(8, ge=1)
    """Requests to the server at a time."""
    timeout: float = Field(120, gt=0, allow_inf_nan=False)
    """Seconds without a sign of the server before a request is tried again."""

    @field_validator("server")
    @classmethod
    def _address(cls, server: str) -> str:
        if "@" in server:  # a UsageError goes past the report that would show the value
            raise UsageError(
                "'model.server' holds a user or a password: put a key's variable into model.api_key_variable"
            )
        if server and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", server):
            raise ValueError("should be an address like http://host:8000")
        return server

    @field_validator("api_key_variable")
    @classmethod
    def _variable(cls, name: str) -> str:
        if name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # it may be the key: the value is not shown
            raise UsageError(
                "'model.api_key_variable' should be the name of an environment variable, not the key itself"
            )
        return name


Questions = Literal[
    "kind", "scene", "colour", "pattern", "material", "style", "whom", "setting", "mood", "package", "text"
]


class ItemsConfig(_Section):
    """Stage 1, item understanding."""

    domain: Literal["auto", "general", "goods", "fashion", "films", "food"] = "auto"
    """Which questions are worth asking about a picture; `auto`: as the item's category says."""
    questions: tuple[Questions, ...] = ("kind", "colour", "pattern")
    """Asked where the domain has them; the embedded model learnt to answer the default ones, larger ones answer all.

    Films have none of the default ones: posters are out of the embedded model's reach.
    """
    fusion: Literal["compose", "generate"] = "compose"
    """`compose`: the item's own words and what was seen; `generate`: the model writes, checked for invention."""
    text_words: int = Field(60, ge=5)
    """Words of an item's own description that enter the fusion prompt."""
    answer_tokens: int = Field(8, ge=1, le=20)
    """New tokens per visual question that is answered in the model's own words; there are at most two."""
    description_tokens: int = Field(40, ge=8)
    """New tokens of the fused description."""
    embedding: Literal["text", "description", "model"] = "text"
    """What content retrieval compares. `text`: sentence vectors of the item's own text; `description`: of text and what
    the picture showed; `model`: the multimodal model's own vectors of picture and text."""


class UsersConfig(_Section):
    """Stage 2, temporal user comprehension."""

    windows: Literal["count", "session"] = "count"
    """`count`: `window` events each, a new one every `step` events; `session`: cut at pauses of `session_hours`."""
    window: int = Field(6, ge=1)
    """Events in a window; a session ends with as many."""
    step: int = Field(3, ge=1)
    """Events from one window's start to the next; at most `window`, so that every event is read."""
    session_hours: float = Field(24.0, gt=0, allow_inf_nan=False)
    summary: Literal["compose", "generate"] = "generate"
    """`generate`: the model writes each window's summary, checked for invention; `compose`: it is made of the facts."""
    summary_tokens: int = Field(24, ge=4)
    recent: int = Field(10, ge=0)
    """Newest items that enter the ranking prompt in raw short form."""

    @model_validator(mode="after")
    def _no_gaps(self) -> Self:
        if self.step > self.window:
            raise ValueError(f"step {self.step} is larger than window {self.window}: events between would not be read")
        return self


class RetrievalConfig(_Section):
    """Candidates from co-occurrence, content, a sequence encoder and the trend."""

    candidates: int = Field(30, ge=2)
    repeats: bool = False
    """Whether an item of the user's history may be recommended again; for a log read with `data.repeats=keep`."""
    weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), min_length=1
    )
    """Weights of content, sequence and trend beside co-occurrence that validation chooses from."""
    epochs: int = Field(150, ge=0)
    """Of the sequence encoder at most; validation says when to stop. 0: there is none."""


class RankingConfig(_Section):
    """What a ranking prompt tells of the item and of the user."""

    item: Literal["title", "visual", "description"] = "description"
    """`title`: title and category; `visual`: and what its picture showed; `description`: the fused description."""
    preference: bool = True
    """The dynamic preference, with the newest choice told in full."""
    profile: bool = True
    """The profile, with the typical choice told in full."""
    facts: bool = True
    """What of the item meets or misses the user's tastes and last choices, behind the item: step 3 of the chain of
    thought, counted before the answer."""
    picture: bool = False
    """Whether the item's picture itself is shown beside its text."""


Objective = Literal["sft", "odds", "likelihood", "listwise", "both"]


class TrainingConfig(_Section):
    """Stage 3, LoRA fine-tuning; one row is one user with a positive and its negatives."""

    task: Literal["next", "liked"] = "next"
    """`next`: the next item, whatever its rating; `liked`: the next one that is rated high, against such that are rated
    low (the paper's threshold: at least 4, at most 2, of 5)."""
    objectives: tuple[Objective, ...] = Field(("both",), min_length=1)
    """`sft`: language loss of answers and rationales; `odds`, `likelihood`: softmax over a user's candidates of that
    reading; `listwise`: of both readings; `both`: `odds` and `sft`. Of several, validation chooses."""
    rationales: Literal["none", "evidence", "model"] = "evidence"
    """Who writes step 3 of the chain of thought: nobody, the shared facts, or a larger model (`teacher`)."""
    teacher: str = ""
    """Address of the OpenAI-compatible server that writes rationales, as "http://host:8000"."""
    teacher_name: str = ""
    """The name under which that server knows its model."""
    rows: int = Field(300, ge=0)
    """Training rows per epoch at most; 0 ranks without fine-tuning."""
    epochs: int = Field(1, ge=1)
    negatives: int = Field(8, ge=1)
    head_start: bool = True
    """Begin with what the model has learnt on simulated shops, where it ships with that and the adapter has its form
    (rank 16, last 12 layers)."""
    rank: int = Field(16, ge=1)
    top_layers: int = Field(12, ge=1)
    """Only this many of the language model's last layers are adapted."""
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    accumulate: int = Field(4, ge=1)
    """Rows per optimiser step."""
    gradient_checkpointing: bool = False
    """Layers' inner values are computed again in the backward pass instead of kept: less memory, more time."""
    save_steps: int = Field(25, ge=1)


class EvaluationConfig(_Section):
    """Full-catalogue metrics with bootstrap intervals over users."""

    cutoffs: tuple[Annotated[int, Field(ge=1)], ...] = Field((5, 10, 20), min_length=1)
    choosing_users: int = Field(1000, ge=1)
    """Validation targets at most of one half of the users, and half as many of the other, that choose the weights."""
    users: int | None = Field(None, ge=1)
    """Test targets at most (a seeded sample); none means all."""
    honesty_lists: int = Field(40, ge=0)
    """Test lists at most that are read again with one thing changed, five times each, for the report; 0: none."""
    bootstrap: int = Field(1000, ge=100)


class Config(_Section):
    """Everything a run depends on besides the data."""

    seed: int = Field(0, ge=0, lt=2**32)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    items: ItemsConfig = ItemsConfig()
    users: UsersConfig = UsersConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    ranking: RankingConfig = RankingConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


_ALL_QUESTIONS = list(get_args(Questions))

PRESETS: dict[str, dict[str, Any]] = {
    "embedded": {},
    "gpu": {
        "model": {"name": "Qwen/Qwen3-VL-2B-Instruct", "batch_size": 128},
        "items": {"questions": _ALL_QUESTIONS, "fusion": "generate", "answer_tokens": 16},
        "users": {"window": 10, "step": 5, "summary_tokens": 48},
        "retrieval": {"candidates": 100},
        "training": {"rows": 20000, "learning_rate": 2e-4, "top_layers": 1000},
    },
    "server": {
        "model": {"server": "http://localhost:8000", "name": "Qwen/Qwen3-VL-2B-Instruct", "batch_size": 64},
        "items": {"questions": _ALL_QUESTIONS, "fusion": "generate", "answer_tokens": 16},
        "users": {"window": 10, "step": 5, "summary_tokens": 48},
        "training": {"rows": 0},
    },
    "tallrec": {
        "ranking": {"item": "title", "preference": False, "profile": False, "facts": False, "picture": False},
        "training": {"objectives": ["sft"], "negatives": 1, "rationales": "none"},
    },
    "mllm-msr": {
        "users": {"windows": "count", "window": 3, "step": 3},
        "ranking": {"item": "visual", "preference": True, "profile": False, "facts": False, "picture": False},
        "training": {"objectives": ["sft"], "negatives": 1, "rationales": "none"},
    },
}
"""`tallrec`, `mllm-msr`: what those systems tell and how they learn, on this engine. TALLRec: titles, Yes or No.
MLLM-MSR: titles with what the picture showed, and a preference carried through blocks that do not overlap."""


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _known_names(location: tuple[int | str, ...]) -> list[str]:
    node: Any = Config
    for key in location:
        node = node.model_fields[str(key)].annotation
    return list(node.model_fields)


def _full_names(key: str) -> list[str]:
    return [f"{section}.{key}" for section in Config.model_fields if key in _names_in(section)]


def _names_in(section: str) -> list[str]:
    return list(getattr(Config.model_fields[section].annotation, "model_fields", ()))


def _explain(error: ValidationError, source: str) -> UsageError:
    lines = []
    for problem in error.errors():
        *above, last = problem["loc"]
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_names(tuple(above))
            # A key of a section without the section's name is meant rather than a section that looks like it.
            near = [] if above else _full_names(str(last))
            near = near or get_close_matches(str(last), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"unknown key '{place}': {hint}")
        else:
            lines.append(f"'{place}': {problem['msg']} (got {problem['input']!r})")
    return UsageError(f"{source}: " + "; ".join(lines))


def build_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a nested dictionary.

    Raises:
        UsageError: a key is unknown (the nearest known one is named) or a value has the wrong type or range.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error, source) from None


def load_config(path: str | Path | None = None, preset: str = "embedded", overrides: tuple[str, ...] = ()) -> Config:
    """Defaults, then `preset`, then the YAML file at `path`, then `overrides` of the form `section.key=value`.

    Raises:
        UsageError: the preset, the file, a key or a value is not usable.
    """
    if preset not in PRESETS:
        raise UsageError(f"unknown preset '{preset}': choose one of {', '.join(PRESETS)}")
    values = PRESETS[preset]
    sources = [f"preset {preset}" if path is None else str(path)]
    if path is not None:
        values = _merge(values, read_yaml(Path(path)))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(f"'{override}' is not of the form section.key=value")
        try:
            nested: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override}: the value is not readable as YAML: {error}") from None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = _merge(values, nested)
        sources.append(f"--set {override}")
    return build_config(values, ", ".join(sources))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; an empty file is an empty mapping.

    Raises:
        UsageError: the file is missing, is not YAML, or holds something else than a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not readable as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected 'section:' mappings, found {type(values).__name__}")
    return values


def dump_config(config: Config) -> str:
    """The YAML text that `load_config` reads back to an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
