"""Speed of the streaming loader in tokens/s a process, on one core and on two; every shard is hashed before its use.

    python benchmarks/loader_speed.py [--rounds 3] [--million-tokens 48]

Three domains of documents with lengths as the web's (log-normal, some 700 tokens on average) lie in 64 MiB shards.
In the first row compressed shards are unpacked into an empty cache within the time measured; in the second they are
read from the full cache. A process has five threads of its own, so each is pinned to its cores: one process on one
core, one process on two, and two processes on a core each. The figures are medians over the rounds. The last line gives
the largest gain that two cores of this machine allow.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import two_cores
from streaming import MDSWriter

from core.samples import SHARD_HASH, TEXT_COLUMNS
from titan_ext.loader.streaming_loader import StreamingLoader

MIXTURE = {"code": 0.2, "math": 0.3, "web": 0.5}
SEQ_LEN, BATCH, GLOBAL_BATCH = 2048, 8, 64


def write_shards(folder: Path, tokens: int, compression: str | None) -> None:
    """Write random documents of about `tokens` tokens altogether, one MDS folder a domain."""
    rng = np.random.default_rng(0)
    for name, share in MIXTURE.items():
        left = int(tokens * share)
        with MDSWriter(
            out=str(folder / name), columns=TEXT_COLUMNS, compression=compression, hashes=[SHARD_HASH],
            size_limit=64 << 20,
        ) as writer:  # fmt: skip
            while left > 0:
                length = int(np.clip(rng.lognormal(6.1, 0.9), 16, 50_000))
                writer.write({"tokens": (rng.zipf(1.2, length) % 128_000).astype(np.uint32)})
                left -= length


LAYOUTS = {"1 on 1": (1, 1), "1 on 2": (1, 2), "2 on 1 each": (2, 1)}
"""Name -> number of processes, number of cores of each."""


def measure_process(
    shards: Path, cache: Path, rank: int, world: int, tokens: int, cores: set[int], barrier: Barrier, result: Queue
) -> None:
    """Put one process's tokens/s into `result`, from the start of the loader until it has yielded `tokens` tokens."""
    os.sched_setaffinity(0, cores)
    barrier.wait()
    started = time.perf_counter()
    config = StreamingLoader.Config(
        shards=str(shards), local=str(cache), mixture=MIXTURE, global_batch_size=GLOBAL_BATCH, pad_token_id=0
    )
    loader = config.build(
        dp_world_size=world, dp_rank=rank, tokenizer=None, seq_len=SEQ_LEN, local_batch_size=BATCH,
        snapshot_every_n_steps=100,
    )  # fmt: skip
    taken = 0
    for inputs, _ in loader:
        taken += inputs["input"].numel()
        if taken >= tokens:
            break
    result.put(taken / (time.perf_counter() - started))


def measure_layout(layout: str, shards: Path, cache: Path, tokens: int) -> float:
    """Return tokens/s summed over the layout's processes, which run at once and divide the tokens among them."""
    world, num_cores = LAYOUTS[layout]
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    barrier, result = context.Barrier(world), context.Queue()
    processes = [
        context.Process(
            target=measure_process,
            args=(shards, cache, rank, world, tokens // world, set(cores[rank : rank + num_cores]), barrier, result),
        )
        for rank in range(world)
    ]
    return two_cores.sum_results(result, processes)


def main() -> None:
    """Measure every kind of shards in every layout and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million-tokens", type=float, default=48)
    arguments = parser.parse_args()
    size = int(arguments.million_tokens * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, compression in (("plain", None), ("zstd", "zstd")):
            write_shards(root / name, size, compression)
        rates: dict[tuple[str, str], list[float]] = {}
        for _ in range(arguments.rounds):
            for layout in LAYOUTS:
                shutil.rmtree(root / "cache", ignore_errors=True)
                for label, shards in (
                    ("zstd, cache empty", root / "zstd"),
                    ("zstd, cache full", root / "zstd"),
                    ("uncompressed, in place", root / "plain"),
                ):
                    rate = measure_layout(layout, shards, root / "cache", size // 2)
                    rates.setdefault((label, layout), []).append(rate)
    print(f"{size / 1e6:.0f}M tokens of shards, half of them taken; million tokens/s\n")
    print("| shards | 1 process, 1 core | 1 process, 2 cores | 2 processes, a core each | 2 processes / 1 |")
    print("|---|--:|--:|--:|--:|")
    for label in dict.fromkeys(label for label, _ in rates):
        one, threads, two = (statistics.median(rates[label, layout]) / 1e6 for layout in LAYOUTS)
        print(f"| {label} | {one:.1f} | {threads:.1f} | {two:.1f} | {two / one:.2f} |")
    print(f"\n{two_cores.format_limits()}")


if __name__ == "__main__":
    main()
