"""A run in progress: the trainer with its plan and callbacks, set up from a config and driven by a recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from tunesmith.config import Config
from tunesmith.config.preferences import PREFERENCES
from tunesmith.data.encoding import Encoder
from tunesmith.data.loading import Data
from tunesmith.data.prepare import text_frame
from tunesmith.data.rows import AnswerRows
from tunesmith.data.token_bytes import token_bytes
from tunesmith.errors import CheckpointError, Interrupted
from tunesmith.models.adalora import has_budget, orthogonality, plan_budget
from tunesmith.models.adapt import count_parameters
from tunesmith.models.cost import enable_gradient_checkpointing, size_lines, training_cost
from tunesmith.models.devices import compute_dtype, matmul_flops_per_second
from tunesmith.models.held import EVERYWHERE, Held
from tunesmith.models.save import artifact_weights, write_artifact
from tunesmith.packing.answers import collate_answers_flat, collate_answers_tree
from tunesmith.packing.collate import collate_flat, collate_tree
from tunesmith.training import durable_files
from tunesmith.training.answers import Question, Written, answer, continuations, questions, stop_ids
from tunesmith.training.arguments import training_arguments
from tunesmith.training.bad_step import RollBack, StepGuard
from tunesmith.training.callbacks import (
    BeforeFirstStep,
    KeepBest,
    MetricsFile,
    RankBudget,
    Samples,
    Schedule,
    StopOnSignal,
)
from tunesmith.training.checkpoints import Checkpoint
from tunesmith.training.disk import checkpoint_bytes, refuse_small_disk, weights_bytes
from tunesmith.training.displacement import DisplacementWatch
from tunesmith.training.environment import versions
from tunesmith.training.manifest import seal
from tunesmith.training.objectives import Objective, Pack
from tunesmith.training.passes import plan_passes
from tunesmith.training.progress import Progress, ProgressLine
from tunesmith.training.ranks import wait_for_all
from tunesmith.training.reference import ask_model, ask_reference, planned_passes, reference_folder
from tunesmith.training.run_folder import RunFolder, read_metrics, write_json
from tunesmith.training.saving import Saver
from tunesmith.training.startup import Startup
from tunesmith.training.trackers import trackers
from tunesmith.training.trainer import PackTrainer

# Of the answers whose ends are counted: tokens that each may have in any case, and rows looked at for each.
_ENDLESS, _TO_CHOOSE_FROM = 64, 8

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
        held: Held = EVERYWHERE,
    ) -> None:
        self.config, self.run, self.tokenizer, self.data = config, run, tokenizer, data
        self.progress, self._card, self._startup = progress, card, startup
        self.dtype, _ = compute_dtype(config.model)
        self.stop_ids = stop_ids(data.train, tokenizer)
        self.compares_answers = data.valid is not None and config.eval.answer_rows > 0
        self.asked = self._questions(model)
        passes = plan_passes(
            config, data.train, model, self.dtype, before=run.pass_tokens_before, say=progress.say, held=held
        )
        startup.mark("packing probe, plan")
        self.config = config = passes.config
        self.plan, self._packing = passes.plan, passes.packing
        if passes.recomputes:
            enable_gradient_checkpointing(model)
        arguments = training_arguments(config, self.plan, run.path, dtype=self.dtype)
        if has_budget(model):
            plan_budget(model, arguments.max_steps)
        # DDP looks for weights that a pass left out only where there may be some: it takes time.
        arguments.ddp_find_unused_parameters = any("expert" in name for name, _ in model.named_modules())
        self._signals = StopOnSignal(progress.say, arguments.world_size)
        self._line = ProgressLine(progress.console)
        saver = Saver(
            run.checkpoints,
            run.metrics,
            asynchronous=config.checkpoint.asynchronous,
            on_error=config.checkpoint.on_save_error,
            say=progress.say,
        )
        guard = StepGuard(
            run.bad_steps, on_bad=config.train.on_bad_step, spike_factor=config.train.spike_factor
        )
        self.trainer = PackTrainer(
            model=model,
            args=arguments,
            objective=objective,
            collate=self._collate(),
            decode=tokenizer.decode,
            plan=self.plan,
            train_rows=data.train,
            valid_rows=data.valid,
            valid_batch_tokens=config.eval.batch_tokens or 0,
            is_packed=passes.packing != "none",
            token_bytes=token_bytes(tokenizer) if config.run.recipe == "pretrain" else None,
            saver=saver,
            guard=guard,
            facts={
                "config": config.model_dump(mode="json"),
                "inputs": run.inputs,
                "versions": versions(),
            },
            lora_plus_ratio=config.adapter.lora_plus_ratio,
            penalty=orthogonality if has_budget(model) else None,
            strategy=config.distributed.strategy,
            held=held,
            callbacks=[self._line],
        )
        self.data.drawn = self._drawn()
        self.trainer.remove_callback(PrinterCallback)  # ours draws the progress
        if self.trainer.strategy.is_shared_out:
            self.trainer.add_callback(BeforeFirstStep(self._tell_shares))
        for callback in self._callbacks(model):
            self.trainer.add_callback(callback)
        self._tell(model, f"gradient checkpointing {'on' if passes.recomputes else 'off'}: {passes.why}")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return bool(self.trainer.args.process_index == 0)

    def begin(self, start: Checkpoint | None) -> None:
        """Write what stands before the first step: config, environment, data report. Raises ConfigError if
        the disk is too small for the run."""
        self._wait_for_all("the first step")
        if self.is_main:
            self._check_disk()
            self.run.begin(self.config, start, self.data)

    def ask_reference(self, start: Checkpoint | None) -> None:
        """Have the rows bring along what the model that the run began with says of them, if it is to be
        cached."""
        if not isinstance(self.data.train.rows, AnswerRows) or self.config.prefer.reference != "cached":
            return
        if self.trainer.strategy.is_shared_out:  # a device may not be able to hold the model before
            self.trainer.add_callback(BeforeFirstStep(lambda: self._ask_reference(start)))
        else:
            self._ask_reference(start)

    def _ask_reference(self, start: Checkpoint | None) -> None:
        about = [(self.data.train, planned_passes(self.plan, self.trainer.args.max_steps))]
        if self.data.valid is not None:
            about.append((self.data.valid, iter(self.trainer.valid_passes())))
        for rows, passes in about:
            assert isinstance(rows.rows, AnswerRows)
            ask_reference(
                rows.rows,
                passes,
                reference_folder(self.config, self.run.inputs["model"], rows.rows),
                partial(ask_model, self.trainer, self.config, is_resumed=start is not None),
                rank=self.trainer.args.process_index,
                ranks=self.trainer.args.world_size,
                say=self.progress.say,
            )
        self._startup.mark("reference log-probabilities")

    def _collate(self) -> Callable[[Sequence[Any]], Pack]:
        if isinstance(self.data.train.rows, AnswerRows):
            return collate_answers_tree if self._packing == "tree" else collate_answers_flat
        return collate_tree if self._packing == "tree" else collate_flat

    def measure_untouched(self, start: Checkpoint | None) -> None:
        """Evaluate and question the model as it came. A run that goes on has done so already."""
        if start is not None:
            return
        if self.trainer.strategy.is_shared_out:  # a device may not be able to hold the model before
            self.trainer.add_callback(BeforeFirstStep(self._measure_untouched))
        else:
            self._measure_untouched()

    def _measure_untouched(self) -> None:
        self._startup.mark("trainer set-up")
        if self.data.valid is not None:
            self.trainer.evaluate()
            self._startup.mark("evaluation before training")
        if self.compares_answers:
            self._ask("before")
            self._startup.mark("answers before training")

    def train(self, start: Checkpoint | None) -> None:
        """Train to the end. Raises Interrupted after a signal, when the checkpoint it asked for is complete
        or has failed."""
        self._signals.install()
        try:
            self._train(start)
        except Exception:
            self.trainer.saver.finish()  # but a second signal leaves at once
            raise
        finally:
            self._line.close()
            self._signals.uninstall()
        if self.is_main and self.config.data.loading != "cached":
            self.data.train.reports[:] = [self.trainer.rows_report]
            write_json(self.run.path / "data_report.json", self.data.report())
        if self._signals.received is not None and not self.trainer.is_done:
            state, saved = self.trainer.state, self.trainer.saver.last_step
            # A rank that ends has the launcher end the others.
            self._wait_for_all(f"the end at step {state.global_step}")
            raise Interrupted(
                f"stopped at step {state.global_step} of {state.max_steps}, "
                + (
                    f"saved in {self.run.checkpoints.folder}. The same command goes on from there."
                    if saved == state.global_step or not self.is_main
                    else "which could not be saved. The same command goes on from the last checkpoint."
                ),
                self._signals.received,
            )

    def _train(self, start: Checkpoint | None) -> None:
        if start is not None and self._best.is_over(start.log_history()):
            self.trainer.args.max_steps = start.step  # it had stopped early, and was not to go on
        while True:
            try:
                self.trainer.train_from(start)
            except RollBack as back:
                start = self._go_back(back)
            else:
                self.trainer.saver.finish()
                return

    def _go_back(self, back: RollBack) -> Checkpoint:
        """To the last checkpoint that is undamaged."""
        self._line.close()
        self._wait_for_all("the way back to a checkpoint")
        newest, damaged = self.run.checkpoints.newest()
        if newest is None:
            raise CheckpointError(f"{back}; there is no checkpoint to go back to: {'; '.join(damaged)}")
        self.progress.say(f"warning: {back}; back to step {newest.step}")
        if self.is_main:
            self.run.cut_metrics(newest.step)
        return newest

    def measure_tuned(self) -> None:
        """Question the tuned model."""
        if self.asked:
            self._ask("after")

    def save(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Write the model or adapter as it is now, such that the folder is whole whenever it is there; every
        rank takes part. Raises OSError if it cannot be; the one that is there is then as it was."""
        strategy, step = self.trainer.strategy, self.trainer.state.global_step
        if not self.is_main and not strategy.is_shared_out:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        weights = artifact_weights(model, self.dtype, strategy.whole, keeps=self.is_main)
        if not self.is_main:
            return
        building = durable_files.temporary(folder)
        durable_files.remove(building)
        durable_files.make_folder(building)
        try:
            write_artifact(
                building,
                model,
                weights,
                self.tokenizer,
                stop_ids=self.stop_ids,
                readme=self._card(step, metrics),
                base=self.config.model,
            )
            seal(building, {"step": step, "versions": versions()})
        except OSError:
            durable_files.remove(building)
            raise
        durable_files.publish(folder)

    @property
    def max_answer_tokens(self) -> int:
        """Longest answer to a question asked. Where only their ends are of interest, one of twice the length
        that any should have is taken for endless."""
        limit = self.config.eval.max_new_tokens
        if self.compares_answers:
            return limit
        return min(limit, max(_ENDLESS, 2 * max(question.num_expected for question in self.asked)))

    def answers(self) -> list[Written]:
        """Greedy answers of the model as it is now to the questions asked."""
        with self.trainer.autocast():
            return answer(
                self.trainer.model,
                self.tokenizer,
                self.asked,
                max_new_tokens=self.max_answer_tokens,
                stop_ids=self.stop_ids,
            )

    def read_answers(self) -> dict[str, list[Any]]:
        """What `before` and `after` answers were written, and which of them ended by themselves
        (`ended_before`, `ended_after`)."""
        file = self.run.path / "answers.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def end(self) -> None:
        """Wait until every rank has done its part, so that none that ends takes the others along."""
        self._wait_for_all("the end of the run")

    def _wait_for_all(self, what: str) -> None:
        wait_for_all(what, self.config.distributed.timeout_s)

    def _ask(self, when: str) -> None:
        """The same questions of every rank where a model is shared out: all of them compute each token."""
        if self.is_main or self.trainer.strategy.is_shared_out:
            given = self.answers()
            if self.is_main:
                self._write_answers(when, given)

    def _write_answers(self, when: str, given: list[Written]) -> None:
        content = self.read_answers() | {
            "rows": [{"place": q.place, "asked": q.asked, "expected": q.expected} for q in self.asked],
            when: [written.text for written in given],
            f"ended_{when}": [written.is_ended for written in given],
        }
        write_json(self.run.path / "answers.json", content)

    def _tell_shares(self) -> None:
        """What a rank holds of the model, counted where it is held: an engine that was asked to share it out
        and did not would change nothing but the memory it takes."""
        parameters = list(self.trainer.model.parameters())
        held = sum(map(self.trainer.strategy.num_held, parameters))
        total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
        self.progress.say(
            f"{self.config.distributed.strategy} over {self.trainer.args.world_size} processes: this one "
            f"holds {held:,} of {total:,} weights between passes"
        )

    def _callbacks(self, model: Any) -> list[TrainerCallback]:
        """What happens between steps, in this order: when to log, evaluate and save comes first."""
        config, arguments = self.config, self.trainer.args
        schedule = Schedule(
            steps=self.plan.steps,
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
            self.progress.say,
        )
        metrics.listeners.append(self._line.show)
        if isinstance(self.data.train.rows, AnswerRows):
            metrics.listeners.append(self._displacement().look)
        self._best = KeepBest(self._save_best, config.eval.early_stopping_patience, self.progress.say)
        followers = trackers(config, self.run.path, self.progress.say) if self.is_main else []
        writes = self.is_main or self.trainer.strategy.is_shared_out  # then all of them compute each token
        samples = [self._samples()] if config.eval.prompts and writes else []
        ranks = [RankBudget(model)] if has_budget(model) else []
        return [schedule, *ranks, metrics, *samples, self._best, self._signals, *followers]

    def _displacement(self) -> DisplacementWatch:
        """As far as the lines that a stopped run has written."""
        prefer = self.config.prefer
        assert prefer.method is not None
        method = PREFERENCES[prefer.method]
        advice = "A lower train.learning_rate or a larger prefer.beta keeps them"
        if "sft_weight" in method.keys:
            advice = "prefer.sft_weight keeps them likely, and so does a lower train.learning_rate"
        is_of_sums = method.needs_reference and not prefer.length_normalized
        watch = DisplacementWatch(prefer.beta if is_of_sums else None, f"{advice}.", self.progress.say)
        for line in read_metrics(self.run.metrics) if self.run.metrics.is_file() else ():
            watch.look(line, silently=True)
        return watch

    def _samples(self) -> Samples:
        """What the model goes on with at each evaluation."""
        config, encoder, bos = self.config, Encoder(self.tokenizer), text_frame(self.tokenizer)[0]
        prompts = [
            np.concatenate([bos, ids]).astype(np.int32)
            for ids in encoder.encode_ids([encoder.plain(text) for text in config.eval.prompts])
        ]

        def write(step: int) -> list[str]:
            torch.manual_seed(config.run.seed + step)
            with self.trainer.autocast():
                given = continuations(
                    self.trainer.model,
                    self.tokenizer,
                    prompts,
                    max_new_tokens=config.eval.max_new_tokens,
                    stop_ids=self.stop_ids,
                    temperature=config.eval.temperature,
                )
            return [written.text for written in given]

        return Samples(self.run.samples, config.eval.prompts, write, self.progress.say)

    def _drawn(self) -> list[dict[str, Any]] | None:
        """What the run draws of each source; None for a stream, whose sources have no size."""
        if self.config.data.loading == "streaming":
            return None
        drawn = self.plan.drawn(int(self.trainer.args.max_steps))
        all_tokens = max(1, sum(tokens for _, tokens in drawn))
        return [
            {
                "path": report.path,
                "weight": weight,
                "rows": rows,
                "epochs": rows / max(1, end - start),
                "tokens": tokens,
                "share": tokens / all_tokens,
            }
            for report, (start, end, weight), (rows, tokens) in zip(
                self.data.train.reports, self.data.train.bounds, drawn, strict=True
            )
        ]

    def _questions(self, model: Any) -> list[Question]:
        """Those that are answered before and after; else a few of which it is seen whether answers end."""
        settings, valid = self.config.eval, self.data.valid
        if self.compares_answers and valid is not None:
            return questions(valid, settings.answer_rows, self.tokenizer, self.stop_ids)
        if self.config.run.recipe != "sft" or not settings.stop_rate_rows or not model.can_generate():
            return []
        number = settings.stop_rate_rows
        found = questions(
            valid or self.data.train,
            _TO_CHOOSE_FROM * number,
            self.tokenizer,
            self.stop_ids,
            settings.max_new_tokens,
        )
        return sorted(found, key=lambda question: question.num_expected)[:number]  # short ones cost least

    def _save_best(self, step: int, eval_loss: float) -> None:
        try:
            self.save(self.run.best, {"step": step, "eval_loss": eval_loss})
        except OSError as error:
            self.trainer.saver.tolerate(f"{self.run.best} of step {step}", error)

    def _check_disk(self) -> None:
        model, steps = self.trainer.model, self.trainer.args.max_steps
        every = self.config.checkpoint.every_steps or self.plan.steps_per_epoch
        size = checkpoint_bytes(model, self.config.train.optimizer)
        refuse_small_disk(
            self.config,
            self.run.path,
            weights=weights_bytes(model),
            checkpoint=size,
            num_saves=math.ceil(steps / every),
            evaluates=self.data.valid is not None,
        )
        free = durable_files.in_words(durable_files.free_bytes(self.run.path))
        self.progress.say(f"a checkpoint takes {durable_files.in_words(size)} of disk; {free} are free")

    def _tell(self, model: Any, checkpointing: str) -> None:
        trained, total = count_parameters(model)
        train, valid, say = self.data.train, self.data.valid, self.progress.say
        say(f"trained parameters: {trained:,} of {total:,} ({100 * trained / total:.2f} %)")
        if self.config.model.is_from_scratch:
            is_known = self.config.data.loading == "cached"
            for line in size_lines(
                model, self.plan.tokens_of(self.trainer.args.max_steps), is_known=is_known
            ):
                say(line)
        for line in train.lines():
            say(line)
        passes = "one pass" if self.plan.passes == 1 else f"{self.plan.passes} passes"
        unit = train.unit
        say(
            f"{train.num_rows:,} training {unit}, {valid.num_rows if valid else 0:,} validation rows; "
            f"{self.trainer.args.max_steps:,} steps of {self.config.train.batch_size} {unit} in {passes}"
        )
        for source in (self.data.drawn or []) if len(train.reports) > 1 else []:
            say(
                f"{source['path']}: weight {source['weight']:g}, drawn {source['rows']:,} {unit} "
                f"({source['epochs']:.2f} epochs), {100 * source['share']:.1f} % of all tokens"
            )
        if self.data.overlap:
            say(
                f"warning: {self.data.overlap} validation examples stand in the training set too, "
                "token for token"
            )
        say(checkpointing)
