"""Writes the statistics page of a data step: one HTML file that needs no other file."""

from collections.abc import Iterable
from pathlib import Path

import jinja2

from core.atomic import write_text
from core.stages import HELDOUT_FOLDERS, SHARD_FOLDERS
from data.report.shard_statistics import ShardStatistics

TEMPLATE = Path(__file__).with_name("templates") / "statistics.html.j2"
TABLE_ORDER = (*(f"shards/{name}" for name in SHARD_FOLDERS), *(f"heldout/{name}" for name in HELDOUT_FOLDERS))
"""Order of the tables: training before held-out data, each in the order of the stages."""


def write_page(manifest: dict, statistics: dict[str, ShardStatistics], path: Path) -> None:
    """Write the page: documents, tokens, dropped rows, contamination, lengths and samples.

    Args:
        manifest: the content of data_manifest.json.
        statistics: by destination, from `data.report.shard_statistics.load`.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = format_short
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        manifest=manifest,
        stages=list(make_stage_tables(statistics)),
        corpora=list(make_corpus_rows(manifest)),
        reasons=list(make_reason_rows(manifest)),
        published=list(make_publisher_rows(manifest)),
    )
    write_text(path, page)


def format_short(number: float) -> str:
    """Return a number with three digits and a suffix: 1.23M for 1234567."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def make_stage_tables(statistics: dict[str, ShardStatistics]) -> Iterable[dict]:
    """Yield a table for each stage: `name`, `documents`, `tokens` and `domains`.

    An entry of `domains` has the counts, the share of the stage's tokens, the bars of the histogram and the samples.
    """
    stages: dict[str, dict[str, ShardStatistics]] = {}
    for target, entry in statistics.items():
        stage, _, domain = target.rpartition("/")
        stages.setdefault(stage, {})[domain] = entry
    for stage in sorted(stages, key=TABLE_ORDER.index):
        domains = stages[stage]
        tokens = sum(entry.counts["tokens"] for entry in domains.values())
        yield {
            "name": stage,
            "documents": sum(entry.counts["documents"] for entry in domains.values()),
            "tokens": tokens,
            "domains": [
                {
                    "name": domain,
                    "share": entry.counts["tokens"] / tokens,
                    "tokens_per_document": entry.counts["tokens"] / entry.counts["documents"],
                    "bytes_per_token": entry.counts["bytes"] / entry.counts["tokens"],
                    "bars": list(make_bars(entry)),
                    "samples": [{"corpus": corpus, "text": text} for _, corpus, text in entry.samples],
                    **entry.counts,
                }
                for domain, entry in domains.items()
            ],
        }


def make_bars(entry: ShardStatistics) -> Iterable[dict]:
    """Yield the bars of the histogram from its first filled bin to its last.

    A bar has `low` (tokens), the number of `documents` and its `height` as a share of the highest bar.
    """
    filled = entry.lengths.nonzero()[0]
    for k in range(filled[0], filled[-1] + 1):
        count = int(entry.lengths[k])
        yield {"low": 2**k, "documents": count, "height": count / int(entry.lengths.max())}


def make_corpus_rows(manifest: dict) -> Iterable[dict]:
    """Yield a row for each corpus: its manifest entry, and `parts` with the count and share of every outcome."""
    for name, entry in manifest["corpora"].items():
        refused = sum(entry["refused"].values())
        outcomes = {
            "kept": entry["kept"] - entry["too_long"] - refused,
            "malformed": entry["malformed"],
            "excluded": sum(entry["excluded"].values()),
            "filtered": sum(sum(flow["dropped"].values()) for flow in entry["filters"].values()),
            "exact duplicate": entry["exact_duplicates"],
            "near duplicate": entry["near_duplicates"],
            "contaminated": sum(entry["contaminated"].values()),
            "too slow": sum(entry["too_slow"].values()),
            "too long": entry["too_long"],
            "refused": refused,
        }
        parts = [
            {"outcome": outcome, "count": count, "share": count / entry["read"]} for outcome, count in outcomes.items()
        ]
        yield {"name": name, "parts": parts, **entry}


PUBLISHER_WORK = {
    "deduplicated": "near duplicates", "language_filtered": "language", "quality_filtered": "quality",
    "pii_redacted": "addresses",
}  # fmt: skip
"""Fact of a corpus (data/catalogue/corpus.py) -> the work that was left out for it."""


def make_publisher_rows(manifest: dict) -> Iterable[dict]:
    """Yield a row for each corpus and kind of work that was left out, because its publisher has done it."""
    for name, entry in manifest["corpora"].items():
        for fact, work in PUBLISHER_WORK.items():
            if entry[fact] and entry["kind"] == "text":
                yield {"corpus": name, "work": work, "statement": entry[fact]}


def make_reason_rows(manifest: dict) -> Iterable[dict]:
    """Yield a row for each corpus and cause: documents that reached it and were dropped, most common reason first.

    The causes are malformed and excluded rows, and then the filters.
    """
    for name, entry in manifest["corpora"].items():
        causes = [("malformed rows", entry["malformed_reasons"]), ("excluded rows", entry["excluded"])]
        flows = [(cause, entry["read"], reasons) for cause, reasons in causes if reasons]
        flows += [(label, flow["in"], flow["dropped"]) for label, flow in entry["filters"].items()]
        for cause, reached, dropped in flows:
            reasons = sorted(dropped.items(), key=lambda item: -item[1])
            yield {"corpus": name, "filter": cause, "in": reached, "dropped": sum(dropped.values()), "reasons": reasons}
