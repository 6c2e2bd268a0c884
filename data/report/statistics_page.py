"""The statistics page of a data step: one HTML file that needs nothing else."""

from collections.abc import Iterable
from pathlib import Path

import jinja2

from data.report.shard_statistics import Tally

TEMPLATE = Path(__file__).with_name("templates") / "statistics.html.j2"


def write_page(manifest: dict, tallies: dict[str, Tally], path: Path) -> None:
    """Documents, tokens, drops, contamination, lengths and samples, written whole.

    Args:
        manifest: what data_manifest.json will hold.
        tallies: by destination, `data.report.shard_statistics.load`.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = short
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        manifest=manifest,
        stages=list(stage_tables(tallies)),
        corpora=list(corpus_rows(manifest)),
        reasons=list(drop_reasons(manifest)),
    )
    beside = path.with_name(path.name + ".partial")
    beside.write_text(page, encoding="utf-8")
    beside.rename(path)


def short(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def stage_tables(tallies: dict[str, Tally]) -> Iterable[dict]:
    """One a stage: `name`, `tokens`, and `domains` with counts, share of the tokens, histogram bars and samples."""
    stages: dict[str, dict[str, Tally]] = {}
    for target, tally in tallies.items():
        stage, _, domain = target.rpartition("/")
        stages.setdefault(stage, {})[domain] = tally
    # Training before held-out, in the order of the stages.
    order = ("shards/pretrain", "shards/midtrain", "shards/sft", "heldout/pretrain", "heldout/sft")
    for stage in sorted(stages, key=order.index):
        domains = stages[stage]
        tokens = sum(tally.counts["tokens"] for tally in domains.values())
        yield {
            "name": stage,
            "documents": sum(tally.counts["documents"] for tally in domains.values()),
            "tokens": tokens,
            "domains": [
                {
                    "name": domain,
                    "share": tally.counts["tokens"] / tokens,
                    "tokens_per_document": tally.counts["tokens"] / tally.counts["documents"],
                    "bytes_per_token": tally.counts["bytes"] / tally.counts["tokens"],
                    "bars": list(bars(tally)),
                    "samples": [{"corpus": corpus, "text": text} for _, corpus, text in tally.samples],
                    **tally.counts,
                }
                for domain, tally in domains.items()
            ],
        }


def bars(tally: Tally) -> Iterable[dict]:
    """The histogram from its first filled bin to its last: `low` (tokens), `documents`, `height` (of the highest)."""
    filled = tally.lengths.nonzero()[0]
    for k in range(filled[0], filled[-1] + 1):
        count = int(tally.lengths[k])
        yield {"low": 2**k, "documents": count, "height": count / int(tally.lengths.max())}


def corpus_rows(manifest: dict) -> Iterable[dict]:
    """What became of the rows of each corpus: `read`, and the count and share of every way a row can leave."""
    for name, entry in manifest["corpora"].items():
        left = {
            "kept": entry["kept"] - entry["too_long"],
            "malformed": entry["malformed"],
            "filtered": sum(sum(flow["dropped"].values()) for flow in entry["filters"].values()),
            "exact duplicate": entry["exact_duplicates"],
            "near duplicate": entry["near_duplicates"],
            "contaminated": sum(entry["contaminated"].values()),
            "too long": entry["too_long"],
        }
        parts = [{"what": what, "count": count, "share": count / entry["read"]} for what, count in left.items()]
        yield {"name": name, "parts": parts, **entry}


def drop_reasons(manifest: dict) -> Iterable[dict]:
    """One a corpus and filter: documents in, and those dropped by reason, most first."""
    for name, entry in manifest["corpora"].items():
        for label, flow in entry["filters"].items():
            reasons = sorted(flow["dropped"].items(), key=lambda item: -item[1])
            yield {"corpus": name, "filter": label, "in": flow["in"], "dropped": flow["in"] - flow["out"],
                   "reasons": reasons}  # fmt: skip
