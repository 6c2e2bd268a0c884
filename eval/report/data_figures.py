"""The report's picture of the data: one matplotlib Figure, one PNG. `narrow`: whether it is for a phone."""

from pathlib import Path

from core.stages import SHARD_FOLDERS
from eval.report.drawing import COLOURS, INK, NARROW, WIDE, make_figure, style_axes

HATCHES = ("", "///", "...", "xxx")
"""Fillings of domains beyond the colours."""


def draw_composition(rows: list[dict], path: Path, *, narrow: bool) -> None:
    """Draw the share of each domain in the tokens that every stage can train on, with the number of tokens beside it.

    Args:
        rows: split, stage, domain and trained_tokens, as in results.json; held-out rows are left out.
    """
    shares: dict[str, dict[str, int]] = {}
    order = {name: number for number, name in enumerate(SHARD_FOLDERS)}
    for row in sorted(rows, key=lambda row: order.get(row["stage"], len(order))):
        if row["split"] == "shards":
            shares.setdefault(row["stage"], {})[row["domain"]] = row["trained_tokens"]
    domains = sorted({domain for found in shares.values() for domain in found})
    figure = make_figure(NARROW if narrow else WIDE, 0.55 * len(shares) + (2.1 if narrow else 1.3))
    axes = figure.subplots()
    for place, found in enumerate(shares.values()):
        total, left = max(1, sum(found.values())), 0.0
        for number, domain in enumerate(domains):
            share = 100 * found.get(domain, 0) / total
            # A name of a domain is a text of the user's: no formulas in it.
            label = domain.replace("$", r"\$") if place == 0 else None
            axes.barh(
                place, share, left=left, height=0.7, color=COLOURS[number % 5], edgecolor="white", label=label,
                hatch=HATCHES[number // 5 % 4],
            )  # fmt: skip
            if share >= 8:
                axes.text(left + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=8, color="white",
                          bbox={"facecolor": COLOURS[number % 5], "edgecolor": "none", "pad": 1.5})  # fmt: skip
            left += share
        axes.text(101, place, f"{total:,}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set(ylim=(len(shares) - 0.4, -0.6), xlim=(0, 118), xlabel="percent of the tokens; their number on the right")
    axes.set_xticks(range(0, 101, 20))
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside lower left",
                  ncols=3 if narrow else 8)  # fmt: skip
    style_axes(axes, "What the shards of each stage hold")
    figure.savefig(path)
