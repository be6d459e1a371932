"""A run in progress: the trainer with its plan and callbacks, set up from a config and driven by a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from tunesmith.config import Config
from tunesmith.data.loading import Data
from tunesmith.errors import Interrupted
from tunesmith.models.adapt import count_parameters
from tunesmith.models.cost import enable_gradient_checkpointing, training_cost
from tunesmith.models.devices import compute_dtype, matmul_flops_per_second
from tunesmith.models.save import save_artifact
from tunesmith.packing.collate import collate_flat, collate_tree
from tunesmith.training.answers import Question, answer, questions, stop_ids
from tunesmith.training.arguments import training_arguments
from tunesmith.training.callbacks import KeepBest, MetricsFile, Schedule, StopOnSignal
from tunesmith.training.checkpoints import Checkpoint
from tunesmith.training.passes import plan_passes
from tunesmith.training.progress import Progress, ProgressLine
from tunesmith.training.run_folder import RunFolder, write_json
from tunesmith.training.startup import Startup
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
        startup: Startup,
    ) -> None:
        self.config, self.run, self.tokenizer, self.data = config, run, tokenizer, data
        self.progress, self._card, self._startup = progress, card, startup
        self.dtype, _ = compute_dtype(config.model)
        self.stop_ids = stop_ids(data.train, tokenizer)
        self.asked = self._questions()
        passes = plan_passes(
            config, data.train, model, self.dtype, before=run.pass_tokens_before, say=progress.say
        )
        startup.mark("packing probe, plan")
        self.config = config = passes.config
        self.plan = passes.plan
        if passes.recomputes:
            enable_gradient_checkpointing(model)
        arguments = training_arguments(config, self.plan, run.path, dtype=self.dtype)
        self._signals = StopOnSignal(progress.say)
        self._line = ProgressLine(progress.console)
        self.trainer = PackTrainer(
            model=model,
            args=arguments,
            objective=objective,
            collate=collate_tree if passes.packing == "tree" else collate_flat,
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
        self._tell(model, f"gradient checkpointing {'on' if passes.recomputes else 'off'}: {passes.why}")

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
        self._startup.mark("trainer set-up")
        if self.data.valid is not None:
            self.trainer.evaluate()
            self._startup.mark("evaluation before training")
        if self.asked and self.is_main:
            self._write_answers("before", self.answers())
            self._startup.mark("answers before training")

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
        self._startup.mark("trainer set-up")
        peak_flops = matmul_flops_per_second(self.dtype)
        self._startup.mark("speed of multiplication")
        metrics = MetricsFile(
            self.run.metrics,
            training_cost(model),
            peak_flops,
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
