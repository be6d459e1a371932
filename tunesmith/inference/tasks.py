"""`tunesmith eval --tasks`: the model and its base handed to lm-evaluation-harness as they lie in memory.

It reads the tasks, asks and scores; nothing of that is done here. Its own tasks fetch their data from the
hub; tasks of a folder (`--include-path`) may name files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tunesmith.artifacts.found import Say, find_model, run_folder
from tunesmith.artifacts.tuned import Tuned, base_of, load_tuned
from tunesmith.errors import ConfigError, MissingExtraError
from tunesmith.training.run_folder import write_json


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
    limit: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    say: Say,
) -> dict[str, Any]:
    """Run the tasks on the base model and on the tuned one; print a table, write tasks.json to `out` (by
    default a folder of the run), return its content: side -> task -> figure -> value.

    Raises MissingExtraError without lm-eval, ConfigError for tasks that it does not know."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("eval --tasks", "lm-eval", "lm-eval") from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if name not in known]
    if unknown:
        near = sorted(name for name in known if any(part in name for part in unknown))[:5]
        hint = f" It knows {', '.join(near)}." if near else " Tasks of your own: --include-path DIR."
        raise ConfigError(f"--tasks {','.join(unknown)}: lm-eval knows no such task.{hint}")
    tuned = load_tuned(find_model(model, say), say, needs_template=apply_chat_template)
    settings = {"task_manager": manager, "apply_chat_template": apply_chat_template, "limit": limit}
    results: dict[str, Any] = {}
    with base_of(tuned, say) as base:
        if base is not None:
            results["base"] = _run(base, tuned, tasks, seed, settings)
    results["tuned"] = _run(tuned.model, tuned, tasks, seed, settings)
    run = run_folder(Path(model).expanduser())
    folder = out or (run / "eval" if run is not None else None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tasks.json", results)
    _print(Console(), results)
    return results


def _run(model: Any, tuned: Tuned, tasks: Sequence[str], seed: int, settings: dict[str, Any]) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    done = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tuned.tokenizer, batch_size=8),
        tasks=list(tasks),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
        **settings,
    )
    return {
        task: {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in done["results"].items()
    }


def _print(console: Console, results: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "figure", *results):
        table.add_column(heading, justify="left" if heading in ("task", "figure") else "right")
    for task, figures in results["tuned"].items():
        for name in figures:
            if "_stderr" in name:
                continue
            metric, _, way = name.partition(",")
            error = f"{metric}_stderr,{way}"
            table.add_row(task, metric, *(_shown(of_side[task], name, error) for of_side in results.values()))
    console.print(table, highlight=False)


def _shown(figures: dict[str, Any], name: str, error: str) -> str:
    return f"{figures[name]:.4f}" + (f" +- {figures[error]:.4f}" if error in figures else "")
