"""The streaming loader: tokens/s a process, every shard hashed before use; one process against two.

    python benchmarks/loader_speed.py [--rounds 3] [--million-tokens 48]

Three domains of documents with lengths as the web's (log-normal, some 700 tokens on average) in 64 MiB shards.
Compressed shards are unpacked into an empty cache within the time measured, and read from the full one in the second
row. Medians over the rounds.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from streaming import MDSWriter

from titan_ext.streaming_loader import StreamingLoader

MIXTURE = {"code": 0.2, "math": 0.3, "web": 0.5}
SEQ_LEN, BATCH, GLOBAL_BATCH = 2048, 8, 64


def write_stage(folder: Path, tokens: int, compression: str | None) -> None:
    rng = np.random.default_rng(0)
    for name, share in MIXTURE.items():
        left = int(tokens * share)
        with MDSWriter(
            out=str(folder / name), columns={"tokens": "ndarray:uint32"}, compression=compression, hashes=["xxh64"],
            size_limit=64 << 20,
        ) as writer:  # fmt: skip
            while left > 0:
                length = int(np.clip(rng.lognormal(6.1, 0.9), 16, 50_000))
                writer.write({"tokens": (rng.zipf(1.2, length) % 128_000).astype(np.uint32)})
                left -= length


def tokens_per_second(shards: Path, cache: Path, rank: int, world: int, tokens: int) -> float:
    """Of one process, from the start of the loader to `tokens` tokens handed out."""
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
            return taken / (time.perf_counter() - started)
    raise AssertionError("the loader is endless")


def together(world: int, shards: Path, cache: Path, tokens: int) -> float:
    """Sum over `world` processes that run at once."""
    with multiprocessing.get_context("fork").Pool(world) as pool:
        parts = [(shards, cache, rank, world, tokens) for rank in range(world)]
        return sum(pool.starmap(tokens_per_second, parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million-tokens", type=float, default=48)
    arguments = parser.parse_args()
    size = int(arguments.million_tokens * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, compression in (("plain", None), ("zstd", "zstd")):
            write_stage(root / name, size, compression)
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(arguments.rounds):
            for world in (1, 2):
                shutil.rmtree(root / "cache", ignore_errors=True)
                for label, shards in (
                    ("zstd, cache empty", root / "zstd"),
                    ("zstd, cache full", root / "zstd"),
                    ("uncompressed, in place", root / "plain"),
                ):
                    rate = together(world, shards, root / "cache", size // 2 // world)
                    rates.setdefault((label, world), []).append(rate)
    print(f"{size / 1e6:.0f}M tokens of shards, half of them taken\n")
    print("| shards | 1 process, tokens/s | 2 processes, tokens/s together | 2 / 1 |\n|---|--:|--:|--:|")
    for label in dict.fromkeys(label for label, _ in rates):
        one, two = rates[label, 1], rates[label, 2]
        ratio = statistics.median(b / a for a, b in zip(one, two, strict=True))
        print(f"| {label} | {statistics.median(one):,.0f} | {statistics.median(two):,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
