"""Inputs of a small real preparation: planted files and corpora of installed packages, without a registry."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Corpus, RemoteFiles
from data.config import DataConfig, TokenizerConfig
from data.readers import remote_readers

BENCHMARK_ITEM = (
    "A baker sells seven trays of rolls every morning and two trays more on market days, so how many trays does she "
    "sell in a week with two market days"
)
NUM_PAGES = 60
NOUNS = (
    "river", "engine", "market", "violin", "glacier", "harbour", "lantern", "orchard", "telescope", "village", "copper",
    "winter", "teacher", "garden", "bridge", "letter", "window", "forest", "paper", "sailor", "kitchen", "stone",
)  # fmt: skip
VERBS = ("carries", "follows", "remembers", "describes", "crosses", "repairs", "measures", "paints", "visits", "counts")
LINKS = ("of the", "near a", "with that", "and the", "to have a", "beside the", "under this", "before the")


def page(number: int) -> str:
    """Return prose that passes the web filters: random sentences, so that no two pages share much."""
    rng = random.Random(number)
    lines = []
    for _ in range(12):
        words = ["The", rng.choice(NOUNS), rng.choice(VERBS), "the", rng.choice(NOUNS)]
        for _ in range(4):
            words += [rng.choice(LINKS), rng.choice(NOUNS)]
        lines.append(" ".join(words) + ".")
    return "\n".join(lines)


def planted_rows() -> list[str]:
    """Return jsonl lines: pages, an exact duplicate, a near duplicate, a contaminated page and three malformed rows."""
    pages = [page(number) for number in range(NUM_PAGES)]
    near = pages[7].replace("The ", "Our ", 1)
    contaminated = pages[11] + "\n" + BENCHMARK_ITEM.replace(",", " -") + " altogether."
    lines = [json.dumps({"text": text}) for text in (*pages[:11], *pages[12:], pages[3], near, contaminated)]
    return [*lines, '{"text": "cut off', json.dumps({"text": None}), json.dumps({"body": "no text"})]


def mirror_rows() -> list[str]:
    """Return jsonl lines of a second corpus: copy and near copy of pages of the first, an address, and other pages."""
    near = page(21).replace("The ", "Our ", 1)
    address = page(NUM_PAGES) + "\nWrite to the teacher at jane.doe@company.com with the letter."
    texts = [page(20), near, address, *(page(number) for number in range(NUM_PAGES + 1, NUM_PAGES + 10))]
    return [json.dumps({"text": text}) for text in texts]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Inputs and results of the small preparation."""

    config: DataConfig
    benchmark_texts: Path
    source: Path
    out: Path
    manifest: dict
    reports: list[tuple[str, int, int]]


def planted_corpora(source: Path) -> dict[str, Corpus]:
    """Return the planted corpora, by name, as entries of the catalogue."""
    planted = Corpus(
        "planted", "web", "text", "prose", "test", RemoteFiles(str(source), "*.jsonl"), remote_readers.read_text,
        text_bytes=3_900_000_000,  # by the catalogue; so each of the two files is a unit
        language_filtered="English <by its publisher>",
    )  # fmt: skip
    mirror = dataclasses.replace(
        planted, name="mirror", source=RemoteFiles(str(source / "mirror"), "*.jsonl"), stages=("midtrain",)
    )
    return {"planted": planted, "mirror": mirror}


def plant(patch: pytest.MonkeyPatch, source: Path) -> None:
    """Add the planted corpora to the catalogue."""
    for name, corpus in planted_corpora(source).items():
        patch.setitem(CATALOGUE, name, corpus)


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write the planted corpora and the benchmark texts; return their paths."""
    source = folder / "planted"
    source.mkdir()
    rows = planted_rows()
    (source / "a.jsonl").write_text("\n".join(rows[:40]) + "\n")
    (source / "b.jsonl").write_text("\n".join(rows[40:]) + "\n")
    (source / "mirror").mkdir()
    (source / "mirror/a.jsonl").write_text("\n".join(mirror_rows()) + "\n")
    benchmark_texts = folder / "benchmark_texts.jsonl"
    rows = [{"benchmark": "bakery", "text": BENCHMARK_ITEM}, {"benchmark": "short", "text": "What is the river?"}]
    benchmark_texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source, benchmark_texts


CONFIG = DataConfig(
    corpora=("planted", "mirror", "wikipedia-plain", "tool-calls"),
    tokenizer=TokenizerConfig(train_vocab_size=1024),
    heldout_fraction=0.1,
)
