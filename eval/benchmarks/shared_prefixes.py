"""`group_by_prefix`: which token sequences are computed over the cache of a prefix that they share."""

from collections.abc import Sequence
from itertools import pairwise

MIN_PREFIX = 32
"""Number of tokens below which a prefix is not worth a forward pass of its own."""
MIN_SAVED = 512
"""Number of tokens below which a group saves too little to leave the large batches of the others."""

Ids = tuple[int, ...]


def group_by_prefix(sequences: Sequence[Ids]) -> list[tuple[Ids, list[Ids]]]:
    """Return prefixes, each with the sequences that begin with it; the last prefix is empty, for all others.

    A prefix is shorter than each of its sequences. Sequences lie in one group if neighbours in sorted order share at
    least MIN_PREFIX tokens, and the group's prefix is what all of them share.

    Args:
        sequences: distinct, none of them empty.
    """
    groups: list[list[Ids]] = []
    shared: list[int] = []
    ordered = sorted(sequences)
    for before, ids in pairwise([(), *ordered]):
        common = _count_common(before, ids)
        if common < MIN_PREFIX:
            groups.append([ids])
            shared.append(len(ids))
        else:
            groups[-1].append(ids)
            shared[-1] = min(shared[-1], common)
    found: list[tuple[Ids, list[Ids]]] = []
    others: list[Ids] = []
    for group, common in zip(groups, shared, strict=True):
        length = min(common, min(map(len, group)) - 1)
        if len(group) > 1 and length >= MIN_PREFIX and length * (len(group) - 1) >= MIN_SAVED:
            found.append((group[0][:length], group))
        else:
            others += group
    return [*found, ((), others)] if others else found


def _count_common(a: Ids, b: Ids) -> int:
    """Return the number of leading tokens that two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
