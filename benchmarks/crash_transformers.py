"""What becomes of a run of transformers' own Trainer that is killed while it saves a checkpoint.

    python -m benchmarks.crash_transformers [--out FILE]

A tiny Llama with dropout is trained in full for 8 steps; checkpoints at 2, 4, 6 and 8, two are kept. While
checkpoint-6 is saved the process is killed (SIGKILL): before each file, with each file half written, and
before and in the midst of the deletion of checkpoint-2. A new process resumes from what `get_last_checkpoint`
finds, as `resume_from_checkpoint=True` does. Printed is a table: where it was killed, what was found,
what came of it. `identical` means equal weights, bit for bit, to those of a run that was not killed.

Files are counted by the calls that write them: open, torch.save and safetensors' save_file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    modeling_utils,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

_SAVE = "checkpoint-6"


class Killer(TrainerCallback):
    """Counts what is written to checkpoint-6, and what is deleted then; kills at the `kill_at`-th of these,
    or in its midst."""

    def __init__(self, folder: Path, kill_at: int | None, is_midway: bool) -> None:
        self.folder, self.kill_at, self.is_midway = folder, kill_at, is_midway
        self.events: list[str] = []
        torch.save = self._before(torch.save, lambda _, file, *__, **___: file)
        modeling_utils.safe_save_file = self._before(
            modeling_utils.safe_save_file, lambda _, file, *__, **___: file
        )
        rmtree = shutil.rmtree

        def remove(path: Any, *rest: Any, **options: Any) -> None:
            if Path(path).name.startswith("checkpoint-") and (folder / _SAVE).exists():
                self._event(f"delete {Path(path).name}")
            rmtree(path, *rest, **options)

        shutil.rmtree = remove
        sys.addaudithook(self._opened)

    def _before(self, save: Callable[..., Any], file_of: Callable[..., Any]) -> Callable[..., Any]:
        def saved(*arguments: Any, **options: Any) -> Any:
            self._written(file_of(*arguments, **options))
            return save(*arguments, **options)

        return saved

    def _opened(self, event: str, arguments: Any) -> None:
        if event == "open" and isinstance(arguments[0], (str, Path)) and "w" in str(arguments[1] or ""):
            self._written(arguments[0])

    def _written(self, file: Any) -> None:
        if isinstance(file, (str, Path)) and Path(file).parent.name == _SAVE:
            name = f"write {Path(file).name}"
            if name not in self.events:  # torch.save opens the file that it was handed
                self._event(name)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 6:
            self._event("end of the save")

    def _event(self, name: str) -> None:
        if self.events[-1:] == ["end of the save"]:
            return
        self.events.append(name)
        number = len(self.events)
        if self.kill_at is None:
            return
        if self.is_midway and number == self.kill_at and name.startswith("delete "):
            files = sorted((self.folder / name.split()[1]).iterdir())
            for file in files[: len(files) // 2]:
                file.unlink()
        elif self.is_midway:
            if number != self.kill_at + 1:
                return
            file = self.folder / _SAVE / self.events[-2].split()[1]
            os.truncate(file, file.stat().st_size // 2)
        elif number != self.kill_at:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, report: Path, kill_at: int | None, is_midway: bool) -> None:
    """Train to the end in this process, from the last checkpoint of `folder` if there is one."""
    warnings.simplefilter("ignore")
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            attention_dropout=0.2,
        )
    )
    ids = torch.randint(3, 128, (32, 24), generator=torch.Generator().manual_seed(1)).tolist()
    killer = Killer(folder, kill_at, is_midway)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=2,
            save_total_limit=2,
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[killer],
    )
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    found = Path(last).name if last else None
    report.write_text(json.dumps({"found": found}))
    try:
        trainer.train(resume_from_checkpoint=last)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".replace(f"{folder}/", "")
        report.write_text(json.dumps({"found": found, "error": said}))
        return
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    report.write_text(json.dumps({"found": found, "events": killer.events, "weights": weights}))


def in_a_process(
    folder: Path, kill_at: int | None = None, is_midway: bool = False
) -> tuple[int, dict[str, Any]]:
    """Fork, train, wait: exit status and report."""
    report = folder.with_suffix(".json")
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = 1
        try:
            train(folder, report, kill_at, is_midway)
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the outcomes as JSON too")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork of a process with a pool of threads would wait for them for ever
    rows = []
    with tempfile.TemporaryDirectory(prefix="crash-transformers-") as name:
        base = Path(name)
        _, straight = in_a_process(base / "straight")
        _, again = in_a_process(base / "again")
        assert straight["weights"] == again["weights"], "two runs without a kill differ"
        events = straight["events"]
        for number, event in enumerate(events, 1):
            for is_midway in (False, True) if event != "end of the save" else (False,):
                folder = base / f"at-{number}-{is_midway}"
                status, _ = in_a_process(folder, number, is_midway)
                assert status == -signal.SIGKILL, (event, is_midway, status)
                _, resumed = in_a_process(folder)
                rows.append((f"{'in the midst of' if is_midway else 'before'} {event}", resumed))
        outcomes = [
            {"killed": killed, "found": resumed["found"], "outcome": _outcome(resumed, straight)}
            for killed, resumed in rows
        ]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| killed | resumes from | outcome |\n|---|---|---|")
    for outcome in outcomes:
        print("| " + " | ".join(map(str, outcome.values())) + " |")
    identical = sum(outcome["outcome"] == "identical" for outcome in outcomes)
    print(f"\n{identical} of {len(outcomes)} identical")
    if options.out:
        options.out.write_text(json.dumps(outcomes, indent=1) + "\n")


def _outcome(resumed: dict[str, Any], straight: dict[str, Any]) -> str:
    if "error" in resumed:
        return "fails: " + resumed["error"].splitlines()[0]
    if "weights" not in resumed:
        return "the process ended without a word"
    return "identical" if resumed["weights"] == straight["weights"] else "other weights, nothing said"


if __name__ == "__main__":
    main()
