"""The one Trainer subclass: handed a model, a step plan and rows; it knows no files of data and no templates.

What differs from transformers' own Trainer, and why:

    loss         sum over targets, divided by the target weight of the whole step over passes and ranks
    data         passes come from the step plan, not from a sampler over equal batches
    evaluation   token-weighted, by the same passes, and without touching the random state of training
    checkpoints  complete or absent (checkpoints.py), without pickles, and no part of one may be missing
    bad numbers  a loss or gradient that is not finite never reaches the weights (bad_step.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, set_seed
from transformers.integrations import deactivate_neftune

from tunesmith.data.loading import RowSet
from tunesmith.data.report import SourceReport
from tunesmith.data.rows import AnswerRows, CachedRows, JoinedRows, StreamedRows
from tunesmith.errors import CheckpointError
from tunesmith.models.held import EVERYWHERE, Held
from tunesmith.models.save import (
    WHOLE_MODEL,
    checkpoint_weights,
    load_checkpoint_weights,
    split_files,
    split_index,
    split_name,
)
from tunesmith.packing.loader import PlanSampler, plan_loader
from tunesmith.packing.plan import StepPlan, fill_passes
from tunesmith.training.bad_step import RollBack, StepGuard
from tunesmith.training.checkpoints import (
    OPTIMIZER,
    PROGRESS,
    SCALER,
    SCHEDULER,
    TRAINER_STATE,
    Checkpoint,
    random_state_file,
)
from tunesmith.training.objectives import Objective, Outcome, Pack, means, pairs_of
from tunesmith.training.random_state import random_state, restore_random_state
from tunesmith.training.ranks import wait_for_all
from tunesmith.training.saving import Saver
from tunesmith.training.shared_save import Shares
from tunesmith.training.state_files import Files, read_state, state_file, weights_file
from tunesmith.training.strategy import (
    Fsdp,
    Strategy,
    Whole,
    Zero,
    buffers_kept,
    fsdp_on_cpu,
    keep_layers_whole,
    partition,
    sum_gradients_in_float32,
)


@dataclasses.dataclass
class StepCounts:
    """What one optimiser step held, over all ranks, when its first pass was fetched, and why it was left out,
    if it was."""

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    computed_tokens: int = 0  # what the model ran over: a prefix that rows share counts once a pass
    started_at: float = 0.0
    fault: str | None = None
    figures: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # sum, and of how many


class PackTrainer(Trainer):
    """Trains `model` on `train_rows` in the order of `plan`, to lower `objective`; evaluates on `valid_rows`
    if there are any, several examples to a pass if `is_packed`. `collate` makes a pack of rows; `decode`
    turns token ids into text, for the report of a bad step. `token_bytes` [V], where texts are evaluated, are
    the bytes a token stands for. `facts` are written into the manifest of each checkpoint. `penalty` of a
    model is a term of each step's loss that is not of its rows. `held`: which ranks have the
    weights."""

    optimizer: Any  # transformers declares these without a type
    lr_scheduler: Any

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        objective: Objective,
        collate: Callable[[Sequence[Any]], Pack],
        decode: Callable[[Any], str],
        plan: StepPlan,
        train_rows: RowSet,
        valid_rows: RowSet | None,
        valid_batch_tokens: int,
        is_packed: bool,
        token_bytes: NDArray[np.int64] | None,
        saver: Saver,
        guard: StepGuard,
        facts: Mapping[str, Any],
        lora_plus_ratio: float = 1.0,
        penalty: Callable[[Any], Tensor] | None = None,
        strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp",
        held: Held = EVERYWHERE,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.objective = objective
        self.collate = collate
        self.decode = decode
        self.plan = plan
        self.train_rows = train_rows
        self.valid_rows = valid_rows
        self.valid_batch_tokens = valid_batch_tokens
        self.is_packed = is_packed
        self.token_bytes = None if token_bytes is None else torch.from_numpy(token_bytes)
        self.saver = saver
        self.guard = guard
        self.facts = facts
        self.lora_plus_ratio = lora_plus_ratio
        self.held = held
        self.penalty = penalty
        ranks = args.world_size
        self.strategy: Strategy = (
            Whole()
            if strategy == "ddp"
            else Fsdp(ranks)
            if strategy == "fsdp"
            else Zero(3 if strategy == "zero3" else 2, ranks, self._groups)
        )
        self.step_counts = StepCounts()
        # What became of each row when it was fetched; the account of lazy and streamed rows.
        self.rows_report = SourceReport(
            ", ".join(report.path for report in train_rows.reports),
            ", ".join(dict.fromkeys(report.format for report in train_rows.reports)),
        )
        self._optimizer_groups: list[list[Tensor]] = []
        self._sampler: PlanSampler | None = None
        self._resume_step = 0
        self._step_packs: list[Pack] = []
        self._step_outcomes: list[Outcome] = []
        self._stream: dict[str, Any] | None = None  # where a stream can be taken up at this step
        self._loss_before = torch.zeros(())  # of the steps since the last logged line, without this one
        super().__init__(
            model=model,
            args=args,
            processing_class=None,
            train_dataset=train_rows.rows,
            callbacks=list(callbacks),
        )
        # No processing_class: transformers would rewrite the model's special tokens from it.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False

    @property
    def is_done(self) -> bool:
        """Whether the last step of the run has been trained."""
        return bool(self.state.global_step >= self.state.max_steps)

    def create_accelerator_and_postprocess(self) -> None:
        with fsdp_on_cpu():
            super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            sum_gradients_in_float32(self.accelerator.state.fsdp_plugin)

    # --- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader, self._sampler = plan_loader(
            self.train_rows.rows,  # type: ignore[arg-type]  # indexable is all that a map-style loader asks
            self.plan,
            rank=self.args.process_index,
            collate=self.collate,
            workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
        )
        self._sampler.resume_at(self._resume_step)
        return loader

    def train_from(self, checkpoint: Checkpoint | None) -> Any:
        """Train to the end, from a checkpoint or from the start. May be called again after RollBack."""
        if checkpoint is not None and checkpoint.step >= self.args.max_steps:
            # The end. transformers would train a step before it looks at their number.
            self._load_from_checkpoint(str(checkpoint.folder))
            self.state = TrainerState.load_from_json(str(checkpoint.folder / TRAINER_STATE))
            self.state.max_steps = checkpoint.step
            return None
        self._resume_step = checkpoint.step if checkpoint else 0
        if checkpoint is None and self.args.process_index:
            self._seed_this_rank()  # all built the model from one seed, and would drop out the same
        if self.optimizer is not None:
            self.optimizer = self.lr_scheduler = None  # made anew, and filled from the checkpoint
            if self.neftune_noise_alpha is not None:
                deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)
        # What has been imported and built stays: looking through it for garbage again and again took 2 to 5 %
        # of a step.
        gc.collect()
        gc.freeze()
        return self.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Pack], Tensor]:
        self.saver.poll()
        started_at = time.perf_counter()
        packs = [next(epoch_iterator) for _ in range(num_batches)]
        counts = torch.tensor(
            [
                float(sum(pack["total"] for pack in packs)),
                sum(len(pack["rows"]) for pack in packs),
                sum(pack["num_tokens"] for pack in packs),
                sum(pack["num_targets"] for pack in packs),
                sum(pack["input_ids"].shape[1] for pack in packs if pack["rows"]),
            ],
            dtype=torch.float64,
            device=device if device.type != "mps" else "cpu",
        )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        rows, tokens, targets, computed = map(int, counts[1:])
        self.step_counts = StepCounts(rows, tokens, targets, computed, started_at)
        self._step_packs, self._step_outcomes = packs, []
        self._loss_before = self._tr_loss.clone()
        # Rows on disk were counted when they were prepared.
        if not isinstance(self.train_rows.rows, CachedRows | JoinedRows | AnswerRows):
            for row in (row for pack in packs for row in pack["rows"]):
                self.rows_report.add(row)
                self._stream = row.stream or self._stream
        with self.autocast():
            self.objective.begin(self.model, map(self._prepare_inputs, packs), self._over_ranks)
        return packs, counts[0].float()

    def _prepare_input(self, data: Any) -> Any:
        """To the device as it is. transformers would round weights and log-probabilities to the number format
        of a DeepSpeed model, which is given none of them."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    # --- loss

    def compute_loss(
        self, model: Any, inputs: Pack, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """This pass's share of the step's loss: its sum by the total of the whole step.

        Times the number of ranks, since DDP and FSDP average gradients over them."""
        loss, figures = self.objective(model, inputs)
        assert num_items_in_batch is not None
        share = loss / num_items_in_batch.clamp(min=torch.finfo(torch.float32).tiny) * self.args.world_size
        self._step_outcomes.append(Outcome(share.detach(), figures))
        if self.penalty is not None and model.training:
            penalty = self.penalty(self.accelerator.unwrap_model(model)) / len(self._step_packs)
            share = share + (penalty - penalty.detach())  # its gradient; what is told is the objective
        return (share, None) if return_outputs else share

    def floating_point_ops(self, inputs: Pack) -> int:
        return 0  # MFU is told from models.cost; transformers' estimate counts frozen weights as trained

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Summed over all ranks, which call this together."""
        if self.args.world_size == 1:
            return sums
        summed: Tensor = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        return summed

    def _summed(self, outcomes: Sequence[Outcome]) -> tuple[float, dict[str, tuple[float, float]]]:
        """Loss and figures of the outcomes of all ranks."""
        names = list(outcomes[0].figures)
        sums = torch.stack(
            [
                torch.stack([outcome.loss, *(part for name in names for part in outcome.figures[name])])
                for outcome in outcomes
            ]
        ).sum(0)
        loss, *parts = self._over_ranks(sums).tolist()
        return loss, dict(zip(names, pairs_of(parts), strict=True))

    # --- optimiser

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Decay on matrices only, and not on tables of embeddings; LoRA's B matrices at `lora_plus_ratio`
        times the learning rate."""
        if self.optimizer is None:
            model = model or self.model
            tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
            groups: dict[tuple[bool, bool], list[Any]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    # Rows of embeddings, and the factors of (IA)^3, which are nothing at 1 and not at 0.
                    is_no_matrix = id(parameter) in tables or "trainable_tokens" in name or "ia3_l" in name
                    key = (parameter.ndim >= 2 and not is_no_matrix, "lora_B" in name)
                    groups.setdefault(key, []).append(parameter)
            self._optimizer_groups = list(groups.values())
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            learning_rate = kwargs["lr"]
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if is_matrix else 0.0,
                        "lr": learning_rate * (self.lora_plus_ratio if is_b else 1.0),
                    }
                    for (is_matrix, is_b), parameters in groups.items()
                ],
                **kwargs,
            )
        return self.optimizer

    def _groups(self) -> list[list[Tensor]]:
        """The parameters of each group of the optimiser; of one that a DeepSpeed config names, all in one."""
        return self._optimizer_groups or [[p for p in self.model.parameters() if p.requires_grad]]

    # --- bad numbers

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once a step, when gradients are whole and weights untouched: the place to judge a step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, ranks = self.state.global_step + 1, self.args.world_size
        total, self.step_counts.figures = self._summed(self._step_outcomes)
        loss = total / ranks  # every rank must come to the same judgement
        # A GradScaler (float16) meets infinite gradients in its normal course, and skips such steps itself.
        judged_norm = None if norm is None or self.args.fp16 else float(norm)
        if step in self.guard.skipped:
            self._leave_out(self.guard.skipped[step])
        elif fault := self.guard.fault(loss, judged_norm):
            self._meet_bad_step(step, fault, loss, None if norm is None else float(norm))
        else:
            self.guard.passed(loss)
            return norm
        return None  # no figure of a step that does not count

    def _meet_bad_step(self, step: int, fault: str, loss: float, grad_norm: float | None) -> None:
        """Write it down and do what `train.on_bad_step` says."""
        rows = gather_object(self._rows_of_step())
        if self.args.should_save:
            try:
                self.guard.record(step, fault, loss, grad_norm, rows)
            except OSError as error:
                self.saver.tolerate(str(self.guard.file), error)
        if self.guard.on_bad == "stop":
            raise self.guard.error(step, fault, rows)
        self.guard.leave_out(step, fault)
        if self.guard.on_bad == "rollback":
            self.saver.finish()
            self._wait_for_all(f"the judgement of step {step}")
            if self.saver.checkpoints.complete():
                raise RollBack(f"step {step}: {fault}")
        self._leave_out(fault)

    def _leave_out(self, fault: str) -> None:
        """Let this step pass without a trace in weights, optimiser and logged loss. The schedule and the
        random generators go on as if it had counted."""
        self.model.zero_grad()  # an optimiser passes over parameters without a gradient
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1  # the logged loss is a mean over the steps since then
        self.step_counts = StepCounts(started_at=self.step_counts.started_at, fault=fault)

    @torch.no_grad()
    def _rows_of_step(self) -> list[dict[str, Any]]:
        """This rank's examples of the step, each with its own mean loss, without dropout: a run alone."""
        self.model.eval()
        is_whole = isinstance(self.train_rows.rows, AnswerRows)
        examples = [
            (number, row if is_whole else dataclasses.replace(row, examples=(example,)), example)
            for number, pack in enumerate(self._step_packs)
            for row in pack["rows"]
            for example in row.examples
        ]
        found = []
        for number, row, example in examples:
            loss = self._loss_of([row])
            weights = example.token_weights()
            found.append(
                {
                    "row": row.place,
                    "pass": number,
                    "rank": self.args.process_index,
                    "loss": loss if math.isfinite(loss) else str(loss),
                    "text": self.decode(example.input_ids),
                    "input_ids": example.input_ids.tolist(),
                    "targets": (weights > 0).astype(int).tolist(),
                    "weights": weights.tolist(),
                }
            )
        if self.strategy.is_shared_out:  # the others may have more, and compute them with this rank's part
            for _ in range(max(gather_object([len(examples)])) - len(examples)):
                self._loss_of([])
        self.model.train()
        return found

    def _loss_of(self, rows: Sequence[Any]) -> float:
        """Mean loss of rows in a pass of their own."""
        pack = self._prepare_inputs(self.collate(rows))
        with self.autocast():
            return float(self.objective(self.model, pack).loss) / max(pack["total"], 1e-30)

    # --- evaluation

    @torch.no_grad()
    def ask(self, rows: Sequence[Any], question: Callable[[Any, Pack], Tensor]) -> Tensor:
        """What a question finds of rows in one pass, by the model as it is, without dropout."""
        was_training = self.model.training
        self.model.eval()
        with self.autocast():
            found = question(self.model, self._prepare_inputs(self.collate(rows)))
        self.model.train(was_training)
        return found

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over `valid_rows` (of next tokens: per unit of target weight, in nats), whatever the size
        of passes, and the means of the objective's figures; of
        texts also as perplexity and in bits per byte, which does not depend on how long tokens are."""
        assert self.valid_rows is not None
        started_at = time.perf_counter()
        rows = self.valid_rows
        ranks, rank = self.args.world_size, self.args.process_index
        passes = self.valid_passes()
        # As many for each rank, since a model that is shared out is computed together: the last may be empty.
        passes += [[] for _ in range(-len(passes) % ranks)]
        found, names = [], []
        was_training = self.model.training
        self.model.eval()
        with self.autocast():
            packs = (self._prepare_inputs(self._pack_of(items)) for items in passes[rank::ranks])
            self.objective.begin(self.model, packs, self._over_ranks)
        for items in passes[rank::ranks]:
            pack = self._pack_of(items)
            with self.autocast():
                loss, figures = self.objective(self.model, self._prepare_inputs(pack))
            names = list(figures)
            num_bytes = 0.0
            if self.token_bytes is not None:
                num_bytes = float((self.token_bytes[pack["targets"]] * pack["weights"].double()).sum())
            parts = [float(part) for name in names for part in figures[name]]
            found.append([float(loss), pack["total"], pack["num_targets"], num_bytes, *parts])
        self.model.train(was_training)
        sums = self._over_ranks(torch.tensor(found, dtype=torch.float64).sum(0))
        loss_sum, total, targets, num_bytes, *parts = sums.tolist()
        metrics = {
            "eval_loss": loss_sum / total,
            **self._of_texts(loss_sum, total, num_bytes),
            **means({f"eval_{name}": pair for name, pair in zip(names, pairs_of(parts), strict=True)}),
            "eval_rows": rows.num_rows,
            "eval_target_tokens": int(targets),
            "eval_s": time.perf_counter() - started_at,
        }
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )  # changes control in place
        return metrics

    def valid_passes(self) -> list[list[int]]:
        """The items of each pass of an evaluation."""
        assert self.valid_rows is not None
        if self.is_packed:
            return fill_passes(self.valid_rows.lengths, self.valid_batch_tokens)
        return [[item] for item in range(len(self.valid_rows.lengths))]

    def _pack_of(self, items: Sequence[int]) -> Pack:
        assert self.valid_rows is not None
        return self.collate([self.valid_rows.rows[item] for item in items])

    def _of_texts(self, nats: float, targets: float, num_bytes: float) -> dict[str, float]:
        """Perplexity, and bits per byte of the targets' text."""
        if self.token_bytes is None:
            return {}
        return {
            "eval_perplexity": math.exp(min(nats / targets, 700.0)),  # beyond that float64 has no number
            "eval_bits_per_byte": nats / (math.log(2) * num_bytes),
        }

    def autocast(self) -> Any:
        """The number format of training, for passes outside of it."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        return torch.autocast(self.args.device.type, dtype=dtype, enabled=self.args.bf16 or self.args.fp16)

    # --- checkpoints
    # transformers' own methods of these names write into the final folder, load pickles, and pass in silence
    # over what is missing.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Every rank takes part; the first one writes, and others where they share the weights out."""
        step, shards = self.state.global_step, self.strategy.num_shards
        epoch, _, _ = self.plan.steps.place(step)
        states = gather_object([random_state()])
        if shards > 1:
            if self.args.should_save:
                self.saver.begin(step)
            self._wait_for_all(f"the save of step {step}")
        files = self._model_files()
        if self.args.should_save:
            self.saver.save(
                step,
                files | self._other_files(states),
                {
                    **self.facts,
                    "epoch": self.state.epoch,
                    "seed": self.args.seed,
                    "ranks": self.args.world_size,
                    "shards": shards,
                    "random_states": [random_state_file(rank) for rank in range(self.args.world_size)],
                    "plan": {
                        "epoch": epoch,
                        "step_in_epoch": step - self.plan.steps.first_step(epoch),
                        "steps_per_epoch": self.plan.steps_per_epoch,
                        "batch_size": self.plan.batch_size,
                        "passes": self.plan.passes,
                    },
                    "best_step": self.state.best_global_step,
                    "best_eval_loss": self.state.best_metric,
                },
                best=self.state.best_global_step,
                shares=Shares(shards, self.args.ddp_timeout) if shards > 1 else None,
            )
        elif shards > 1:
            self.saver.save_share(step, files, self.args.process_index)
        self._wait_for_all(f"the end of the save of step {step}")

    def _wait_for_all(self, what: str) -> None:
        wait_for_all(what, self.args.ddp_timeout)

    def _model_files(self) -> Files:
        """What this rank writes of model and optimiser."""
        rank, shards = self.args.process_index, self.strategy.num_shards
        name, tensors, config = checkpoint_weights(self.accelerator.unwrap_model(self.model))
        # PEFT reads an adapter from one file.
        parts = shards if name == WHOLE_MODEL else 1
        own = {}
        for i, (key, tensor) in enumerate(tensors.items()):
            whole = self.strategy.whole(tensor)
            if i % parts == rank:
                own[key] = whole if shards == 1 else whole.cpu()
        state = self.strategy.optimizer_state(self.optimizer, lambda i: i % shards == rank)
        files: Files = {**config} if rank == 0 else {}
        if rank < parts:
            files[split_name(name, rank, parts)] = weights_file(own)
        if rank < shards:
            files[split_name(OPTIMIZER, rank, shards)] = state_file(state)
        if rank == 0 and parts > 1:
            files[f"{name}.index.json"] = split_index(name, list(tensors), parts)
        return files

    def _other_files(self, random_states: Sequence[Any]) -> Files:
        self.state.stateful_callbacks["TrainerControl"] = self.control.state()
        progress = {**self.guard.state(), "rows": self.rows_report.as_dict(), "stream": self._stream}
        files: Files = {
            SCHEDULER: state_file(self.lr_scheduler.state_dict()),
            TRAINER_STATE: json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True).encode(),
            PROGRESS: json.dumps(progress, indent=2).encode(),
        }
        if self.accelerator.scaler is not None:
            files[SCALER] = state_file(self.accelerator.scaler.state_dict())
        for rank, state in enumerate(random_states):
            files[random_state_file(rank)] = state_file(state)
        return files

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """transformers would look for the engines' own checkpoints, and load by itself."""
        if isinstance(self.strategy, Zero) and self.strategy.stage == 3:
            keep_layers_whole(self.model)
        with buffers_kept(self.model) if self.is_fsdp_enabled else contextlib.nullcontext():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            if self.strategy.is_shared_out:  # else it has been done, before the model was wrapped
                self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Called between the making of the optimiser, which looks at shapes, and DeepSpeed's preparation."""
        if training and isinstance(self.strategy, Zero) and self.strategy.stage == 3:
            partition(self.model, self.args.hf_deepspeed_config.config, here=self.held.here)
        return super()._wrap_model(model, training, dataloader)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_checkpoint_weights(
            folder, self.accelerator.unwrap_model(model or self.model), self.strategy.set_whole
        )
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        self.guard.restore(progress)
        self.rows_report = SourceReport.from_dict(progress["rows"])
        if isinstance(self.train_rows.rows, StreamedRows):
            self._stream = progress["stream"]
            self.train_rows.rows.start_at(self._stream)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        try:
            parts = (read_state(file) for file in split_files(folder, OPTIMIZER))
            self.strategy.load_optimizer_state(self.optimizer, parts)
            self.lr_scheduler.load_state_dict(read_state(folder / SCHEDULER))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder}: is of another optimiser or model: {error}") from error

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(read_state(Path(checkpoint) / SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """This rank's generators; those of ranks that the checkpoint does not have are drawn from the
        seed."""
        if checkpoint is None:
            return
        rank = self.args.process_index
        file = Path(checkpoint) / random_state_file(rank)
        if file.is_file():
            restore_random_state(read_state(file))
        else:
            self._seed_this_rank()

    def _seed_this_rank(self) -> None:
        set_seed((self.args.seed + 1_000_003 * self.args.process_index + self._resume_step) % 2**32)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Of what is logged the trainer's state keeps evaluations alone, which decide what is best: with
        every line, checkpoints would grow with each step."""
        super().log(logs, start_time)
        if "eval_loss" not in logs:
            self.state.log_history.pop()
