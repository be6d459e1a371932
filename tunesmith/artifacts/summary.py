"""What a script wants to know when a run has ended: summary.json, and the same as a table for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunesmith.training.answers import Question
from tunesmith.training.run_folder import read_metrics, write_json
from tunesmith.training.session import Session

# Of a few answers more than half should end within twice the length they should have.
_LOW_STOP_RATE = 0.5
# Of the last evaluation: of texts, of pairs of answers, of labelled ones.
_MORE = (
    *("eval_perplexity", "eval_bits_per_byte"),
    *("eval_reward_margin", "eval_reward_accuracy", "eval_logp_accuracy"),
    *("eval_reward_desirable", "eval_reward_undesirable"),
)


def finish_run(session: Session) -> dict[str, Any]:
    """Write final/ and summary.json, print the figures and where things lie; returns the figures."""
    run, given = session.run, session.read_answers()
    summary = summarise(read_metrics(run.metrics))
    # Other rows may have been asked before a stop: eval.answer_rows is free to change.
    num_asked = len(session.asked) if session.compares_answers else 0
    is_compared = len(given.get("before", ())) == len(given.get("after", ())) == num_asked > 0
    if is_compared:
        summary |= {
            "answered_rows": len(given["after"]),
            "exact_match_before": exact_matches(session.asked, given["before"]),
            "exact_match_after": exact_matches(session.asked, given["after"]),
        }
    if session.config.eval.stop_rate_rows:
        summary |= stop_rates(given, session.asked)
    session.save(run.final, summary)
    if session.is_main:
        write_json(run.summary, summary)
    console = session.progress.console
    print_summary(console, summary)
    if is_compared:
        print_answers(console, session.asked, given["before"], given["after"])
    for line in _warn_of_stops(session, summary):
        session.progress.say(line)
    kind = "model" if session.config.adapter.method == "none" else "adapter"
    session.progress.say(
        f"\n{kind}: {run.final}"
        + (f"   best (step {summary['best_step']}): {run.best}" if run.best.is_dir() else "")
    )
    if not session.config.has_scalar_head:
        session.progress.say(f"chat with it: tunesmith chat {run.path}")
    return summary


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals over the lines of metrics.jsonl. Times are the steps' own, evaluation and saving apart, over
    all the sittings of the run."""
    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "eval_loss" in line]
    tuned = [line for line in evals if line["step"]]
    seconds = sum(line["step_s"] for line in steps)
    tokens, targets = sum(line["tokens"] for line in steps), sum(line["target_tokens"] for line in steps)
    more: dict[str, Any] = {key: tuned[-1][key] for key in _MORE if tuned and key in tuned[-1]}
    best = min(tuned, key=lambda line: line["eval_loss"], default=None)
    return {
        "steps": steps[-1]["step"] if steps else 0,
        "rows": sum(line["rows"] for line in steps),
        "tokens": tokens,
        "target_tokens": targets,
        "first_loss": steps[0]["loss"] if steps else None,
        "last_loss": steps[-1]["loss"] if steps else None,
        "eval_loss_before": next((line["eval_loss"] for line in evals if not line["step"]), None),
        "eval_loss": tuned[-1]["eval_loss"] if tuned else None,
        **more,
        "best_eval_loss": best["eval_loss"] if best else None,
        "best_step": best["step"] if best else None,
        "train_s": round(seconds, 3),
        "tokens_per_s": tokens / seconds if seconds else None,
        "target_tokens_per_s": targets / seconds if seconds else None,
        "mfu": sum(line["mfu"] * line["step_s"] for line in steps) / seconds if seconds else None,
        "peak_memory_gib": max((line["peak_memory_gib"] for line in steps), default=None),
    }


def exact_matches(asked: Sequence[Question], answers: Sequence[str]) -> float:
    """Share of answers that are, white space at the ends apart, the row's own."""
    return sum(q.expected == given for q, given in zip(asked, answers, strict=True)) / len(asked)


def stop_rates(given: dict[str, Any], asked: Sequence[Question]) -> dict[str, Any]:
    """Which share of the answers ended by itself, before training (where they were asked then) and after."""
    rates = {}
    for key, name in (("ended_before", "stop_rate_before"), ("ended_after", "stop_rate")):
        if asked and len(ended := given.get(key, ())) == len(asked):
            rates[name] = sum(ended) / len(ended)
    return rates | {"stop_rate_rows": len(asked)} if rates else {}


def _warn_of_stops(session: Session, summary: dict[str, Any]) -> Iterator[str]:
    if summary.get("stop_rate", 1.0) < _LOW_STOP_RATE:
        rate, rows = f"{100 * summary['stop_rate']:.0f} %", summary["stop_rate_rows"]
        yield (
            f"warning: only {rate} of {rows} answers ended by themselves within {session.max_answer_tokens} "
            "tokens. Train longer, or look at where the answers of the data end: tunesmith preview."
        )


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """The figures of a run, a row each."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in (
        ("rows", _number(summary["rows"])),
        ("tokens (targets)", f"{_number(summary['tokens'])} ({_number(summary['target_tokens'])})"),
        ("loss first -> last", _change(summary["first_loss"], summary["last_loss"])),
        ("eval loss before -> after", _change(summary["eval_loss_before"], summary["eval_loss"])),
        ("perplexity, bits per byte", _of_texts(summary)),
        ("reward of chosen over rejected", _rewards(summary)),
        ("exact match before -> after", _percentages(summary)),
        ("answers that end by themselves", _stops(summary)),
        ("training time", f"{summary['train_s']:.0f} s"),
        (
            "tokens/s (targets/s)",
            f"{_number(summary['tokens_per_s'])} ({_number(summary['target_tokens_per_s'])})",
        ),
        (
            "matmul use (MFU)",
            "-"
            if summary["mfu"] is None
            else f"{100 * summary['mfu']:.0f} % of what this machine multiplies",
        ),
        (
            "peak memory",
            "-" if summary["peak_memory_gib"] is None else f"{summary['peak_memory_gib']:.1f} GiB",
        ),
    ):
        if text:
            table.add_row(name, text)
    console.print()
    console.print(table, highlight=False)


def print_answers(
    console: Console, asked: Sequence[Question], before: Sequence[str], after: Sequence[str], number: int = 3
) -> None:
    """The first rows' answers before and after, beside what the row has."""
    table = Table(
        show_lines=True,
        title=f"{min(number, len(asked))} held-out rows, before and after",
        title_justify="left",
    )
    for heading in ("asked", "expected", "before", "after"):
        table.add_column(heading, overflow="fold", ratio=1)
    for question, first, last in list(zip(asked, before, after, strict=True))[:number]:
        table.add_row(
            *(
                escape(text if len(text) <= 300 else text[:297] + "...")
                for text in (question.asked, question.expected, first, last)
            )
        )
    console.print(table, highlight=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _change(before: float | None, after: float | None) -> str:
    if after is None:
        return ""
    return f"{before:.4f} -> {after:.4f}" if before is not None else f"{after:.4f}"


def _of_texts(summary: dict[str, Any]) -> str:
    if "eval_perplexity" not in summary:
        return ""
    return f"{summary['eval_perplexity']:.4g}, {summary['eval_bits_per_byte']:.4f}"


def _rewards(summary: dict[str, Any]) -> str:
    if "eval_reward_accuracy" not in summary:
        return ""
    accuracy = f"{100 * summary['eval_reward_accuracy']:.1f} % of validation pairs"
    return f"greater in {accuracy}, by {summary['eval_reward_margin']:.4f} on average"


def _percentages(summary: dict[str, Any]) -> str:
    if "exact_match_after" not in summary:
        return ""
    before, after = (100 * summary[f"exact_match_{when}"] for when in ("before", "after"))
    return f"{before:.0f} % -> {after:.0f} % of {summary['answered_rows']} held-out rows"


def _stops(summary: dict[str, Any]) -> str:
    if "stop_rate" not in summary:
        return ""
    names = ("stop_rate_before", "stop_rate")
    rates = [f"{100 * summary[name]:.0f} %" for name in names if name in summary]
    return f"{' -> '.join(rates)} of {summary['stop_rate_rows']}"
