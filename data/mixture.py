"""This module counts the tokens that the corpora of a config have by split and domain, and derives shares from them.

The counts are those of the catalogue: before cleaning, each with its publisher's tokenizer. A corpus of unknown size
(of a package, or of a folder of this machine without `Corpus.tokens`) makes the tokens of its domain unknown: None.
"""

import math
from collections.abc import Mapping

from core.stages import SHARD_FOLDERS
from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import TEXT_DOMAINS, Corpus, RemoteFiles
from data.config import DataConfig
from data.planning import Rates

SHARE_DIGITS = 4
"""Decimal digits of derived shares, so that a recipe stays readable."""


def estimate_tokens(corpus: Corpus) -> float | None:
    """Return the tokens of a corpus: its publisher's, or those of its published size; None where neither is known."""
    if corpus.tokens is not None:
        return corpus.tokens
    if isinstance(corpus.source, RemoteFiles) and "://" in corpus.source.address:
        return corpus.text_bytes / Rates.text_bytes_per_token
    return None


def choose_heldout_fraction(config: DataConfig, corpus: Corpus) -> float:
    """Return the share of a corpus's documents that is held out.

    It is `heldout_fraction`, or less: as much as holds out `max_heldout_tokens` of the tokens that the catalogue knows.
    The share depends on the config and the corpus's entry alone. So it is the same for every unit and every number of
    workers, and whatever other corpora there are.
    """
    tokens = estimate_tokens(corpus)
    return min(config.heldout_fraction, config.max_heldout_tokens / tokens) if tokens else config.heldout_fraction


def count_heldout_tokens(config: DataConfig) -> float | None:
    """Return the tokens of all corpora that are held out; None where the size of one is unknown."""
    corpora = [CATALOGUE[name] for name in config.corpora]
    tokens = [estimate_tokens(corpus) for corpus in corpora]
    if None in tokens:
        return None
    return sum((n or 0) * choose_heldout_fraction(config, corpus) for n, corpus in zip(tokens, corpora, strict=True))


def count_split_tokens(config: DataConfig) -> dict[str, dict[str, float | None]]:
    """Return the tokens of every domain of every folder of training shards: folder -> domain -> tokens, or None."""
    counts: dict[str, dict[str, float | None]] = {folder: {} for folder in SHARD_FOLDERS}
    for corpus in (CATALOGUE[name] for name in config.corpora):
        tokens = estimate_tokens(corpus)
        trained = 1 - choose_heldout_fraction(config, corpus)
        for folder, share in split_shares(config, corpus).items():
            before = counts[folder].get(corpus.domain, 0.0)
            if tokens is None or before is None:
                counts[folder][corpus.domain] = None
            else:
                counts[folder][corpus.domain] = before + tokens * trained * share
    return counts


def split_shares(config: DataConfig, corpus: Corpus) -> dict[str, float]:
    """Return the folders of shards that a corpus feeds, each with its share of the documents that are not held out."""
    if len(corpus.splits) == 1:
        return {corpus.splits[0]: 1.0}
    share = config.midtrain_fraction[corpus.domain]
    return {"pretrain": 1 - share, "midtrain": share}


def balance_midtrain(
    config: DataConfig, pretrain: Mapping[str, float], midtrain: Mapping[str, float]
) -> dict[str, float]:
    """Return the `midtrain_fraction` of every text domain at which both text stages repeat the domain equally often.

    With A tokens in corpora that feed both stages and M in those for mid-training alone, a fraction f leaves A (1 - f)
    for P tokens of pre-training, and M + A f for N tokens of mid-training. The repetitions are equal at
    f = (N A - P M) / (A (N + P)), and no corpus is divided where M alone repeats less.

    Args:
        pretrain: domain -> tokens that pre-training takes of it.
        midtrain: domain -> tokens that mid-training takes of it.
    """
    fractions = {}
    for domain in TEXT_DOMAINS:
        corpora = _select(config, "text", domain)
        both = sum(estimate_tokens(c) or 0 for c in corpora if len(c.splits) > 1)
        only = sum(estimate_tokens(c) or 0 for c in corpora if c.splits == ("midtrain",))
        first, second = pretrain.get(domain, 0.0), midtrain.get(domain, 0.0)
        wanted = first + second
        fraction = (second * both - first * only) / (both * wanted) if both and wanted else 0.0
        fractions[domain] = _round_down(max(0.0, fraction))
    return fractions


def limit_shares(
    shares: Mapping[str, float], tokens: float, available: Mapping[str, float | None], max_epochs: float
) -> dict[str, float]:
    """Return the shares of a mixture, where none repeats its domain more than `max_epochs` times.

    A share that would is lowered to that number of repetitions, and the others grow in proportion. Domains of unknown
    size are not lowered. If no domain is left to grow, the shares stay as they are: the mixture must repeat.

    Args:
        shares: domain -> share of the tokens of a stage; they sum to 1.
        tokens: tokens of the stage.
        available: domain -> tokens that its corpora have.
    """
    counts = {domain: available.get(domain, 0.0) for domain in shares}
    limits = {domain: math.inf if n is None else max_epochs * n / tokens for domain, n in counts.items()}
    limited: dict[str, float] = {}
    while True:
        free = {domain: share for domain, share in shares.items() if domain not in limited}
        scale = (1 - sum(limited.values())) / sum(free.values()) if free else 0.0
        over = [domain for domain, share in free.items() if share * scale > limits[domain]]
        if not over:
            break
        limited |= {domain: _round_down(limits[domain]) for domain in over}
    if not limited or not free:
        return dict(shares)
    grown = {domain: _round_down(share * scale) for domain, share in free.items()}
    rest = 1 - sum(grown.values()) - sum(limited.values())
    largest = max(grown, key=lambda domain: grown[domain])
    grown[largest] = round(grown[largest] + rest, SHARE_DIGITS)
    return {domain: limited.get(domain, grown.get(domain, 0.0)) for domain in shares}


def _round_down(share: float) -> float:
    return math.floor(share * 10**SHARE_DIGITS) / 10**SHARE_DIGITS


def _select(config: DataConfig, kind: str, domain: str) -> list[Corpus]:
    corpora = [CATALOGUE[name] for name in config.corpora]
    return [corpus for corpus in corpora if corpus.kind == kind and corpus.domain == domain]
