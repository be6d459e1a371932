"""Two loss curves beside each other: the plain loop, and tunesmith over the same rows in each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Compared in each number format: padded rows through transformers and PEFT, and the real thing.
COMPARED = (
    ("plain_fp32", "tunesmith_fp32"),
    ("plain_bf16_r1", "tunesmith"),
    ("plain_fp32", "tunesmith"),
)
STEPS, ROWS_PER_STEP = 50, 8


def compare(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses of both runs of each comparison that was run, and how far they part."""
    losses = {
        run["rung"]: [step["loss"] for step in run["steps"]] for run in results["runs"] if "error" not in run
    }
    found = []
    for plain, ours in COMPARED:
        if plain not in losses or ours not in losses:
            continue
        pairs = list(zip(losses[plain], losses[ours], strict=True))
        apart = [abs(a - b) for a, b in pairs]
        found.append(
            {
                "plain": plain,
                "ours": ours,
                "losses": pairs,
                "largest_difference": max(apart),
                "at_step": apart.index(max(apart)) + 1,
                "largest_relative": max(
                    difference / a for difference, (a, _) in zip(apart, pairs, strict=True)
                ),
            }
        )
    return found


def table(compared: list[dict[str, Any]]) -> str:
    """A markdown table of every fifth step, the first and the last, and a line on how far they part."""
    lines = []
    for one in compared:
        steps = sorted({1, *range(5, len(one["losses"]) + 1, 5), len(one["losses"])})
        lines += [
            f"| step | {one['plain']} | {one['ours']} | difference |",
            "|---:|---:|---:|---:|",
            *(
                f"| {step} | {a:.5f} | {b:.5f} | {b - a:+.1e} |"
                for step in steps
                for a, b in [one["losses"][step - 1]]
            ),
            "",
            f"Largest difference over {len(one['losses'])} steps: {one['largest_difference']:.1e} "
            f"(step {one['at_step']}), {100 * one['largest_relative']:.3f} % of the loss.",
            "",
        ]
    return "\n".join(lines)


def write_svg(compared: list[dict[str, Any]], file: Path) -> None:
    """The curves as a drawing: plain broad and pale, tunesmith's thin and dark on top of it."""
    width, height, margin = 640, 240, 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height * len(compared)}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, one in enumerate(compared):
        values = [value for pair in one["losses"] for value in pair]
        low, high, count = min(values), max(values), len(one["losses"])
        top, bottom = number * height + margin, (number + 1) * height - margin
        for which, colour, stroke in ((0, "#f4a259", 5), (1, "#1d3557", 1.3)):
            points = " ".join(
                f"{margin + (width - 2 * margin) * step / max(1, count - 1):.1f},"
                f"{bottom - (bottom - top) * (pair[which] - low) / ((high - low) or 1.0):.1f}"
                for step, pair in enumerate(one["losses"])
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{stroke}"/>'
            )
        parts += [
            f'<text x="{margin}" y="{top - 12}">loss of each step: {one["plain"]} (broad), {one["ours"]} '
            f"(thin); largest difference {one['largest_difference']:.1e}</text>",
            f'<text x="4" y="{top + 4}">{high:.2f}</text>',
            f'<text x="4" y="{bottom + 4}">{low:.2f}</text>',
            f'<text x="{width - margin - 20}" y="{bottom + 18}">step {count}</text>',
        ]
    file.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
