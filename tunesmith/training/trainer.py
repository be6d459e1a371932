"""The one Trainer subclass: handed a model, a step plan and rows; it knows no files of data and no templates.

What differs from transformers' own Trainer, and why:

    loss         sum over targets, divided by the target weight of the whole step over passes and ranks
    data         passes come from the step plan, not from a sampler over equal batches
    evaluation   token-weighted, by the same passes, and without touching the random state of training
    checkpoints  complete or absent (checkpoints.py)
    bad numbers  the first loss or gradient that is not finite ends the run, before the weights see it
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from tunesmith.data.loading import RowSet
from tunesmith.data.report import SourceReport
from tunesmith.data.rows import CachedRows
from tunesmith.models.save import save_weights
from tunesmith.packing.loader import PlanSampler, plan_loader
from tunesmith.packing.plan import StepPlan, fill_passes
from tunesmith.training.bad_step import write_bad_step
from tunesmith.training.checkpoints import Checkpoint, Checkpoints

Pack = dict[str, Any]
# (model, pack) -> sum over the pack's targets of weight * loss, a float32 scalar.
Objective = Callable[[Any, Pack], Tensor]


@dataclasses.dataclass
class StepCounts:
    """What one optimiser step held, over all ranks, and when its first pass was fetched."""

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    computed_tokens: int = 0  # what the model ran over: a prefix that rows share counts once a pass
    started_at: float = 0.0


class PackTrainer(Trainer):
    """Trains `model` on `train_rows` in the order of `plan`, to lower `objective`; evaluates on `valid_rows`
    if there are any. `collate` makes a pack of rows; `decode` turns token ids into text, for the report of a
    bad step."""

    optimizer: Any  # transformers declares it without a type

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
        checkpoints: Checkpoints,
        lora_plus_ratio: float = 1.0,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.objective = objective
        self.collate = collate
        self.decode = decode
        self.plan = plan
        self.train_rows = train_rows
        self.valid_rows = valid_rows
        self.valid_batch_tokens = valid_batch_tokens
        self.checkpoints = checkpoints
        self.lora_plus_ratio = lora_plus_ratio
        self.step_counts = StepCounts()
        # What became of each row when it was fetched; the account of lazy and streamed rows.
        self.rows_report = SourceReport(
            ", ".join(report.path for report in train_rows.reports),
            ", ".join(dict.fromkeys(report.format for report in train_rows.reports)),
        )
        self._sampler: PlanSampler | None = None
        self._resume_step = 0
        self._step_packs: list[Pack] = []
        self._step_losses: list[Tensor] = []
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
        """Train to the end, from a checkpoint or from the start."""
        self._resume_step = checkpoint.step if checkpoint else 0
        # What has been imported and built stays: looking through it for garbage again and again took 2 to 5 %
        # of a step.
        gc.collect()
        gc.freeze()
        return self.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Pack], Tensor]:
        started_at = time.perf_counter()
        packs = [next(epoch_iterator) for _ in range(num_batches)]
        counts = torch.tensor(
            [
                float(sum(pack["weights"].sum(dtype=torch.float64) for pack in packs)),
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
        self._step_packs, self._step_losses = packs, []
        if not isinstance(self.train_rows.rows, CachedRows):  # those were counted when they were prepared
            for pack in packs:
                for row in pack["rows"]:
                    self.rows_report.add(row)
        return packs, counts[0].float()

    # --- loss

    def compute_loss(
        self, model: Any, inputs: Pack, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """This pass's share of the step's loss: its sum over targets by the weight of the whole step.

        Times the number of ranks, since DDP and FSDP average gradients over them."""
        total = self.objective(model, inputs)
        assert num_items_in_batch is not None
        share = total / num_items_in_batch.clamp(min=torch.finfo(torch.float32).tiny) * self.args.world_size
        self._step_losses.append(share.detach())
        return (share, None) if return_outputs else share

    def floating_point_ops(self, inputs: Pack) -> int:
        return 0  # MFU is told from models.cost; transformers' estimate counts frozen weights as trained

    # --- optimiser

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Decay on matrices only; LoRA's B matrices at `lora_plus_ratio` times the learning rate."""
        if self.optimizer is None:
            groups: dict[tuple[bool, bool], list[Any]] = {}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    key = (parameter.ndim >= 2, "lora_B" in name)
                    groups.setdefault(key, []).append(parameter)
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

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once a step, when gradients are whole and weights untouched: the place to stop a bad
        step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = torch.stack(self._step_losses).sum()
        # A GradScaler (float16) meets infinite gradients in its normal course, and skips such steps itself.
        norm_is_finite = norm is None or self.args.fp16 or bool(torch.isfinite(torch.as_tensor(norm)))
        if not (norm_is_finite and bool(torch.isfinite(loss))):
            raise write_bad_step(
                self.checkpoints.folder.parent / "bad_step.json",
                step=self.state.global_step + 1,
                packs=self._step_packs,
                losses=[float(value) for value in self._step_losses],
                grad_norm=None if norm is None else float(norm),
                decode=self.decode,
            )
        return norm

    # --- evaluation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per unit of target weight over `valid_rows`, in nats, whatever the size of passes."""
        assert self.valid_rows is not None
        started_at = time.perf_counter()
        rows = self.valid_rows
        passes = fill_passes(rows.lengths, self.valid_batch_tokens)[
            self.args.process_index :: self.args.world_size
        ]
        sums = torch.zeros(3, dtype=torch.float64)
        was_training = self.model.training
        self.model.eval()
        for items in passes:
            pack = self.collate([rows.rows[item] for item in items])
            if not len(pack["targets"]):
                continue
            with self.autocast():
                loss = self.objective(self.model, self._prepare_inputs(pack))
            sums += torch.tensor(
                [float(loss), float(pack["weights"].sum()), pack["num_targets"]], dtype=torch.float64
            )
        self.model.train(was_training)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").cpu()
        metrics = {
            "eval_loss": float(sums[0] / sums[1]),
            "eval_rows": rows.num_rows,
            "eval_target_tokens": int(sums[2]),
            "eval_s": time.perf_counter() - started_at,
        }
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )  # changes control in place
        return metrics

    def autocast(self) -> Any:
        """The number format of training, for passes outside of it."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        return torch.autocast(self.args.device.type, dtype=dtype, enabled=self.args.bf16 or self.args.fp16)

    # --- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights as they are trained, and no pickle of the arguments: config.yaml says them."""
        assert output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder, self.accelerator.unwrap_model(self.model))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if self.args.should_save:
            self.checkpoints.begin(step)
        self.accelerator.wait_for_everyone()
        folder = str(self.checkpoints.building(step))
        self.save_model(folder, _internal_call=True)
        self._save_optimizer_and_scheduler(folder)
        self._save_scaler(folder)
        self._save_rng_state(folder)
        if self.args.should_save:
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(f"{folder}/trainer_state.json")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.checkpoints.commit(
                step, epoch=self.state.epoch, seed=self.args.seed, ranks=self.args.world_size
            )
        self.accelerator.wait_for_everyone()
