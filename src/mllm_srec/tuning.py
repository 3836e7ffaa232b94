"""Stage 3, LoRA fine-tuning on packed rows: one row is one user, a positive, its negatives, and rationales for two.

Loss of a row = listwise cross-entropy of the odds of "Yes" (the positive among its negatives)
+ ANSWER_WEIGHT * token loss of the answers + COT_WEIGHT * token loss of the rationales (multi-step chain of thought).
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

from mllm_srec.config import Config
from mllm_srec.errors import ModelError, StoreError
from mllm_srec.mllm.base import Request, told
from mllm_srec.mllm.guard import check_once
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.pieces import Piece, text_piece
from mllm_srec.mllm.scoring import candidate_pieces, read_segments
from mllm_srec.progress import Bar, say
from mllm_srec.prompts import ranking as prompts
from mllm_srec.records import TrainingRecord
from mllm_srec.store_files import CHECKPOINTS
from mllm_srec.workspace import atomic_write, fingerprint, read_manifest, write_manifest

ANSWER_WEIGHT = 0.1
COT_WEIGHT = 0.1
LOSSES = "losses.json"
"""Mean loss of each optimiser step: [{"step": 1, "loss": 0.7}, ...]."""
MARK = "fingerprint.txt"


def row_loss(mllm: LocalMllm, record: TrainingRecord) -> torch.Tensor:
    """Scalar float32 loss of one packed row; the positive is the request's first candidate."""
    renderer, request = mllm.renderer, record.request
    encoded = renderer.encode_request(request)
    candidates, question = candidate_pieces(mllm, request, encoded), text_piece(encoded.question)
    direct = [[candidate, question] for candidate in candidates]
    reasoned: list[list[Piece]] = []
    rationales: list[list[int]] = []
    if record.cot:
        thinking = renderer.encode_request(
            Request(request.prefix, request.candidates[:1], prompts.QUESTION_COT)
        ).question
        end = renderer.tokenizer.eos_token_id
        rationales = [[*renderer.ids(renderer.lead + renderer.neutral(text)), end] for _, text in record.cot]
        # The last token of a rationale is only foretold, never read.
        reasoned = [
            [candidates[at], text_piece([*thinking, *words[:-1]])]
            for (at, _), words in zip(record.cot, rationales, strict=True)
        ]
    hidden, ends = read_segments(mllm, encoded, [*direct, *reasoned])

    answers = hidden[torch.tensor(ends[: len(direct)], device=hidden.device) - 1]
    labels = mllm.label_logits(answers)
    odds = labels[:, 0] - labels[:, 1]
    loss = functional.cross_entropy(odds[None], torch.zeros(1, dtype=torch.long, device=odds.device))

    yes, no = renderer.label_ids
    said = torch.tensor([yes] + [no] * (len(direct) - 1), device=hidden.device)
    likelihoods = functional.cross_entropy(mllm.logits(answers), said, reduction="none")
    # Half the weight for the one positive: otherwise "No" to everything would be the cheapest answer.
    negatives = likelihoods[1:].mean() if len(direct) > 1 else likelihoods[0]
    loss = loss + ANSWER_WEIGHT * (likelihoods[0] + negatives) / 2

    if rationales:
        states, wanted = [], []
        for words, stop in zip(rationales, ends[len(direct) :], strict=True):
            states.append(hidden[stop - len(words) : stop])
            wanted += words
        told = functional.cross_entropy(mllm.logits(torch.cat(states)), torch.tensor(wanted, device=hidden.device))
        loss = loss + COT_WEIGHT * told
    return loss


class _PackedTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer over records; the loss is ours, the loop, the schedule and the checkpoints are its own."""

    def __init__(self, mllm: LocalMllm, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._mllm = mllm
        self.model_accepts_loss_kwargs = False  # so that the loss is divided by the accumulated rows

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        # A tower's batch statistics must stay as they were loaded, and packed attention drops nothing out. Layers that
        # are checkpointed look at their mode.
        model.eval()
        if self._mllm.model.is_activation_checkpointing:
            self._mllm.model.get_decoder().train()
        loss = torch.stack([row_loss(self._mllm, record) for record in inputs["records"]]).mean()
        if not torch.isfinite(loss):  # the Trainer would leave it out of its mean and go on
            raise ModelError("the training loss is not finite: lower training.learning_rate or use model.dtype=float32")
        return loss


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


def train(mllm: LocalMllm, records: Sequence[TrainingRecord], config: Config, folder: Path) -> None:
    """Fit a LoRA adapter on `records`, save it in `folder` and attach it to `mllm`.

    An adapter made of the same records, weights and settings is reused; an interrupted training goes on from its last
    complete checkpoint and ends with the same adapter.

    Raises:
        ModelError: packed rows do not say what separate prompts say, or the loss is not finite.
    """
    settings = config.training
    mllm.drop_adapter()
    model, made_of_this = mllm.identity, mark(mllm, records, config)
    if made_of(folder) == made_of_this:
        say(f"train: adapter of {len(records):,} rows reused")
        mllm.load_adapter(folder)
        return
    check_once(mllm, [record.request for record in records[:2]])
    checkpoints = folder / CHECKPOINTS
    if not (checkpoints / MARK).exists() or (checkpoints / MARK).read_text(encoding="utf-8") != made_of_this:
        shutil.rmtree(folder, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        atomic_write(checkpoints / MARK, made_of_this)

    peft_model = mllm.attach_adapter(settings.rank, settings.top_layers, config.seed)
    arguments = _arguments(config, checkpoints, mllm.device.type == "cpu")
    rows = len(records) * settings.epochs
    with Bar("train", rows) as bar:
        trainer = _PackedTrainer(
            mllm,
            model=peft_model,
            args=arguments,
            train_dataset=_Rows(records),
            data_collator=lambda batch: {"records": batch},
            callbacks=[_Progress(bar, settings.accumulate, rows)],
        )
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        try:
            with checkpointed(mllm) if settings.gradient_checkpointing else nullcontext():
                result = trainer.train(resume_from_checkpoint=_last_complete(checkpoints))
        except BaseException:
            mllm.drop_adapter()  # nothing may be scored with half an adapter
            raise
    peft_model.peft_config["default"].base_model_name_or_path = config.model.name
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would ask the hub about `name`
    (folder / "README.md").unlink(missing_ok=True)  # peft's form for a model card, empty
    losses = [{"step": of["step"], "loss": of["loss"]} for of in trainer.state.log_history if "loss" in of]
    atomic_write(folder / LOSSES, json.dumps(losses))
    write_manifest(
        folder, {"fingerprint": made_of_this, "model": model, "rows": rows, "training_loss": result.training_loss}
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    mllm.load_adapter(folder)


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


def _arguments(config: Config, checkpoints: Path, on_cpu: bool) -> TrainingArguments:
    settings = config.training
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulate,
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
        seed=config.seed,
    )
    # Several GPUs of one process would be used by DataParallel, which splits tensors, not rows.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def mark(mllm: LocalMllm, records: Sequence[TrainingRecord], config: Config) -> str:
    """The fingerprint of everything an adapter is made from; `mllm` carries none while this is computed."""
    rows = (_content(record) for record in records)
    return fingerprint(mllm.identity, config.training.model_dump_json(), config.seed, prompts.VERSION, *rows)


def made_of(folder: Path) -> str | None:
    """The fingerprint of a finished adapter; None without one, or if its files are damaged: it is then made again."""
    if not (folder / "manifest.json").exists():
        return None
    try:
        return str(read_manifest(folder)["fingerprint"])
    except StoreError as error:
        say(f"train: {error}")
        return None


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
    groups = (prefix, map(told, request.candidates), [f"{at}:{text}" for at, text in record.cot])
    return fingerprint(request.prefix.system, request.question, *(fingerprint(*group) for group in groups))


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
