"""Peak memory of one rank's training step at S width against the closed formula of titan_ext/memory.py.

    python benchmarks/step_memory.py

Every layout is measured in a process of its own: rank 0 of a fake world of that size, whose collectives move nothing
but whose tensors are all there, with the same load on every expert that takes part in an exchange. It takes steps,
optimizer included. Two layers, float32 master weights, bfloat16 compute. `tensors` is the most bytes of tensors that
were alive at once in the second step, from the record of every allocation: what torch.cuda.max_memory_allocated says on
a GPU. `resident` is the process's largest resident size in four steps without that record, over the floor: what a
process has that does the same with a model of next to no size, its own estimate taken off, so the interpreter, the
libraries and the kernels that a first step loads. Once as training on the CPU runs, with tcmalloc, which keeps freed
memory for the next step, and once with tcmalloc giving back at once what is freed. Needs tcmalloc.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from titan_ext.cpu.allocator import allocator_environment

LAYOUTS = {
    "1 rank": {"world_size": 1},
    "2 ranks, ep 2": {"world_size": 2, "expert_parallel": 2},
    "8 ranks, ep 4": {"world_size": 8, "expert_parallel": 4},
    "4 ranks, tp 2, ep 4": {"world_size": 4, "tensor_parallel": 2, "expert_parallel": 4},
}
BATCHES = {"4 x 1,024 tokens": (4, 1024, None), "16 x 1,024 tokens, capacity 1.5": (16, 1024, 1.5)}
FLOOR = "floor"
GIVEN_BACK = {"TCMALLOC_AGGRESSIVE_DECOMMIT": "true"}
WAYS: dict[str, dict[str, str]] = {"tensors": {}, "resident": {}, "resident, given back": GIVEN_BACK}
"""What is measured -> the environment it is measured in."""
STEPS = 4
VOCAB_SIZE, N_LAYERS = 16_384, 2
TOKENIZER = {"model": {"type": "WordLevel", "vocab": {"a": 0, "<pad>": 1}, "unk_token": "a"}}


def write_data(folder: Path) -> None:
    """Random documents, as long as a sequence, and a tokenizer to open."""
    import numpy as np
    from streaming import MDSWriter

    rng = np.random.default_rng(0)
    for domain in ("web", "math", "code", "knowledge", "science"):
        columns = {"tokens": "ndarray:uint32"}
        with MDSWriter(out=str(folder / "shards" / "pretrain" / domain), columns=columns, hashes=["xxh64"]) as writer:
            for _ in range(32):
                writer.write({"tokens": rng.integers(0, VOCAB_SIZE, 1025).astype(np.uint32)})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER))


def measure(layout: dict, batch: tuple[int, int, float | None], how: str, floor: bool = False) -> dict[str, float]:
    """Rank 0's peak, in megabytes; called in a fresh process.

    Args:
        layout: arguments of ParallelConfig.
        batch: sequences of a micro-batch, their tokens, capacity factor.
        how: one of WAYS.
        floor: of the model and the batch of next to no size.
    """
    import torch

    from titan_ext.config import FLAVORS, ParallelConfig
    from titan_ext.memory import estimate_memory
    from titan_ext.quantization.config import QuantizationConfig
    from titan_ext.training.schedules import published_stages
    from titan_ext.training.trainer_config import trainer_config

    torch.set_num_threads(2)
    parallel = ParallelConfig(**layout)
    local_batch_size, seq_len, capacity_factor = (1, 256, batch[2]) if floor else batch
    stage = dataclasses.replace(
        published_stages()["pretrain"], steps=10, warmup_steps=0, seq_len=seq_len, local_batch_size=local_batch_size,
        global_batch_size=local_batch_size * parallel.data_parallel, capacity_factor=capacity_factor,
    )  # fmt: skip
    dims = dataclasses.replace(FLAVORS["tiny" if floor else "S"], n_layers=N_LAYERS, vocab_size=VOCAB_SIZE)
    os.environ |= {"NGPU": str(parallel.world_size), "WORLD_SIZE": str(parallel.world_size)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        config = trainer_config(
            model=dims, stage=stage, parallel=parallel, shards=str(folder / "shards" / "pretrain"), heldout=None,
            tokenizer=str(folder / "tokenizer"), out=str(folder / "out"), seed=0,
            quantization=QuantizationConfig(),
        )  # fmt: skip
        peak = (tensors_of if how == "tensors" else resident_of)(config)
    return {"estimate": estimate_memory(dims, stage, parallel).peak / 1e6, how: peak / 1e6}


def balanced_counts(dispatcher, counts_E, group, ep_size: int):
    """What rank 0's experts are sent when all have the same load; the fake exchange would leave it undefined."""
    return (counts_E.sum() // counts_E.numel()).expand(ep_size, counts_E.numel() // ep_size).contiguous()


def prepare(config) -> tuple[object, Callable[[], None]]:
    """The trainer in a fake world, and its step without the guard (numbers mean nothing there)."""
    import torch
    from torchtitan.config.configs import CommConfig
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
    from torchtitan.trainer import Trainer

    AllToAllTokenDispatcher._token_count_exchange = balanced_counts
    config.comm = CommConfig(mode="fake_backend")
    config.checkpoint.enable = False
    trainer = config.build()
    batches = iter(trainer.dataloader)

    def step() -> None:
        inputs, labels = next(batches)
        Trainer.forward_backward_step(
            trainer, input_dict=inputs, labels=labels, global_valid_tokens=torch.tensor(labels.numel())
        )
        trainer.optimizers._optimizers.step()
        trainer.optimizers.zero_grad()

    return trainer, step


def tensors_of(config) -> int:
    """Most bytes of tensors alive at once in the second step."""
    from torch.distributed.tensor import DTensor
    from torch.profiler import ProfilerActivity, profile

    trainer, step = prepare(config)
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in trainer.model_parts[0].parameters()]
    weights = sum(shard.numel() * shard.element_size() for shard in shards)
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    trainer.close()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    alive = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    return 3 * weights + max(alive)  # AdamW's two moments were there before the record began, like the weights


def resident_of(config) -> int:
    """The process's largest resident size."""
    trainer, step = prepare(config)
    for _ in range(STEPS):
        step()
    trainer.close()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(layout: str, batch: str, how: str, *floor: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    environment |= allocator_environment() | WAYS[how]
    command = [sys.executable, __file__, layout, batch, how, *floor]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{layout}, {batch}, {how}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) > 1:
        layout, batch, how, *floor = sys.argv[1:]
        print(json.dumps(measure(LAYOUTS[layout], BATCHES[batch], how, floor == [FLOOR])), flush=True)
        os._exit(0)  # the loader's thread is in the middle of a batch, which an orderly end does not survive
    if not allocator_environment():
        sys.exit(
            "tcmalloc is not installed, or LD_PRELOAD is set: apt-get install libtcmalloc-minimal4, unset LD_PRELOAD"
        )
    for layout in LAYOUTS:
        for batch in BATCHES:
            found = {}
            for how in WAYS:
                found |= in_a_process(layout, batch, how)
                if how != "tensors":
                    small = in_a_process(layout, batch, how, FLOOR)
                    found[f"{how}, {FLOOR}"] = small[how] - small["estimate"]
                    found[how] -= found[f"{how}, {FLOOR}"]
            ratios = {f"{how} / estimate": round(found[how] / found["estimate"], 2) for how in WAYS}
            print(f"{layout:22} {batch:32}", {key: round(value) for key, value in found.items()}, ratios, flush=True)


if __name__ == "__main__":
    main()
