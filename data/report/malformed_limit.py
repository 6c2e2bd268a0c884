"""Stops the data step where too many rows of a corpus are malformed: then the corpus is not what its entry says."""

from collections import Counter
from pathlib import Path

from core.errors import RefusedInput
from data.report.set_aside import SetAside

TOLERATED_ROWS = 10
"""Malformed rows that never stop the step where some are allowed: a few rows of a small corpus are a large share."""
EARLY_ROWS = 1_000
"""Rows of a unit after which it stops at once if most of them are malformed, instead of reading on for hours."""
EARLY_SHARE = 0.5


def is_exceeded(malformed: int, read: int, share: float) -> bool:
    """Return whether more than `share` of the rows read are malformed. A share of 0 allows none at all."""
    if share == 0:
        return malformed > 0
    return malformed > TOLERATED_ROWS and malformed > share * read


def check_unit(corpus: str, read: int, malformed: SetAside, share: float) -> None:
    """Check the rows that a unit has read so far.

    Raises:
        RefusedInput: more than EARLY_SHARE of at least EARLY_ROWS rows are malformed.
    """
    total = malformed.counts.total()
    if read >= EARLY_ROWS and is_exceeded(total, read, max(share, EARLY_SHARE)):
        raise _make_refusal(corpus, read, malformed.counts, share, malformed.path)


def find_exceeding(rows: dict[str, tuple[int, Counter[str]]], share: float) -> list[str]:
    """Return the corpora of `rows` (see `check_corpora`) of which more than `share` of the rows are malformed."""
    return [corpus for corpus, (read, reasons) in rows.items() if is_exceeded(reasons.total(), read, share)]


def check_corpora(rows: dict[str, tuple[int, Counter[str]]], share: float, folder: Path) -> None:
    """Check all rows of every corpus.

    Args:
        rows: corpus -> the number of rows read, and the number of malformed ones by reason.
        share: `DataConfig.max_malformed_share`.
        folder: where the samples lie.

    Raises:
        RefusedInput: more than `share` of a corpus's rows are malformed; states the reasons.
    """
    for corpus in find_exceeding(rows, share):
        raise _make_refusal(corpus, *rows[corpus], share, folder)


def _make_refusal(corpus: str, read: int, reasons: Counter[str], share: float, samples: Path) -> RefusedInput:
    total = reasons.total()
    listed = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(10))
    return RefusedInput(
        f"corpus {corpus}: {total:,} of {read:,} rows ({total / read:.1%}) cannot be used, more than "
        f"data.max_malformed_share = {share:g} allows ({listed}); look at the samples in {samples}, correct the "
        "corpus's entry or its files, or raise --data.max-malformed-share, and run again: the others are not read again"
    )
