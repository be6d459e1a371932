"""A run in progress: the trainer with its plan and callbacks, set up from a config and driven by a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from tunesmith.config import Config
from tunesmith.data.loading import Data, RowSet
from tunesmith.data.rows import CachedRows
from tunesmith.errors import Interrupted
from tunesmith.models.adapt import count_parameters
from tunesmith.models.cost import (
    choose_gradient_checkpointing,
    enable_gradient_checkpointing,
    training_cost,
)
from tunesmith.models.devices import compute_dtype, matmul_flops_per_second
from tunesmith.models.packable import Packing, possible_packing
from tunesmith.models.save import save_artifact
from tunesmith.packing.collate import collate_flat, collate_tree
from tunesmith.packing.plan import RowSource, StepPlan, make_plan
from tunesmith.packing.sharing import Sharing
from tunesmith.training.answers import Question, answer, questions, stop_ids
from tunesmith.training.arguments import training_arguments
from tunesmith.training.callbacks import KeepBest, MetricsFile, Schedule, StopOnSignal
from tunesmith.training.checkpoints import Checkpoint
from tunesmith.training.progress import Progress, ProgressLine
from tunesmith.training.run_folder import RunFolder, write_json
from tunesmith.training.trackers import trackers
from tunesmith.training.trainer import Objective, PackTrainer

# Writes a model card for (step, metrics).
Card = Callable[[int, dict[str, Any]], str]


class Session:
    """Everything one run needs while it trains. `card` writes the README of what is saved."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        tokenizer: Any,
        data: Data,
        model: Any,
        progress: Progress,
        *,
        objective: Objective,
        card: Card,
    ) -> None:
        self.config, self.run, self.tokenizer, self.data = config, run, tokenizer, data
        self.progress, self._card = progress, card
        self.dtype, _ = compute_dtype(config.model)
        self.stop_ids = stop_ids(data.train, tokenizer)
        self.asked = self._questions()
        checkpointing, why = choose_gradient_checkpointing(model, config, self.dtype)
        if checkpointing:
            enable_gradient_checkpointing(model)
        packing = _packing(config, model, progress)
        self.plan = _plan(config, data.train, packing)
        arguments = training_arguments(config, self.plan, run.path, dtype=self.dtype)
        self._signals = StopOnSignal(progress.say)
        self._line = ProgressLine(progress.console)
        self.trainer = PackTrainer(
            model=model,
            args=arguments,
            objective=objective,
            collate=collate_tree if packing == "tree" else collate_flat,
            decode=tokenizer.decode,
            plan=self.plan,
            train_rows=data.train,
            valid_rows=data.valid,
            valid_batch_tokens=config.eval.batch_tokens or 0,
            checkpoints=run.checkpoints,
            lora_plus_ratio=config.adapter.lora_plus_ratio,
            callbacks=[self._line],
        )
        self.trainer.remove_callback(PrinterCallback)  # ours draws the progress
        for callback in self._callbacks(model):
            self.trainer.add_callback(callback)
        self._tell(model, f"gradient checkpointing {'on' if checkpointing else 'off'}: {why}")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return bool(self.trainer.args.process_index == 0)

    def begin(self, start: Checkpoint | None) -> None:
        """Write what stands before the first step: config, environment, data report."""
        self.trainer.accelerator.wait_for_everyone()
        if self.is_main:
            self.run.begin(self.config, start, template=self.tokenizer.chat_template, data=self.data)

    def measure_untouched(self, start: Checkpoint | None) -> None:
        """Evaluate and question the model as it came. A run that goes on has done so already."""
        if start is not None:
            return
        if self.data.valid is not None:
            self.trainer.evaluate()
        if self.asked and self.is_main:
            self._write_answers("before", self.answers())

    def train(self, start: Checkpoint | None) -> None:
        """Train to the end. Raises Interrupted after a signal, when the checkpoint it asked for is
        complete."""
        self._signals.install()
        try:
            self.trainer.train_from(start)
        finally:
            self._line.close()
            self._signals.uninstall()
        if self.is_main and self.config.data.loading != "cached":
            self.data.train.reports[:] = [self.trainer.rows_report]
            write_json(self.run.path / "data_report.json", self.data.report())
        if self._signals.received is not None and not self.trainer.is_done:
            step = self.trainer.state.global_step
            raise Interrupted(
                f"stopped at step {step} of {self.trainer.state.max_steps}, saved in "
                f"{self.run.checkpoints.folder}. The same command goes on from there.",
                self._signals.received,
            )

    def measure_tuned(self) -> None:
        """Question the tuned model."""
        if self.asked and self.is_main:
            self._write_answers("after", self.answers())

    def save(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Write the model or adapter as it is now."""
        if self.is_main:
            save_artifact(
                folder,
                self.trainer.accelerator.unwrap_model(self.trainer.model),
                self.tokenizer,
                dtype=self.dtype,
                stop_ids=self.stop_ids,
                readme=self._card(self.trainer.state.global_step, metrics),
            )

    def answers(self) -> list[str]:
        """Greedy answers of the model as it is now to the questions asked."""
        with self.trainer.autocast():
            return answer(
                self.trainer.model,
                self.tokenizer,
                self.asked,
                max_new_tokens=self.config.eval.max_new_tokens,
                stop_ids=self.stop_ids,
            )

    def read_answers(self) -> dict[str, list[str]]:
        """What `before` and `after` answers were written."""
        file = self.run.path / "answers.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def _write_answers(self, when: str, given: list[str]) -> None:
        content = self.read_answers() | {
            "rows": [{"place": q.place, "asked": q.asked, "expected": q.expected} for q in self.asked],
            when: given,
        }
        write_json(self.run.path / "answers.json", content)

    def _callbacks(self, model: Any) -> list[TrainerCallback]:
        """What happens between steps, in this order: when to log, evaluate and save comes first."""
        config, arguments = self.config, self.trainer.args
        schedule = Schedule(
            steps_per_epoch=self.plan.steps_per_epoch,
            log_every=config.train.log_every_steps,
            evaluate_every=config.eval.every_steps,
            save_every=config.checkpoint.every_steps,
            evaluates=self.data.valid is not None,
        )
        metrics = MetricsFile(
            self.run.metrics,
            training_cost(model),
            matmul_flops_per_second(self.dtype),
            lambda: self.trainer.step_counts,
            arguments.world_size,
        )
        metrics.listeners.append(self._line.show)
        best = KeepBest(self._save_best, config.eval.early_stopping_patience, self.progress.say)
        followers = trackers(config, self.run.path, self.progress.say) if self.is_main else []
        return [schedule, metrics, best, self._signals, *followers]

    def _questions(self) -> list[Question]:
        if self.data.valid is None or not self.config.eval.answer_rows:
            return []
        return questions(self.data.valid, self.config.eval.answer_rows, self.tokenizer, self.stop_ids)

    def _save_best(self, step: int, eval_loss: float) -> None:
        self.save(self.run.best, {"step": step, "eval_loss": eval_loss})

    def _tell(self, model: Any, checkpointing: str) -> None:
        trained, total = count_parameters(model)
        train, valid, say = self.data.train, self.data.valid, self.progress.say
        say(f"trained parameters: {trained:,} of {total:,} ({100 * trained / total:.2f} %)")
        for report in train.reports:
            for line in report.lines():
                say(line)
        passes = "one pass" if self.plan.passes == 1 else f"{self.plan.passes} passes"
        say(
            f"{train.num_rows:,} training rows, {valid.num_rows if valid else 0:,} validation rows; "
            f"{self.trainer.args.max_steps:,} steps of {self.config.train.batch_size} rows in {passes}"
        )
        if self.data.overlap:
            say(
                f"warning: {self.data.overlap} validation examples stand in the training set too, "
                "token for token"
            )
        say(checkpointing)


def _packing(config: Config, model: Any, progress: Progress) -> Packing:
    """What the config asks for, or as much of it as the model can do: the result of training is the same."""
    wanted = config.data.packing
    if wanted == "none":
        return wanted
    possible = possible_packing(model)
    if possible == "none":
        progress.say("documents in one pass would see each other in this model; each example runs by itself")
        return possible
    if wanted == "tree" and possible == "flat":
        attention = model.config._attn_implementation
        progress.say(f"attention {attention} of this model cannot share prefixes; each example has its own")
        return possible
    return wanted


def _plan(config: Config, rows: RowSet, packing: Packing) -> StepPlan:
    # Lazy and streamed rows have no tokens yet: packs of them share what happens to lie in one pass.
    sharing = None
    if packing == "tree" and isinstance(rows.rows, CachedRows):
        sharing = Sharing.of_tokens(*rows.rows.token_chunks())
    return make_plan(
        rows.lengths,
        rows.row_starts,
        sources=[RowSource(*bounds) for bounds in rows.bounds],
        batch_size=config.train.batch_size,
        micro_batch_tokens=config.train.micro_batch_tokens or 0,
        num_ranks=_world_size(),
        seed=config.run.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        one_example_a_pass=packing == "none",
        shuffle=config.data.loading != "streaming",
        sharing=sharing,
    )


def _world_size() -> int:
    """Ranks, before transformers has started the process group (torchrun says it in the environment)."""
    from accelerate import PartialState

    return int(PartialState(cpu=not torch.accelerator.is_available()).num_processes)
