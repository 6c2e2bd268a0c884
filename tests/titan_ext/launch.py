"""Runs a training stage over real processes, as a launcher would: one process a rank, gloo over loopback.

Ranks are forked from a server that has imported torchtitan once, which saves each of them ten seconds.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from streaming import MDSWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedTokenizerFast

from titan_ext.training.stage_spec import StageRun
from titan_ext.training.train import run_stage

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["titan_ext.training.train", "data.readers.corpus_reader", "data.filters.quality", "data.tokens.shard_writer"]
)


def start_server() -> None:
    """Start the process's one fork server before the data step's tests do, without torchtitan, for themselves.

    Not when this module is imported: every rank imports it, and a rank must not start a process then.
    """
    multiprocessing.forkserver.ensure_running()


def _run_rank(function: Callable[[StageRun], None], run: StageRun, environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    function(run)


def start_ranks(
    run: StageRun, scratch: Path, function: Callable[[StageRun], None] = run_stage, ranks: Iterable[int] | None = None
) -> list[BaseProcess]:
    """Start `function` on every rank of `run`, or on some; the caller joins or kills them."""
    scratch.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = run.parallel.world_size
    processes = []
    for rank in ranks or range(world):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        process = _SERVER.Process(target=_run_rank, args=(function, run, environment, scratch / f"rank_{rank}.log"))
        process.start()
        processes.append(process)
    return processes


def train(
    run: StageRun,
    scratch: Path,
    function: Callable[[StageRun], None] = run_stage,
    timeout: float = 200,
    ranks: Iterable[int] | None = None,
) -> None:
    """Run the stage (or `function` on it) to its end; an assertion with the ranks' logs where one fails."""
    processes = start_ranks(run, scratch, function, ranks)
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            time.sleep(1)  # the others may be about to say why
            break
        processes[0].join(0.1)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    logs = "\n".join(_end_of(log) for log in sorted(scratch.glob("rank_*.log")))
    assert codes == [0] * len(codes), f"ranks ended with {codes}\n{logs}"


def _end_of(log: Path) -> str:
    """The last lines of a rank's log, without the list of modules that a fatal signal prints."""
    text = log.read_text() if log.exists() else f"{log}: the rank had not started yet"
    lines = [line for line in text.splitlines() if not line.startswith("Extension modules:")]
    return "\n".join(lines)[-4000:]


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Model and optimizer state, unsharded."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("dataloader")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def entries(checkpoint: Path) -> set[str]:
    """Names of all that a checkpoint holds, numbers of the optimizer's groups included."""
    return set(dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors of model and optimizer that two checkpoints do not hold bit for bit alike."""
    tensors = [whole_tensors(checkpoint) for checkpoint in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    return [name for name, tensor in tensors[0].items() if not torch.equal(tensor, tensors[1][name])]


def write_data(folder: Path, vocab_size: int, domains=("web", "code"), documents: int = 150, seed: int = 0) -> Path:
    """A data step's output with learnable text: documents that count upwards modulo the vocabulary."""
    generator = np.random.default_rng(seed)
    for part in ("shards/pretrain", "heldout/pretrain", "shards/sft", "heldout/sft"):
        masked = part.endswith("sft")
        columns = {"tokens": "ndarray:uint32"} | ({"loss_mask": "ndarray:uint8"} if masked else {})
        for domain in domains:
            with MDSWriter(
                out=str(folder / part / domain), columns=columns, compression="zstd", hashes=["xxh64"]
            ) as writer:
                for _ in range(documents):
                    length = int(generator.integers(5, 60))
                    start, stride = generator.integers(0, vocab_size), generator.integers(1, 4)
                    tokens = ((start + stride * np.arange(length)) % vocab_size).astype(np.uint32)
                    sample = {"tokens": tokens}
                    if masked:
                        sample["loss_mask"] = (np.arange(length) >= length // 2).astype(np.uint8)
                    writer.write(sample)
    words = {f"w{i}": i for i in range(vocab_size - 1)} | {"<pad>": vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    return folder
