"""The configuration: what is written is read back, and what nobody knows is refused where it stands."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_srec.config import (
    PRESETS,
    Config,
    Questions,
    RankingConfig,
    UsersConfig,
    build_config,
    dump_config,
    load_config,
    read_yaml,
)
from mllm_srec.errors import UsageError

SECTIONS = [name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# What is read


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_comes_back_from_its_yaml(tmp_path: Path, preset: str) -> None:
    config = load_config(preset=preset)
    assert load_config(write(tmp_path / "c.yaml", dump_config(config))) == config


@given(
    hours=st.floats(0.1, 1e6),
    window=st.integers(1, 1000),
    rate=st.floats(1e-12, 1e6),
    cutoffs=st.lists(st.integers(1, 10**6), min_size=1),
    users=st.none() | st.integers(1, 10**9),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
)
def test_any_configuration_comes_back_from_its_yaml(
    tmp_path_factory: pytest.TempPathFactory,
    hours: float,
    window: int,
    rate: float,
    cutoffs: list[int],
    users: int | None,
    name: str,
) -> None:
    values = {
        "model": {"name": name},
        "users": {"windows": "session", "session_hours": hours, "window": window, "step": window},
        "training": {"learning_rate": rate},
        "evaluation": {"cutoffs": cutoffs, "users": users},
    }
    config = build_config(values)
    path = write(tmp_path_factory.mktemp("config") / "c.yaml", dump_config(config))
    assert load_config(path) == config
    assert config.evaluation.cutoffs == tuple(cutoffs)
    assert config.model.name == name


def test_the_default_is_the_embedded_model_at_its_small_size() -> None:
    config = load_config()
    assert config == Config() == load_config(preset="embedded")
    assert (config.model.name, config.users.window, config.retrieval.candidates) == ("embedded", 6, 30)
    assert config.users == UsersConfig(
        windows="count", window=6, step=3, session_hours=24, summary="generate", recent=10
    )


def test_a_preset_changes_its_keys_and_no_others() -> None:
    config = load_config(preset="gpu")
    assert config.model.name == "Qwen/Qwen3-VL-2B-Instruct"
    assert config.items.questions == get_args(Questions)
    assert (config.users.step, config.users.window, config.users.summary_tokens) == (5, 10, 48)
    assert config.users.windows == Config().users.windows
    assert config.data == Config().data
    assert config.evaluation == Config().evaluation


def test_a_server_writes_and_is_not_trained() -> None:
    config = load_config(
        preset="server", overrides=("model.name=llava", "model.server=https://gpu.example:8443/llm/v1")
    )
    assert (config.model.server, config.model.name) == ("https://gpu.example:8443/llm/v1", "llava")
    assert (config.items.fusion, config.users.summary, config.training.rows) == ("generate", "generate", 0)
    assert (config.model.concurrency, config.model.timeout, config.model.api_key_variable) == (8, 120, "")
    assert load_config().model.server == ""


def test_predecessors_tell_and_learn_as_they_did() -> None:
    titles, blocks = load_config(preset="tallrec"), load_config(preset="mllm-msr")
    for config in (titles, blocks):
        assert (config.training.objectives, config.training.negatives) == (("sft",), 1)  # pointwise: Yes or No
        assert config.training.rationales == "none"
        assert (config.model, config.items, config.retrieval) == (Config().model, Config().items, Config().retrieval)
    assert titles.ranking == RankingConfig(item="title", preference=False, profile=False, facts=False)
    assert titles.users == Config().users
    assert blocks.ranking == RankingConfig(item="visual", preference=True, profile=False, facts=False)
    assert blocks.users == UsersConfig(windows="count", window=3, step=3)  # no event is in two blocks
    assert titles.training == blocks.training


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "users: {step: 2, recent: 7}\nseed: 4\n")
    config = load_config(
        file, "gpu", ("users.recent=9", "users.recent=8", "items.questions=[kind]", "evaluation.users=3")
    )
    assert (config.users.step, config.users.recent, config.users.window) == (2, 8, 10)
    assert config.items.questions == ("kind",)
    assert (config.seed, config.evaluation.users) == (4, 3)


@pytest.mark.parametrize(
    ("override", "value"),
    [("training.learning_rate=1e-4", 1e-4), ("training.learning_rate=0.5", 0.5), ("training.learning_rate=1", 1.0)],
)
def test_numbers_are_read_as_people_write_them(override: str, value: float) -> None:
    assert load_config(overrides=(override,)).training.learning_rate == value


def test_an_override_may_hold_equals_signs_and_nothing() -> None:
    assert load_config(overrides=("model.name=a=b",)).model.name == "a=b"
    assert load_config(overrides=("evaluation.users=",)).evaluation.users is None


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}\n", "---\n"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path / "c.yaml", text)) == Config()


def test_a_configuration_cannot_be_changed_after_the_fact() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"usres": {"window": 5}}, "unknown key 'usres': did you mean 'users'?"),
        ({"users": {"recnt": 5}}, "unknown key 'users.recnt': did you mean 'recent'?"),
        ({"training": {"learning-rate": 1}}, "unknown key 'training.learning-rate': did you mean 'learning_rate'?"),
        ({"recent": 5}, "unknown key 'recent': did you mean 'users.recent'?"),
        ({"data": {"zzz": 1}}, "unknown key 'data.zzz': known keys: repeats, min_history, protocol, tie_rule, on_bad"),
        (
            {"zzz": 1},
            "unknown key 'zzz': known keys: seed, data, model, items, users, retrieval, ranking, training, eval",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        build_config(values, "here.yaml")
    assert str(error.value).startswith("here.yaml: ")
    assert message in str(error.value)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_refuses_unknown_keys_and_what_is_no_section(section: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown key '{section}\.no_such_key_x': "):
        build_config({section: {"no_such_key_x": 1}})
    with pytest.raises(UsageError, match=rf"'{section}': Input should be a valid dictionary.*got 5"):
        build_config({section: 5})


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError) as error:
        build_config({"users": {"recnt": 5, "window": 0}, "seed": "x"})
    assert all(place in str(error.value) for place in ("'users.recnt'", "'users.window'", "'seed'"))


@pytest.mark.parametrize(
    ("section", "key", "bad", "good"),
    [
        ("users", "recent", "many", 3),
        ("users", "recent", 2.5, 2),
        ("users", "windows", "day", "session"),
        ("users", "session_hours", 0, 0.5),
        ("users", "session_hours", float("inf"), 1),
        ("users", "summary_tokens", 3, 4),
        ("users", "summary", "rhyme", "generate"),
        ("users", "recent", -1, 0),
        ("users", "step", 7, 6),
        ("data", "min_history", 2, 3),
        ("data", "repeats", "last", "keep"),
        ("data", "protocol", "random", "global_time"),
        ("data", "tie_rule", "loose", "strict"),
        ("data", "on_bad_row", "ignore", "skip"),
        ("model", "dtype", "int4", "float32"),
        ("model", "batch_size", 0, 1),
        ("model", "name", 7, "seven"),
        ("model", "server", "localhost:8000", "http://localhost:8000"),
        ("model", "server", "http://", "https://host"),
        ("model", "server", "ftp://host", "http://host/v1"),
        ("model", "server", "http://host?x=1", "http://[::1]:80"),
        ("model", "concurrency", 0, 1),
        ("model", "timeout", 0, 0.1),
        ("model", "timeout", float("inf"), 1),
        ("items", "questions", ["kind", "smell"], ["style"]),
        ("items", "fusion", "melt", "generate"),
        ("retrieval", "candidates", 1, 2),
        ("retrieval", "weights", [], [0]),
        ("retrieval", "weights", [-1.0], [0.5]),
        ("retrieval", "weights", [float("nan")], [1]),
        ("training", "rows", -1, 0),
        ("training", "learning_rate", 0, 1e-9),
        ("training", "learning_rate", float("nan"), 1e-9),
        ("training", "learning_rate", float("inf"), 1.0),
        ("evaluation", "cutoffs", [], [1]),
        ("evaluation", "cutoffs", [0], [1]),
        ("evaluation", "bootstrap", 99, 100),
        ("evaluation", "users", 0, None),
    ],
)
def test_a_wrong_type_or_range_is_refused_with_the_place(section: str, key: str, bad: object, good: object) -> None:
    build_config({section: {key: good}})
    with pytest.raises(UsageError, match=rf"'{section}(\.{key}(\.\d)?)?': .*\(got "):
        build_config({section: {key: bad}})


@pytest.mark.parametrize(
    ("key", "secret"),
    [("server", "http://me:hunter2@host:8000"), ("api_key_variable", "sk-hunter2"), ("api_key_variable", "$hunter2")],
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(key: str, secret: str) -> None:
    with pytest.raises(
        UsageError, match=rf"'model\.{key}' (holds a user or a password|should be the name of)"
    ) as error:
        load_config(overrides=(f"model.{key}={secret}",))
    assert "hunter2" not in str(error.value)
    assert build_config({"model": {"api_key_variable": "SERVER_KEY_2"}}).model.api_key_variable == "SERVER_KEY_2"


@pytest.mark.parametrize("seed", [-1, 2**32, "x", None])
def test_a_seed_that_generators_refuse_is_refused_first(seed: object) -> None:
    with pytest.raises(UsageError, match="'seed': "):
        build_config({"seed": seed})
    assert build_config({"seed": 2**32 - 1}).seed == 2**32 - 1


def test_a_step_that_would_leave_events_out_is_refused() -> None:
    with pytest.raises(UsageError, match="step 6 is larger than window 5: events between would not be read"):
        load_config(overrides=("users.window=5", "users.step=6"))
    assert load_config(overrides=("users.window=5", "users.step=5")).users.step == 5


def test_a_key_of_an_earlier_version_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'users\.last'"):
        load_config(overrides=("users.last=30",))


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown preset 'cpu': choose one of embedded, gpu"):
        load_config(preset="cpu")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("users.recent", "'users.recent' is not of the form section.key=value"),
        ("=3", "'=3' is not of the form section.key=value"),
        ("usres.recent=3", "--set usres.recent=3: unknown key 'usres': did you mean 'users'?"),
        ("recent=3", "--set recent=3: unknown key 'recent': did you mean 'users.recent'?"),
        ("users.recent.most=3", "--set users.recent.most=3: 'users.recent': Input should be a valid integer"),
        ("users=3", "--set users=3: 'users': Input should be a valid dictionary"),
        ("users.recent=", "--set users.recent=: 'users.recent': Input should be a valid integer"),
        ("items.questions=[kind", "--set items.questions=[kind: the value is not readable as YAML"),
    ],
)
def test_an_override_that_cannot_be_used_is_named(override: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config(overrides=(override,))
    assert message in str(error.value)


def test_a_bad_file_is_named_beside_good_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "users: {recnt: 3}\n")
    with pytest.raises(UsageError) as error:
        load_config(file, overrides=("seed=1",))
    assert str(error.value).startswith(f"{file}, --set seed=1: unknown key 'users.recnt'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- users\n- items\n", "expected 'section:' mappings, found list"),
        (b"just words\n", "expected 'section:' mappings, found str"),
        (b"3\n", "expected 'section:' mappings, found int"),
        (b"users: {recent: 3\n", "not readable as YAML"),
        (b"users: \xff\xfe\n", "not readable as YAML"),
        (b"!!python/object/apply:os.getcwd []\n", "not readable as YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        load_config(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'1': Keys should be strings"):
        load_config(write(tmp_path / "c.yaml", "1: 2\n"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone.yaml: no such configuration file"):
        read_yaml(tmp_path / "gone.yaml")
