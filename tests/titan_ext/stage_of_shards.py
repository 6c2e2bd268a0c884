"""A stage folder of real MDS shards for the tests of the loader, and how they read it."""

from pathlib import Path

import numpy as np
import torch
from streaming import MDSWriter, Stream
from streaming.base.world import World

from titan_ext.loader import shard_store
from titan_ext.loader.streaming_loader import StreamingLoader

G, B, L, PAD = 8, 1, 32, 0
MIXTURE = {"code": 0.2, "math": 0.3, "web": 0.5}
DOCUMENTS = {"code": 60, "math": 90, "web": 200}


def write_domain(folder: Path, documents, masks=None, compression="zstd", size_limit=2000, hashes=("xxh64",)):
    columns = {"tokens": "ndarray:uint32"} | ({"loss_mask": "ndarray:uint8"} if masks is not None else {})
    with MDSWriter(
        out=str(folder), columns=columns, compression=compression, hashes=list(hashes), size_limit=size_limit
    ) as writer:
        for i, tokens in enumerate(documents):
            sample = {"tokens": np.asarray(tokens, np.uint32)}
            writer.write(sample if masks is None else sample | {"loss_mask": np.asarray(masks[i], np.uint8)})


def write_stage(root: Path, **kwargs) -> Path:
    """Documents of consecutive tokens, no token twice: code's from 1,000,000 on, math's from 2,000,000."""
    rng = np.random.default_rng(0)
    for d, (name, count) in enumerate(DOCUMENTS.items()):
        lengths = rng.integers(2, 40, count)
        starts = np.cumsum(lengths + 5) - lengths + (d + 1) * 1_000_000
        write_domain(root / name, [np.arange(n) + s for n, s in zip(lengths, starts, strict=True)], **kwargs)
    return root


def build(shards, local, rank=0, world=1, *, seq_len=L, batch=B, **config):
    config = {"mixture": MIXTURE, "global_batch_size": G, "pad_token_id": PAD, "seed": 3} | config
    config = StreamingLoader.Config(shards=str(shards), local=str(local), **config)
    return config.build(
        dp_world_size=world, dp_rank=rank, tokenizer=None, seq_len=seq_len, local_batch_size=batch,
        snapshot_every_n_steps=10,
    )  # fmt: skip


def load_stock_readers(stream: Stream):
    """Return streaming's own readers of all shards, as its StreamingDataset makes them."""
    world = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
    return stream.get_shards(world, allow_unsafe_types=False)


def rows(batch):
    """[B, 3, L]: input, positions, labels."""
    inputs, labels = batch
    return torch.stack([inputs["input"], inputs["positions"], labels], dim=1).numpy()


def sequences(loaders, micro_steps):
    """The sequences of `micro_steps` micro-batches of all ranks, [N, 3, L], in the order global batch, rank, row.

    Several ranks must take whole global batches.

    At return no thread prepares shards any more, so that a test may look at the cache, or damage it.
    """
    iterators = [iter(loader) for loader in loaders]
    try:
        taken = np.stack([[rows(next(it)) for it in iterators] for _ in range(micro_steps)])
        micro_batches = (
            loaders[0]._config.global_batch_size // (len(loaders) * taken.shape[2]) if len(loaders) > 1 else 1
        )
        by_batch = taken.reshape(-1, micro_batches, *taken.shape[1:])
        return by_batch.swapaxes(1, 2).reshape(-1, *taken.shape[-2:])
    finally:
        for loader in loaders:  # the thread that packs batches ahead first: it asks for shards
            loader._packer.shutdown(cancel_futures=True)
        shard_store._worker_pool().shutdown()
        shard_store._worker_pool.cache_clear()
