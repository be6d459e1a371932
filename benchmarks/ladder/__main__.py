"""The command: `python -m benchmarks.ladder`. Runs the rungs of each workload in turn and prints tables.

Every run is a process of its own; repeats are interleaved (the first of every rung, then the second), so that
an hour in which the machine is slow falls on all rungs alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ladder import curves, record, trl_env
from benchmarks.ladder.rungs import DEFAULT, GROUPS, RUNGS, Rung, choose
from benchmarks.ladder.table import tables
from benchmarks.ladder.workloads import SETTINGS, SHARED, Workload, prepare

_ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    if options.table:
        _show(json.loads(options.table.read_text(encoding="utf-8")), options)
        return
    results: dict[str, Any] = {"machine": record.machine(), "workloads": {}, "runs": []}
    if options.add and options.out and options.out.is_file():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for name in options.workload:
            workload = _prepare(name, Path(folder), options)
            results["workloads"][name] = _describe(workload)
            rungs = choose(options.rungs, name)
            for repeat in range(options.repeats):
                for rung in rungs:
                    results["runs"].append(_run(rung, workload, repeat, Path(folder), options))
                    if options.out:
                        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print()
    _show(results, options)


def _show(results: dict[str, Any], options: argparse.Namespace) -> None:
    print(tables(results))
    if options.curves:
        compared = curves.compare(results)
        print("\n" + curves.table(compared))
        if out := options.out or options.table:
            curves.write_svg(compared, out.with_suffix(".svg"))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--workload", nargs="+", choices=list(SETTINGS), default=["a"])
    parser.add_argument(
        "--rungs", nargs="+", default=DEFAULT, metavar="RUNG", help=", ".join([*GROUPS, *RUNGS])
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--rows", type=int, help="rows (pairs) of a run; rounded down to whole steps")
    parser.add_argument("--rows-per-step", type=int, help="rows (pairs) of an optimiser step")
    parser.add_argument("--pack-tokens", type=int, help="train.micro_batch_tokens; default tunesmith's own")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="for all rungs, to compare losses exactly in float32"
    )
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder of the data sets")
    parser.add_argument("--model", type=Path, help="a model's folder, instead of the workload's own")
    parser.add_argument("--out", type=Path, help="JSON file for all results, written after every run")
    parser.add_argument("--add", action="store_true", help="keep the runs that --out has, and add to them")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a file; run nothing")
    parser.add_argument(
        "--curves",
        action="store_true",
        help=f"{curves.STEPS} steps of {curves.ROWS_PER_STEP} rows of workload a, plain and tunesmith; their "
        "losses as a table and, beside --out, as SVG",
    )
    options = parser.parse_args(arguments)
    if options.curves:
        options.workload, options.rungs = ["a"], [name for pair in curves.COMPARED for name in pair]
        options.rows_per_step = options.rows_per_step or curves.ROWS_PER_STEP
        options.rows = options.rows or curves.STEPS * options.rows_per_step
    return options


def _prepare(name: str, folder: Path, options: argparse.Namespace) -> Workload:
    size = options.rows_per_step or SETTINGS[name].rows_per_step
    workload = prepare(
        name,
        folder,
        steps=max(2, options.rows // size) if options.rows else None,
        rows_per_step=size,
        pack_tokens=options.pack_tokens,
        model=options.model,
        data=options.data,
    )
    workload.write(folder / f"{name}.json")
    return workload


def _describe(workload: Workload) -> dict[str, Any]:
    """What the results say of a workload: sizes of each step, from which rates are worked out."""
    return {
        "steps": [
            {
                "rows": len(step),
                "tokens": sum(workload.tokens(row) for row in step),
                "targets": sum(workload.targets(row) for row in step),
            }
            for step in workload.steps
        ],
        "flops_per_token": workload.flops_per_token,
        "flops_per_target": workload.flops_per_target,
        "is_pairs": workload.is_pairs,
        "config": {key: workload.config[key] for key in ("adapter", "train")},
    }


def _run(
    rung: Rung, workload: Workload, repeat: int, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One run in a child process; a failed one leaves its last words under `error`."""
    out, spec = folder / "result.json", folder / "spec.json"
    out.unlink(missing_ok=True)
    share = 1.0 if options.curves else rung.step_share
    content = {
        "rung": rung.name,
        "workload": str(folder / f"{workload.name}.json"),
        "num_steps": max(2, round(share * len(workload.steps))),
        "threads": options.threads,
        "dtype": options.dtype or rung.dtype,
        "out": str(out),
    }
    if rung.loop == "trl":
        content |= {
            "rows_per_pass": rung.rows_per_pass,
            "padding_free": rung.padding_free,
            "reference": rung.reference,
        }
        command = [str(trl_env.python()), str(Path(__file__).with_name("trl_run.py")), str(spec)]
    else:
        command = [sys.executable, "-m", "benchmarks.ladder.child", str(spec)]
    spec.write_text(json.dumps(content), encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | offline | {"OMP_NUM_THREADS": str(options.threads)}
    began = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    start = time.perf_counter()
    child = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    result = {
        "workload": workload.name,
        "rung": rung.name,
        "repeat": repeat,
        "began": began,
        "dtype": content["dtype"],
    }
    result["whole_process_s"] = time.perf_counter() - start
    if child.returncode == 0 and out.is_file():
        result |= json.loads(out.read_text(encoding="utf-8"))
        seconds = sum(step["seconds"] for step in result["steps"])
        said = f"{seconds:6.1f} s, first loss {result['steps'][0]['loss']:.4f}"
    else:
        result["error"] = "\n".join((child.stderr or child.stdout).splitlines()[-12:])
        said = f"FAILED ({child.returncode}): {result['error']}"
    print(f"{workload.name} {rung.name:16} {repeat + 1}: {said}", flush=True)
    return result


if __name__ == "__main__":
    # subprocess.run ends its child when it is left by an exception, and a bare SIGTERM raises none.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
