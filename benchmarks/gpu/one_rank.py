"""Trains on one rank of this machine's device: the model, the loader and the trainer that a stage of a run has.

On a GPU the device is the GPU. Where there is none, the same code runs on the CPU, and at toy size in the tests.
"""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from core.samples import SHARD_HASH, TEXT_COLUMNS
from titan_ext.cards import Machine
from titan_ext.config import FLAVORS, ModelDims, ParallelConfig, Recomputation, StageConfig
from titan_ext.cpu.device import IS_CPU, find_machine
from titan_ext.layout import settle_layout
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.training.schedules import published_stages
from titan_ext.training.trainer import StageTrainer
from titan_ext.training.trainer_config import build_trainer_config

DEVICE = "cpu" if IS_CPU else "cuda"
TOKENIZER = {"model": {"type": "WordLevel", "vocab": {"a": 0, "<pad>": 1}, "unk_token": "a"}}
TOY = dataclasses.replace(FLAVORS["tiny"], n_layers=2, n_experts=12, vocab_size=512)
"""Dimensions of a toy run, in place of all others."""
TOY_SEQ_LEN = 128
RECIPE_GPUS = {"S": 64, "M": 128, "L": 256}
"""GPUs of the recipes s, m and l. A machine for these checks need not have what the recipes import."""
DOCUMENTS = 256
"""Number of documents in the data of a check. The loader begins anew when they are used up."""


@dataclasses.dataclass(frozen=True)
class Training:
    """A check trains this model, with the values of this stage, on this layout."""

    dims: ModelDims
    stage: StageConfig
    parallel: ParallelConfig


def describe_training(
    dims: ModelDims,
    *,
    seq_len: int,
    local_batch_size: int,
    micro_batches: int,
    capacity_factor: float | None = None,
    quantize: bool = False,
    float8: bool = False,
    precision: str = "bfloat16",
    activation_checkpoint: Recomputation | None = None,
    compile: bool = True,
) -> Training:
    """Return a training of one rank with the published hyper-parameters of pre-training and these sizes.

    Args:
        activation_checkpoint: recomputation; None takes what the published recipe of these dimensions settles on, or
            without a recipe what fits the GPU here.
    """
    stage = dataclasses.replace(
        published_stages()["pretrain"], steps=10_000, seq_len=seq_len, local_batch_size=local_batch_size,
        global_batch_size=local_batch_size * micro_batches, capacity_factor=capacity_factor, quantize=quantize,
        float8=float8, mixture={"web": 1.0}, log_interval=10_000,
    )  # fmt: skip
    recomputation = activation_checkpoint or settle_published(dims)
    parallel = ParallelConfig(world_size=1, precision=precision, activation_checkpoint=recomputation, compile=compile)
    return Training(dims, stage, settle_layout(dims, [stage], parallel, find_machine()))


def settle_published(dims: ModelDims) -> Recomputation | None:
    """Return what the published recipe of these dimensions computes again; None where there is none."""
    name = next((name for name in RECIPE_GPUS if FLAVORS[name] == dims), None)
    if name is None:
        return None
    layout = ParallelConfig(world_size=RECIPE_GPUS[name], expert_parallel=None, data_parallel_replicate=None)
    return settle_layout(dims, published_stages().values(), layout, Machine()).activation_checkpoint


def write_data(folder: Path, vocab_size: int, lengths: tuple[int, int]) -> None:
    """Write documents of random tokens and a small tokenizer.

    Args:
        lengths: smallest and largest number of tokens of a document.
    """
    from streaming import MDSWriter

    rng = np.random.default_rng(0)
    out = str(folder / "shards" / "web")
    with MDSWriter(out=out, columns=TEXT_COLUMNS, hashes=[SHARD_HASH], size_limit=1 << 22) as writer:
        for length in rng.integers(lengths[0], lengths[1] + 1, DOCUMENTS):
            writer.write({"tokens": rng.integers(0, vocab_size, length).astype(np.uint32)})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER))


def build_trainer(training: Training, folder: Path) -> StageTrainer:
    """Return the trainer of one rank, with data of its own in the new folder `folder`.

    A bfloat16 step of `Training.stage` reads documents that each fill a sequence, so that attention costs what
    `titan_ext.model_stats` counts; float64 references get shorter ones, several a sequence (`correctness`).
    """
    return build_trainer_on(training, folder, (training.stage.seq_len + 1,) * 2)


def build_trainer_on(training: Training, folder: Path, lengths: tuple[int, int]) -> StageTrainer:
    """Return the trainer of one rank whose documents have lengths between two numbers of tokens."""
    write_data(folder, training.dims.vocab_size, lengths)
    be_one_rank()
    config = build_trainer_config(
        model=training.dims, stage=training.stage, parallel=training.parallel, shards=str(folder / "shards"),
        heldout=None, tokenizer=str(folder / "tokenizer"), out=str(folder / "out"), seed=0,
        quantization=QuantizationConfig(),
    )  # fmt: skip
    config.checkpoint.enable = False
    if IS_CPU:
        config.compile.backend = "aot_eager"  # compilation for the CPU takes longer than a toy run
    return config.build()


def be_one_rank() -> None:
    """Set the variables that a launcher sets, for a world of one rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


def close(trainer: StageTrainer) -> None:
    """End a trainer, so that this process can build another one."""
    trainer.close()
    dist.destroy_process_group()
    torch.compiler.reset()
    if not IS_CPU:
        torch.cuda.empty_cache()


def make_step(trainer: StageTrainer) -> Callable[[], float]:
    """Return a function that trains one optimizer step and returns its time in seconds."""
    batches: Iterator = trainer.batch_generator(trainer.dataloader)

    def step() -> float:
        synchronize()
        start = time.perf_counter()
        trainer.step += 1
        trainer.train_step(batches)
        synchronize()
        return time.perf_counter() - start

    return step


def synchronize() -> None:
    """Wait until the device has finished all work."""
    if not IS_CPU:
        torch.cuda.synchronize()


def time_call(function: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call in seconds, over as many calls as fit into `seconds`, three at least.

    Calls of less than a millisecond are timed in groups, because a GPU must be waited for after each group.
    """
    for _ in range(3):
        function()
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    calls = max(1, round(5e-3 / max(time.perf_counter() - start, 1e-6)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[len(times) // 2]
