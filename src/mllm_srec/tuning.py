"""Stage 3, LoRA fine-tuning on packed rows: one row is one user, a positive, its negatives, and rationales for two.

Loss of a row, by objective:

    odds        listwise cross-entropy of the log-odds of "Yes" (the positive among its negatives)
    likelihood  the same of SHARPNESS * the candidates' mean log-likelihood
    listwise    odds + likelihood
    sft         token loss of the answers + of the rationales (multi-step chain of thought; Sci Rep 2025, Table 1)
    both        odds + ANSWER_WEIGHT * answers + COT_WEIGHT * rationales

The listwise parts have retrieval's scores beside the reading: what retrieval knows already need not be learnt.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

from mllm_srec.config import Config, Objective
from mllm_srec.errors import ModelError, StoreError
from mllm_srec.mllm.base import Candidate, Request, told
from mllm_srec.mllm.guard import check_once
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.pieces import Piece, text_piece
from mllm_srec.mllm.scoring import asked_pieces, own_words, read_segments
from mllm_srec.progress import Bar, say
from mllm_srec.prompts import ranking as prompts
from mllm_srec.records import TrainingRecord
from mllm_srec.store_files import CHECKPOINTS
from mllm_srec.workspace import atomic_write, fingerprint, read_manifest, write_manifest

ANSWER_WEIGHT = 0.1
COT_WEIGHT = 0.1
SHARPNESS = 10.0
"""Mean log-likelihoods of likely and unlikely texts are a tenth of a nat apart, log-odds a whole one."""
RETRIEVAL_WEIGHT = 0.5
"""Of retrieval's score, in deviations of the candidate list, beside a listwise reading: what fits best alone."""
LOOKS = 2
"""How often validation is looked at during a training, besides the look before it."""
LOSSES = "losses.json"
"""Mean loss of each optimiser step: [{"step": 1, "loss": 0.7}, ...]."""
LOOKED = "looks.json"
"""What validation said: [{"step": 0, "loglik": -2.1, "logliks": [of each list]}, ...]."""
MARK = "fingerprint.txt"
LOOKED_AT = "looked-at"
Look = Callable[[], list[float]]
"""How likely each of some validation targets is by the model as it stands (log-likelihood, nats)."""


def row_loss(mllm: LocalMllm, record: TrainingRecord, objective: Objective = "both") -> torch.Tensor:
    """Scalar float32 loss of one packed row; the positive is the request's first candidate."""
    renderer, request = mllm.renderer, record.request
    encoded = renderer.encode_request(request)
    direct = asked_pieces(mllm, request, encoded)
    reasoned: list[list[Piece]] = []
    rationales: list[list[int]] = []
    language = objective in ("sft", "both")
    if record.cot and language:
        # Of the items' texts alone, as reasons are asked for (`records.explain_questions`).
        thinking = renderer.encode_request(
            Request(request.prefix, tuple(map(_text, request.candidates)), prompts.QUESTION_COT)
        )
        end = renderer.tokenizer.eos_token_id
        rationales = [[*renderer.ids(renderer.lead + renderer.neutral(text)), end] for _, text in record.cot]
        # The last token of a rationale is only foretold, never read.
        reasoned = [
            [text_piece([*thinking.candidates[at], *thinking.behind[at], *words[:-1]])]
            for (at, _), words in zip(record.cot, rationales, strict=True)
        ]
    last, hidden, ends = read_segments(mllm, encoded, [*direct, *reasoned])

    answers = hidden[torch.tensor(ends[: len(direct)], device=hidden.device) - 1]
    losses = []
    if objective != "sft":
        beside = torch.tensor(record.retrieval or [0.0] * len(direct), device=hidden.device)
        if objective != "likelihood":
            labels = mllm.label_logits(answers)
            losses.append(_listwise(labels[:, 0] - labels[:, 1], beside))
        if objective in ("likelihood", "listwise"):
            losses.append(_listwise(SHARPNESS * _likelihoods(mllm, encoded.candidates, last, hidden, ends), beside))
    if language:
        weight, cot_weight = (1.0, 1.0) if objective == "sft" else (ANSWER_WEIGHT, COT_WEIGHT)
        losses.append(weight * _answer_loss(mllm, answers))
        if rationales:
            losses.append(cot_weight * _rationale_loss(mllm, rationales, hidden, ends[len(direct) :]))
    return torch.stack(losses).sum()


def _text(candidate: Candidate) -> str:
    """What `Catalogue.candidate` says of an item before its picture."""
    return candidate if isinstance(candidate, str) else next(part for part in candidate if isinstance(part, str))


def _listwise(reading: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the first of (C,) candidates."""
    first = torch.zeros(1, dtype=torch.long, device=reading.device)
    return functional.cross_entropy((reading + RETRIEVAL_WEIGHT * beside)[None], first)


def _likelihoods(
    mllm: LocalMllm, candidates: Sequence[list[int]], last: torch.Tensor, hidden: torch.Tensor, ends: Sequence[int]
) -> torch.Tensor:
    """float32 (C,): mean log-likelihood of each candidate's words, as `scoring` reads it."""
    values = []
    for tokens, start, stop in zip(candidates, [0, *ends], ends, strict=False):
        states, words = own_words(mllm, tokens, last, hidden[start:stop])
        wanted = torch.tensor(words, device=hidden.device)
        values.append(-functional.cross_entropy(mllm.logits(states), wanted))
    return torch.stack(values)


def _answer_loss(mllm: LocalMllm, answers: torch.Tensor) -> torch.Tensor:
    """Token loss of "Yes" behind the first of (C, D) last hidden states and "No" behind the others."""
    yes, no = mllm.renderer.label_ids
    said = torch.tensor([yes] + [no] * (len(answers) - 1), device=answers.device)
    losses = functional.cross_entropy(mllm.logits(answers), said, reduction="none")
    # Half the weight for the one positive: otherwise "No" to everything would be the cheapest answer.
    negatives = losses[1:].mean() if len(answers) > 1 else losses[0]
    return (losses[0] + negatives) / 2


def _rationale_loss(
    mllm: LocalMllm, rationales: Sequence[list[int]], hidden: torch.Tensor, stops: Sequence[int]
) -> torch.Tensor:
    states, wanted = [], []
    for words, stop in zip(rationales, stops, strict=True):
        states.append(hidden[stop - len(words) : stop])
        wanted += words
    return functional.cross_entropy(mllm.logits(torch.cat(states)), torch.tensor(wanted, device=hidden.device))


class _PackedTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer over records; the loss is ours, the loop, the schedule and the checkpoints are its own."""

    def __init__(self, mllm: LocalMllm, objective: Objective, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._mllm, self._objective = mllm, objective
        self.model_accepts_loss_kwargs = False  # so that the loss is divided by the accumulated rows
        if self.accelerator.num_processes > 1:
            # DistributedDataParallel gathers gradients of its own forward pass, which packed rows do not go through.
            self.accelerator.prepare_model = lambda model, *_, **__: model

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        # A tower's batch statistics must stay as they were loaded, and packed attention drops nothing out. Layers that
        # are checkpointed look at their mode.
        model.eval()
        if self._mllm.model.is_activation_checkpointing:
            self._mllm.model.get_decoder().train()
        loss = torch.stack([row_loss(self._mllm, record, self._objective) for record in inputs["records"]]).mean()
        if not torch.isfinite(loss):  # the Trainer would leave it out of its mean and go on
            raise ModelError("the training loss is not finite: lower training.learning_rate or use model.dtype=float32")
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Called once before every step: the gradients of all processes become their mean."""
        if self.accelerator.num_processes > 1:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.accelerator.num_processes
        return super()._clip_grad_norm(model)


class _Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, bar: Bar, rows_per_step: int, total: int) -> None:
        self._bar, self._rows, self._left = bar, rows_per_step, total

    def _advance(self, rows: int) -> None:
        self._bar.advance(min(rows, self._left))
        self._left -= min(rows, self._left)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(state.global_step * self._rows)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(self._rows)


class _Looks(TrainerCallback):  # type: ignore[misc]
    """Looks at validation before the training and `LOOKS` times in it; the last adapter that is not worse than the best
    is kept. That is early stopping in what is kept, not in time: the learning rate falls to 0 over all steps, so that a
    look on the way is at an adapter that still jumps, and most is learnt in the last quarter.

    Worse is what lies more than two standard errors of the paired difference below: a few dozen lists tell no finer,
    and of adapters that they do not tell apart the one that has learnt longest is the better guess. A training that
    goes on from a checkpoint makes the looks behind it again.
    """

    def __init__(self, look: Look, folder: Path, main: bool) -> None:
        self._look, self._folder, self._main = look, folder, main
        self.made: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if (self._folder / LOOKED).exists():
            kept = json.loads((self._folder / LOOKED).read_text(encoding="utf-8"))
            self.made = [made for made in kept if made["step"] <= state.global_step]
        if not self.made:
            self._add(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in {round(state.max_steps * look / LOOKS) for look in range(1, LOOKS + 1)}:
            self._add(state, model)

    def _add(self, state: Any, model: Any) -> None:
        # One process's word counts for all: were rounding to tell two of them different things, one would wait forever.
        (logliks,) = broadcast_object_list([self._look() if self._main else []])
        self.made.append({"step": state.global_step, "loglik": fmean(logliks), "logliks": logliks})
        if self._main:
            model.save_pretrained(str(self._folder / f"{LOOKED_AT}-{state.global_step}"), save_embedding_layers=False)
            atomic_write(self._folder / LOOKED, json.dumps(self.made))
            said = f"log-likelihood on validation {fmean(logliks):.4f}"
            say(f"train: step {state.global_step} of {state.max_steps}: {said}")

    def _worse(self, made: dict[str, Any]) -> bool:
        best = max(self.made, key=lambda other: other["loglik"])
        below = [b - m for b, m in zip(best["logliks"], made["logliks"], strict=True)]
        error = stdev(below) / len(below) ** 0.5 if len(below) > 1 else 0.0
        return fmean(below) > 2 * error

    @property
    def kept(self) -> dict[str, Any]:
        """The look at the adapter that is kept."""
        return next(made for made in reversed(self.made) if not self._worse(made))


def train(
    mllm: LocalMllm,
    records: Sequence[TrainingRecord],
    config: Config,
    folder: Path,
    objective: Objective = "both",
    look: Look | None = None,
) -> None:
    """Fit a LoRA adapter on `records`, save it in `folder` and attach it to `mllm`.

    An adapter made of the same records, weights and settings is reused; an interrupted training goes on from its last
    complete checkpoint and ends with the same adapter. Under `accelerate launch` every process reads its share of the
    rows, and the first one writes.

    Args:
        look: asked before the training and `LOOKS` times in it; the last adapter is kept that it does not find worse
            than the best. Without it the last one is.

    Raises:
        ModelError: packed rows do not say what separate prompts say, or the loss is not finite.
    """
    settings = config.training
    mllm.drop_adapter()
    model, made_of_this = mllm.identity, mark(mllm, records, config, objective)
    if made_of(folder) == made_of_this:
        say(f"train: adapter of {len(records):,} rows reused")
        mllm.load_adapter(folder)
        return
    check_once(mllm, [record.request for record in records[:2]])
    checkpoints = folder / CHECKPOINTS
    arguments = _arguments(config, checkpoints, mllm.device.type == "cpu")
    main = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        if not (checkpoints / MARK).exists() or (checkpoints / MARK).read_text(encoding="utf-8") != made_of_this:
            shutil.rmtree(folder, ignore_errors=True)
            checkpoints.mkdir(parents=True)
            atomic_write(checkpoints / MARK, made_of_this)
        start = _last_complete(checkpoints)

    peft_model = mllm.attach_adapter(settings.rank, settings.top_layers, config.seed)
    if settings.head_start:
        mllm.take_head_start()
    rows = len(records) * settings.epochs
    looks = _Looks(look, checkpoints, main) if look is not None else None
    with Bar("train", rows) as bar:
        trainer = _PackedTrainer(
            mllm,
            objective,
            model=peft_model,
            args=arguments,
            train_dataset=_Rows(records),
            data_collator=lambda batch: {"records": batch},
            callbacks=[_Progress(bar, settings.accumulate, rows), *([looks] if looks else [])],
        )
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        try:
            with checkpointed(mllm) if settings.gradient_checkpointing else nullcontext():
                trainer.train(resume_from_checkpoint=start)
        except BaseException:
            mllm.drop_adapter()  # nothing may be scored with half an adapter
            raise
    if main:
        losses = [{"step": of["step"], "loss": of["loss"]} for of in trainer.state.log_history if "loss" in of]
        # The Trainer's own figure is of the steps behind the last checkpoint.
        mean = fmean(of["loss"] for of in losses)
        facts = {"rows": rows, "objective": objective, "training_loss": mean}
        _save(
            peft_model, looks, folder, config.model.name, losses, {"fingerprint": made_of_this, "model": model, **facts}
        )
    arguments.distributed_state.wait_for_everyone()
    mllm.load_adapter(folder)


def _save(
    peft_model: Any,
    looks: _Looks | None,
    folder: Path,
    name: str,
    losses: list[dict[str, float]],
    manifest: dict[str, object],
) -> None:
    """The adapter with what is known of its training, the manifest last; then the checkpoints go."""
    peft_model.peft_config["default"].base_model_name_or_path = name
    if looks is not None and looks.made:
        kept = looks.kept
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(folder / CHECKPOINTS / f"{LOOKED_AT}-{kept['step']}" / file, folder / file)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        atomic_write(folder / "adapter_config.json", json.dumps(config | {"base_model_name_or_path": name}, indent=2))
        atomic_write(folder / LOOKED, json.dumps(looks.made))
        manifest |= {"kept": {name: kept[name] for name in ("step", "loglik")}}
    else:
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would ask the hub about `name`
    (folder / "README.md").unlink(missing_ok=True)  # peft's form for a model card, empty
    atomic_write(folder / LOSSES, json.dumps(losses))
    write_manifest(folder, manifest)
    shutil.rmtree(folder / CHECKPOINTS)


@contextmanager
def checkpointed(mllm: LocalMllm) -> Iterator[None]:
    """For as long as the context lasts layers keep only their input, and are read again in the backward pass.

    Not left to the Trainer: it has the embeddings ask for gradients, which only reentrant checkpoints need, and the
    layers below the adapter would be read backwards too.
    """
    mllm.model.activation_checkpointing_enable({"use_reentrant": False})
    mllm.model.disable_input_require_grads()
    mllm.model.get_decoder().train()  # in evaluation mode transformers does not checkpoint
    try:
        yield
    finally:
        mllm.model.activation_checkpointing_disable()
        mllm.model.eval()


def is_main_process() -> bool:
    """Whether this process writes: the only one, or the first under `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def main_process_first() -> Iterator[None]:
    """Under `accelerate launch` the first process goes ahead, and the others find what it has written."""
    if process_count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        yield


def _arguments(config: Config, checkpoints: Path, on_cpu: bool) -> TrainingArguments:
    settings = config.training
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, settings.accumulate // process_count()),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and process_count() > 1 else None,
        seed=config.seed,
    )
    # Several GPUs of one process would be used by DataParallel, which splits tensors, not rows.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def mark(mllm: LocalMllm, records: Sequence[TrainingRecord], config: Config, objective: Objective = "both") -> str:
    """The fingerprint of everything an adapter is made from; `mllm` carries none while this is computed."""
    rows = (_content(record) for record in records)
    settings = config.training.model_dump_json(exclude={"objectives", "teacher"})
    began = mllm.head_start_identity if config.training.head_start else ""
    return fingerprint(mllm.identity, began, settings, objective, config.seed, prompts.VERSION, *rows)


def made_of(folder: Path) -> str | None:
    """The fingerprint of a finished adapter; None without one, or if its files are damaged: it is then made again."""
    if not (folder / "manifest.json").exists():
        return None
    try:
        return str(read_manifest(folder)["fingerprint"])
    except StoreError as error:
        say(f"train: {error}")
        return None


def validated(folder: Path) -> float:
    """The mean log-likelihood on validation that a finished training's adapter has; minus infinity if it has not
    looked."""
    return float(read_manifest(folder).get("kept", {}).get("loglik", float("-inf")))


class _Rows(torch.utils.data.Dataset[TrainingRecord]):
    def __init__(self, records: Sequence[TrainingRecord]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> TrainingRecord:
        return self._records[index]


def _content(record: TrainingRecord) -> str:
    request = record.request
    prefix = [fingerprint(part) if isinstance(part, str) else part.sha256 for part in request.prefix.parts]
    beside = [f"{value:.6g}" for value in record.retrieval]
    groups = (prefix, map(told, request.candidates), [f"{at}:{text}" for at, text in record.cot], beside)
    told_apart = (*(fingerprint(*group) for group in groups), fingerprint(*request.notes))
    return fingerprint(request.prefix.system, request.question, *told_apart)


def _last_complete(checkpoints: Path) -> str | None:
    """The newest checkpoint whose state, which is written last, is there; half-written ones are removed."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    for path in reversed(found):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        except (FileNotFoundError, ValueError):
            shutil.rmtree(path)
    return None
