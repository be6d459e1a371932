"""Results as markdown tables: a row a rung, medians over repeats, spread in brackets."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.ladder.rungs import RUNGS

Run = dict[str, Any]
_COLUMNS = (
    ("rung", "-"),
    ("runs", ">"),
    ("tokens/s", ">"),
    ("spread", ">"),
    ("median step", ">"),
    ("targets/s", ">"),
    ("ratio", ">"),
    ("pairs/s", ">"),
    ("with reference", ">"),
    ("to TRL", ">"),
    ("MFU", ">"),
    ("computed MFU", ">"),
    ("peak GiB", ">"),
    ("before", ">"),
    ("first loss", ">"),
    ("to bf16", ">"),
    ("to fp32", ">"),
    ("switches", ">"),
    ("what", "-"),
)


def tables(results: dict[str, Any]) -> str:
    """A table for each workload.

    tokens/s: tokens of the rows, unpadded, shared prefixes counted for every row, over all steps but the
    first; `median step` by each step's own rate. ratio: to the best of plain transformers + PEFT in bf16.
    pairs/s: of preferences, by the steps' time alone; `with reference`: and the time in which a cached
    reference was asked about their rows, which an epoch pays once. to TRL: ratio to the best of TRL's rungs,
    for preferences with the reference's time.
    MFU: operations of training these tokens and targets over the fastest matmul of the same process; computed
    MFU: of the tokens that went through the model. peak: resident memory, loading included.
    to bf16, to fp32: the largest difference of a step's loss to plain_bf16 and plain_fp32 over the first ten
    steps."""
    blocks = []
    for name, workload in results["workloads"].items():
        runs = [run for run in results["runs"] if run["workload"] == name]
        by_rung = {rung: [r for r in runs if r["rung"] == rung] for rung in RUNGS}
        good = {rung: [r for r in found if "error" not in r] for rung, found in by_rung.items()}
        good = {rung: found for rung, found in good.items() if found}
        best, trl = best_plain(good, workload), best_trl(good, workload)
        threads = sorted({run["threads"] for found in good.values() for run in found})
        head = [f"workload {name}, threads {', '.join(map(str, threads))}"]
        lines = ["| " + " | ".join(title for title, _ in _COLUMNS) + " |"]
        lines.append("|" + "|".join("---" if side == "-" else "---:" for _, side in _COLUMNS) + "|")
        for rung, found in good.items():
            lines.append("| " + " | ".join(_cells(rung, found, workload, best, trl, good)) + " |")
        failed = [f"{rung} failed: {r['error']}" for rung, rs in by_rung.items() for r in rs if "error" in r]
        if best:
            head.append(f"best plain bf16: {best[0]} at {best[1]:.0f} tokens/s")
        if trl:
            head.append(f"best of TRL: {trl[0]}")
        blocks.append("\n".join([*head, "", *lines, *failed]))
    return "\n\n".join(blocks)


def rate(run: Run, workload: dict[str, Any], what: str = "tokens") -> float:
    """Tokens (or targets) a second over all steps but the first."""
    counts = [step[what] for step in workload["steps"]][1 : len(run["steps"])]
    return sum(counts) / sum(step["seconds"] for step in run["steps"][1:])


def with_reference(run: Run, workload: dict[str, Any], what: str = "tokens") -> float:
    """The same where these steps' share of the time that a cached reference took counts too."""
    sizes = [step["rows"] for step in workload["steps"]][: len(run["steps"])]
    seconds = sum(step["seconds"] for step in run["steps"][1:])
    asked = run.get("reference_s", 0.0) * sum(sizes[1:]) / sum(sizes)
    return rate(run, workload, what) * seconds / (seconds + asked)


def median_step_rate(run: Run, workload: dict[str, Any]) -> float:
    pairs = list(zip(workload["steps"], run["steps"], strict=False))[1:]
    return statistics.median(counts["tokens"] / step["seconds"] for counts, step in pairs)


def mfu(run: Run, workload: dict[str, Any], *, computed: bool = False) -> float | None:
    """Operations of the steps but the first, over what the ceiling allows in their time. Where each step of
    pairs asks the reference, its forward pass counts too: 2 operations a parameter beside the 4 of
    training."""
    end = len(run["steps"])
    seconds = sum(step["seconds"] for step in run["steps"][1:])
    tokens = sum(step["tokens"] for step in workload["steps"][1:end])
    if computed:
        if any("computed_tokens" not in step for step in run["steps"]):
            return None
        tokens = sum(step["computed_tokens"] for step in run["steps"][1:])
    targets = sum(step["targets"] for step in workload["steps"][1:end])
    flops = workload["flops_per_token"] * tokens + workload["flops_per_target"] * targets
    ceiling = max(*run["matmul_before"].values(), *run["matmul_after"].values())
    asks = workload["is_pairs"] and RUNGS[run["rung"]].reference == "live"
    return (1.5 if asks else 1.0) * flops / seconds / ceiling


def best_plain(good: dict[str, list[Run]], workload: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest setting of transformers + PEFT in bf16, and its tokens a second."""
    return _best("plain_bf16", good, workload)


def best_trl(good: dict[str, list[Run]], workload: dict[str, Any]) -> tuple[str, float] | None:
    """TRL's fastest setting, and its tokens a second, a cached reference included."""
    return _best("trl_", good, workload)


def _best(prefix: str, good: dict[str, list[Run]], workload: dict[str, Any]) -> tuple[str, float] | None:
    found = [
        (rung, statistics.median(with_reference(run, workload) for run in runs))
        for rung, runs in good.items()
        if rung.startswith(prefix)
    ]
    return max(found, key=lambda item: item[1]) if found else None


def _cells(
    rung: str,
    runs: list[Run],
    workload: dict[str, Any],
    best: tuple[str, float] | None,
    trl: tuple[str, float] | None,
    good: dict[str, list[Run]],
) -> list[str]:
    rates = [rate(run, workload) for run in runs]
    middle = statistics.median(rates)
    whole = statistics.median(with_reference(run, workload) for run in runs)
    pairs = [statistics.median(of(run, workload, "rows") for run in runs) for of in (rate, with_reference)]
    computed = [value for run in runs if (value := mfu(run, workload, computed=True)) is not None]
    peak = [max(run["peak_rss_gib"], run["peak_loading_gib"]) for run in runs]
    return [
        rung,
        str(len(runs)),
        f"{middle:.0f}",
        f"{min(rates):.0f}-{max(rates):.0f}",
        f"{statistics.median(median_step_rate(run, workload) for run in runs):.0f}",
        f"{statistics.median(rate(run, workload, 'targets') for run in runs):.0f}",
        f"{middle / best[1]:.2f}" if best else "",
        *(f"{value:.2f}" if workload["is_pairs"] else "" for value in pairs),
        f"{whole / trl[1]:.2f}" if trl else "",
        f"{100 * statistics.median(mfu(run, workload) or 0.0 for run in runs):.0f} %",
        f"{100 * statistics.median(computed):.0f} %" if computed else "",
        f"{statistics.median(peak):.2f}",
        f"{statistics.median(run['rss_before_gib'] for run in runs):.2f}",
        f"{runs[0]['steps'][0]['loss']:.4f}",
        _difference(runs[0], good.get("plain_bf16")),
        _difference(runs[0], good.get("plain_fp32")),
        f"{statistics.median(run['involuntary_switches'] for run in runs):.0f}",
        RUNGS[rung].what,
    ]


def _difference(run: Run, others: list[Run] | None) -> str:
    if not others:
        return ""
    pairs = list(zip(run["steps"][:10], others[0]["steps"][:10], strict=False))
    return f"{max(abs(mine['loss'] - other['loss']) for mine, other in pairs):.1e}"
