"""Seconds and memory to open the index of 358,000 shards: streaming's readers, the first process of a node, the others.

    python -m benchmarks.scale.open_shards [--shards 357628]

Writes synthetic index.json files of the five domains of pre-training, as the data step does, to a temporary folder.
Every row is a process of its own. Its memory is what the resident memory has grown by since the imports, at the end and
at its peak. The first row makes a reader for every shard, as
streaming's StreamingDataset does, and as earlier versions of the loader did.
"""

import argparse
import json
import multiprocessing
import secrets
import tempfile
import time
from pathlib import Path

from streaming import Stream
from streaming.base.world import World

from core.atomic import write_json
from core.samples import VOCABULARY_KEY
from core.shard_columns import COLUMNS_FILE, write_columns
from titan_ext.loader.mixture import open_domains
from titan_ext.loader.shard_index import SETTLED_NANOSECONDS
from titan_ext.training.schedules import PRETRAIN_MIXTURE

SECTIONS = 32


def write_index(folder: Path, shards: int) -> None:
    """Write the index.json of a domain whose shards do not exist."""
    folder.mkdir(parents=True)

    def describe_file(name: str, size: int) -> dict:
        return {
            "basename": name,
            "bytes": size,
            "hashes": {"sha256": secrets.token_hex(32), "xxh64": secrets.token_hex(8)},
        }

    entries = [
        {
            "column_encodings": ["ndarray:uint32"], "column_names": ["tokens"], "column_sizes": [None],
            "compression": "zstd", "format": "mds", "hashes": ["sha256", "xxh64"], "size_limit": 64 << 20, "version": 2,
            "samples": 23_000 + number % 2000,
            "raw_data": describe_file(f"shard.{number:05d}.mds", (64 << 20) - number % 3000),
            "zip_data": describe_file(f"shard.{number:05d}.mds.zstd", (29 << 20) - number % 3000),
        }
        for number in range(shards)
    ]  # fmt: skip
    write_json(folder / "index.json", {"version": 2, VOCABULARY_KEY: secrets.token_hex(32), "shards": entries})


def make_stock_readers(root: Path, cache: Path) -> int:
    """Make streaming's readers of all shards."""
    world = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
    readers = []
    for name in PRETRAIN_MIXTURE:
        json.loads((root / name / "index.json").read_text())  # the loader checked the entries itself
        readers += Stream(local=str(root / name)).get_shards(world, allow_unsafe_types=False)
    _KEPT.append(readers)
    return len(readers)


def open_mapped(root: Path, cache: Path) -> int:
    """Open the domains as the loader does, and take the first shares of a rank's sections."""
    domains = open_domains(str(root), PRETRAIN_MIXTURE, cache, cache_bytes=1 << 36, seed=0, num_sections=SECTIONS)
    _KEPT.append([domain.take_share(section, 0) for domain in domains for section in range(SECTIONS // 8)])
    return sum(domain.store.index.num_shards for domain in domains)


_KEPT: list = []
"""What was opened, so that it is in memory when the memory is read."""


def read_memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measure(function, root: Path, cache: Path, result: multiprocessing.Queue) -> None:
    """Put shards, seconds of wall clock and of CPU, and growth of the memory into `result`."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start, cpu = read_memory("VmRSS"), time.perf_counter(), time.process_time()
    shards = function(root, cache)
    seconds = (time.perf_counter() - start, time.process_time() - cpu)
    result.put((shards, *seconds, read_memory("VmRSS") - before, read_memory("VmHWM") - before))


def main() -> None:
    """Print a row for each way to open the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=357_628)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder) / "shards", Path(folder) / "cache"
        for name, share in PRETRAIN_MIXTURE.items():
            write_index(root / name, round(arguments.shards * share))
        size = sum(path.stat().st_size for path in root.glob("*/index.json"))
        time.sleep(SETTLED_NANOSECONDS / 1e9 + 0.1)
        print(f"index.json of all domains: {size / 1e6:.0f} MB\n")
        print("| process | shards | s | s of CPU | memory, MB | peak, MB |\n|---|--:|--:|--:|--:|--:|")
        rows = (
            ("a reader for every shard, in every rank", make_stock_readers),
            ("first of a node, without index.columns", open_mapped),
            ("first of a node", open_mapped),
            ("every other rank, every later start", open_mapped),
        )
        for label, function in rows:
            if label == "first of a node":  # with what the data step writes, and a new cache
                for index in root.glob("*/index.json"):
                    write_columns(index, index.with_name(COLUMNS_FILE))
                cache = Path(folder) / "other cache"
            result = context.Queue()
            process = context.Process(target=measure, args=(function, root, cache, result))
            process.start()
            shards, seconds, cpu, memory, peak = result.get()
            process.join()
            print(
                f"| {label} | {shards:,} | {seconds:.1f} | {cpu:.1f} | {memory / 1e6:.0f} | {peak / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
