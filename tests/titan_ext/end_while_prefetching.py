"""Processes that reach their end while the loader's threads prepare shards and batches; prints how each ended.

    python -m tests.titan_ext.end_while_prefetching STAGE CACHE NUM_PROCESSES

Forks of this one, at once, each with an empty cache of its own: they share the imports and end as a program does.
"""

import collections
import os
import random
import sys
import time
from pathlib import Path

from tests.titan_ext.stage_of_shards import build


def train_a_moment(stage: str, cache: Path) -> None:
    batches = iter(build(stage, cache, batch=4, seq_len=512))
    next(batches)
    time.sleep(random.Random(str(cache)).random() * 0.1)
    sys.modules["kept until the interpreter is gone"] = batches


def main(stage: str, caches: str, count: str) -> None:
    children = []
    for number in range(int(count)):
        child = os.fork()
        if not child:
            train_a_moment(stage, Path(caches) / str(number))
            return
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(dict(collections.Counter(codes)))


if __name__ == "__main__":
    main(*sys.argv[1:])
