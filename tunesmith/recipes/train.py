"""The stages of a run that learns to predict next tokens. What tells one recipe from another is its config:
which rows, how they become examples, and what is trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.artifacts.model_card import model_card
from tunesmith.artifacts.summary import finish_run
from tunesmith.config import Config
from tunesmith.data.loading import Data, load_data
from tunesmith.data.rows import AnswerRows
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.models.adapt import build_model
from tunesmith.models.devices import default_device
from tunesmith.models.score import name_padding
from tunesmith.training.environment import inputs
from tunesmith.training.objectives import NextToken, Objective
from tunesmith.training.preference import PreferenceObjective, RewardObjective
from tunesmith.training.progress import Progress
from tunesmith.training.reference import adapter_off
from tunesmith.training.run_folder import RunFolder
from tunesmith.training.session import Session
from tunesmith.training.startup import Startup
from tunesmith.training.startup_report import StartupReport, cached_names, data_stage
from tunesmith.training.strategy import who_holds


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, the adapter or model at its end and at its best, and the figures of
    summary.json. `best` is None without validation rows."""

    run: Path
    final: Path
    best: Path | None
    summary: dict[str, Any]


def train(config: Config, startup: Startup | None) -> RunResult:
    """From a config to a run folder, or on from the newest checkpoint in it. Raises tunesmith.errors.*,
    Interrupted after a signal among them. With `startup`, which runs since the process began, the time of
    each stage up to the first step is printed and written to startup.json."""
    is_profiled, startup = startup is not None, startup or Startup()
    progress = Progress()
    with RunFolder(config) as run:
        start = run.find_start(config, progress.say)
        startup.mark("config")
        tokenizer = load_tokenizer(config)
        startup.mark("tokenizer")
        before = cached_names(config)
        data = load_data(config, tokenizer, progress.say)
        run.check_inputs(inputs(config, tokenizer, data), start, progress.say)
        startup.mark(data_stage(config, before))
        held = who_holds(config)
        model = build_model(config, tokenizer, progress.say, held=held)
        startup.mark("model load, adapter, fuse")
        if config.has_scalar_head:
            _name_padding(model, tokenizer, data, progress.say)
        card = partial(model_card, config, data, model)
        objective = _objective(config, tokenizer)
        session = Session(
            config,
            run,
            tokenizer,
            data,
            model,
            progress,
            objective=objective,
            card=card,
            startup=startup,
            held=held,
        )
        if is_profiled:
            report = StartupReport(startup, progress.console, run.path / "startup.json")
            session.trainer.add_callback(report)
        session.begin(start)
        session.ask_reference(start)
        session.measure_untouched(start)
        session.train(start)
        session.measure_tuned()
        summary = finish_run(session)
        session.end()
    return RunResult(run.path, run.final, run.best if run.best.is_dir() else None, summary)


def _objective(config: Config, tokenizer: Any) -> Objective:
    """What each pass is asked to lower."""
    if config.run.recipe != "prefer":
        return NextToken(config.train.label_smoothing, config.train.z_loss)
    if config.has_scalar_head:
        return RewardObjective(config.prefer)
    if config.prefer.reference != "live":
        return PreferenceObjective(config.prefer)
    if config.adapter.method != "none":
        return PreferenceObjective(config.prefer, adapter_off)
    frozen = build_model(config, tokenizer, lambda _: None).requires_grad_(False).eval().to(default_device())
    return PreferenceObjective(config.prefer, lambda _: nullcontext(frozen))


def _name_padding(model: Any, tokenizer: Any, data: Data, say: Callable[[str], None]) -> None:
    """Let the model that is saved find the ends of padded rows."""
    ends: set[int] = set()
    for rows in (data.train, data.valid):
        if rows is not None and isinstance(rows.rows, AnswerRows):
            ends |= rows.rows.examples.last_tokens()
    say(f"rows are padded with {name_padding(model, tokenizer, ends)}, which no answer ends in")
