"""Shards in the cache of a node over 6T tokens, fetches ahead of need, and download, for lengths of several spreads.

    python -m benchmarks.scale.loader_drift [--documents 64] [--nodes 8 32]

Simulated: one pass of pre-training over its 357,628 shards of 64 MiB, by one section of the loader's real schedule
(titan_ext/loader/order.py, domain.py, section.py) over shards that exist as numbers only. The other sections differ in
their random draws alone. Documents have log-normal lengths with the coefficient of variation in the first column, and
every shard has a mean length of its own, as corpora have. There are fewer and longer documents in a shard than in
reality, so the lengths of a section's lanes and shares vary more. A sequence holds one document of mean length, and a
section has few lanes, so that a batch is a small part of a shard.

The lead of a shard is what the section trains on between the request of the shard and its first document. A fetch with
less than FETCH_SECONDS of lead counts as late. Beside it stands the order of earlier versions, where every lane drew by
itself: the groups of 16 shards that the lanes of a node are in when the pass ends.
"""

import argparse
from types import SimpleNamespace

import numpy as np

from data.planning import MEASURED, TOKEN_BYTES
from titan_ext.loader.domain import Domain
from titan_ext.loader.order import LEFT_SHARDS, MAX_SECTIONS, list_sections, sum_held_bytes
from titan_ext.loader.packing import compute_initial_deficits
from titan_ext.loader.section import Section, SectionState
from titan_ext.training.schedules import PRETRAIN_MIXTURE, PRETRAIN_TOKENS, published_stages

SHARD_BYTES = 64 << 20
SHARD_TOKENS = SHARD_BYTES // TOKEN_BYTES
LANES = 4
"""Lanes of the simulated section."""
TOKENS_PER_SECOND = 20e6
"""Speed of all nodes: 256 GPUs that train L at 78,000 tokens/s each, more than any was measured at."""
FETCH_SECONDS = 5
"""Time for the download of 29 MB, unpacking and hashing, several times what docs/streaming_loader.md measures."""
OLD_GROUP = 16


class NumberedStore:
    """A ShardStore of shards that are numbers: it counts requests and the tokens between request and first use."""

    source = "simulated"

    def __init__(self, tokens: float, documents: int, cv: float, seed: int):
        rng = np.random.default_rng(seed)
        count = round(tokens / SHARD_TOKENS)
        scale = rng.lognormal(0, 0.5, count)
        samples = np.maximum(documents / scale, 4).astype(np.int64)
        self.means = SHARD_TOKENS / samples
        sigma = np.sqrt(np.log1p(cv**2))
        self.spread = rng.lognormal(-(sigma**2) / 2, sigma, 1 << 20)
        self.index = SimpleNamespace(samples=samples, raw_bytes=np.full(count, SHARD_BYTES), column_names=["tokens"])
        self.clock = lambda: 0
        self.requested: dict[int, int] = {}
        self.fetches = 0
        self.leads: list[int] = []

    def prefetch(self, shards: list[int]) -> None:
        """Count the shards that are not held yet, and forget those that are no longer asked for."""
        new = [shard for shard in shards if shard not in self.requested]
        self.fetches += len(new)
        self.requested = {shard: self.requested.get(shard, self.clock()) for shard in shards}

    def read(self, shard: int, index: int) -> dict:
        """Return a document of zeros that takes no memory."""
        asked = self.requested[shard]
        if asked >= 0:
            if asked:
                self.leads.append(self.clock() - asked)
            self.requested[shard] = -1
        length = int(self.means[shard] * self.spread[(shard * 977 + index) % len(self.spread)]) + 2
        return {"tokens": np.broadcast_to(np.uint32(0), length)}


def simulate_pass(cv: float, documents: int) -> tuple[list[NumberedStore], int]:
    """Run one section over its share of the pass. Return its stores and the most shards it held at a time."""
    weights = list(PRETRAIN_MIXTURE.values())
    stores = [NumberedStore(share * PRETRAIN_TOKENS, documents, cv, d) for d, share in enumerate(weights)]
    domains = [
        Domain(name, store, seed=0, num_sections=MAX_SECTIONS)  # type: ignore[arg-type]  # it reads no files
        for name, store in zip(PRETRAIN_MIXTURE, stores, strict=True)
    ]
    seq_len = SHARD_TOKENS // documents
    deficits = compute_initial_deficits(domains, weights, LANES * MAX_SECTIONS)[:LANES]
    section = Section(0, domains, weights, seq_len, deficits, SectionState.begin(len(domains), LANES))
    batches, most = 0, 0
    for store in stores:
        store.clock = lambda: batches * LANES * seq_len
    while batches * LANES * seq_len < PRETRAIN_TOKENS / MAX_SECTIONS:
        section.next_sequences()
        batches += 1
        most = max(most, sum(len(queue.held) + LEFT_SHARDS for queue in section.queues))
    return stores, most


def measure_old_order(cv: float, nodes: int) -> float:
    """Return the bytes of the shards that the lanes of a node are in at the end of a pass in which each drew alone."""
    lanes = published_stages()["pretrain"].global_batch_size
    rng, shards = np.random.default_rng(0), 0
    for share in PRETRAIN_MIXTURE.values():
        draws = share * PRETRAIN_TOKENS / MEASURED.tokens_per_document / lanes
        positions = np.arange(lanes) + rng.normal(draws, cv * np.sqrt(draws), lanes).astype(np.int64) * lanes
        groups = positions[: lanes // nodes] // round(OLD_GROUP * SHARD_TOKENS / MEASURED.tokens_per_document)
        shards += OLD_GROUP * (len(np.unique(groups)) + 1)
    return shards * SHARD_BYTES


def main() -> None:
    """Print one row for each spread of lengths and number of nodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=64, help="documents in a shard")
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--cv", type=float, nargs="+", default=[0.9, 1.3, 1.7])
    arguments = parser.parse_args()
    lanes = published_stages()["pretrain"].global_batch_size
    object_bytes = SHARD_TOKENS * MEASURED.shard_bytes_per_token
    print("| cv | nodes | cache before, GiB | now, GiB | bound, GiB | fetches | late | least lead, s | download, TB |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for cv in arguments.cv:
        stores, most = simulate_pass(cv, arguments.documents)
        leads = np.concatenate([store.leads for store in stores]) / (TOKENS_PER_SECOND / MAX_SECTIONS)
        fetches = sum(store.fetches for store in stores)
        for nodes in arguments.nodes:
            own = len(list_sections(lanes, 8 * nodes, 0, 8))
            bound = sum_held_bytes(own, [(SHARD_BYTES, 1 << 60)] * len(stores))
            sizes = (measure_old_order(cv, nodes), own * most * SHARD_BYTES, bound)
            cells = [f"{size / 2**30:.1f}" for size in sizes]
            cells += [f"{own * fetches:,}", f"{np.sum(leads < FETCH_SECONDS)}", f"{leads.min():.0f}"]
            cells.append(f"{own * fetches * object_bytes / 1e12:.2f}")
            print(f"| {cv} | {nodes} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
