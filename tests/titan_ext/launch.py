"""Runs a training stage over real processes, as a launcher would: one subprocess a rank, gloo over loopback."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from streaming import MDSWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from titan_ext.train import StageRun

_RANK_MAIN = (
    "import pickle, sys; from titan_ext.train import run_stage; run_stage(pickle.loads(open(sys.argv[1], 'rb').read()))"
)


def start_ranks(run: StageRun, scratch: Path) -> list[subprocess.Popen]:
    """Start every rank of `run`; the caller waits for or kills them."""
    scratch.mkdir(parents=True, exist_ok=True)
    spec = scratch / "run.pickle"
    spec.write_bytes(pickle.dumps(run))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = run.parallel.world_size
    processes = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        log = (scratch / f"rank_{rank}.log").open("w")
        processes.append(
            subprocess.Popen([sys.executable, "-c", _RANK_MAIN, str(spec)], env=environment, stdout=log, stderr=log)
        )
    return processes


def train(run: StageRun, scratch: Path, timeout: float = 300) -> None:
    """Run the stage to its end; an assertion with the ranks' logs where one fails."""
    processes = start_ranks(run, scratch)
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((scratch / f"rank_{rank}.log").read_text()[-4000:] for rank in range(len(processes)))
    assert codes == [0] * len(codes), f"ranks ended with {codes}\n{logs}"


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
