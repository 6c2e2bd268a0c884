"""Peak memory of one rank's training step at S width, beside the closed formula of titan_ext/memory.py.

    python benchmarks/step_memory.py

Every layout is measured in a process of its own: rank 0 of a fake world of that size. Its collectives move nothing, but
all its tensors exist, and every expert that takes part in an exchange has the same load. The process takes whole steps,
optimizer included, with two layers, float32 master weights and bfloat16 compute. Three quantities are printed:

- `tensors`: the most bytes of tensors that were alive at once in the second step, from the record of every allocation.
  On a GPU, torch.cuda.max_memory_allocated gives this number.
- `resident`: the process's largest resident size in four steps without that record, less the floor. The floor is
  measured with a tiny model, whose own estimate is subtracted: the interpreter, the libraries and the kernels that a
  first step loads. The process runs as training on the CPU does, with tcmalloc, which keeps freed memory for the next
  step.
- `resident, released`: the same, where tcmalloc returns freed memory to the system at once.

It needs tcmalloc.
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

from core.samples import SHARD_HASH, TEXT_COLUMNS
from titan_ext.cpu.allocator import allocator_environment

LAYOUTS = {
    "1 rank": {"world_size": 1},
    "2 ranks, ep 2": {"world_size": 2, "expert_parallel": 2},
    "8 ranks, ep 4": {"world_size": 8, "expert_parallel": 4},
    "4 ranks, tp 2, ep 4": {"world_size": 4, "tensor_parallel": 2, "expert_parallel": 4},
}
BATCHES = {"4 x 1,024 tokens": (4, 1024, None), "16 x 1,024 tokens, capacity 1.5": (16, 1024, 1.5)}
FLOOR = "floor"
RELEASE_FREED_MEMORY = {"TCMALLOC_AGGRESSIVE_DECOMMIT": "true"}
QUANTITIES: dict[str, dict[str, str]] = {"tensors": {}, "resident": {}, "resident, released": RELEASE_FREED_MEMORY}
"""Quantity -> the environment variables it is measured with."""
STEPS = 4
VOCAB_SIZE, N_LAYERS = 16_384, 2
TOKENIZER = {"model": {"type": "WordLevel", "vocab": {"a": 0, "<pad>": 1}, "unk_token": "a"}}


def write_data(folder: Path) -> None:
    """Write random documents, each as long as a sequence, and a small tokenizer."""
    import numpy as np
    from streaming import MDSWriter

    rng = np.random.default_rng(0)
    for domain in ("web", "math", "code", "knowledge", "science"):
        out = str(folder / "shards" / "pretrain" / domain)
        with MDSWriter(out=out, columns=TEXT_COLUMNS, hashes=[SHARD_HASH]) as writer:
            for _ in range(32):
                writer.write({"tokens": rng.integers(0, VOCAB_SIZE, 1025).astype(np.uint32)})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER))


def measure_peak(
    layout: dict, batch: tuple[int, int, float | None], quantity: str, floor: bool = False
) -> dict[str, float]:
    """Return the estimate and rank 0's peak, in megabytes; must run in a fresh process.

    Args:
        layout: arguments of ParallelConfig.
        batch: sequences of a micro-batch, tokens of a sequence, capacity factor.
        quantity: one of QUANTITIES.
        floor: measure a tiny model and a tiny batch instead.
    """
    import torch

    from titan_ext.config import FLAVORS, ParallelConfig
    from titan_ext.memory import estimate_memory
    from titan_ext.quantization.config import QuantizationConfig
    from titan_ext.training.schedules import published_stages
    from titan_ext.training.trainer_config import build_trainer_config

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
        config = build_trainer_config(
            model=dims, stage=stage, parallel=parallel, shards=str(folder / "shards" / "pretrain"), heldout=None,
            tokenizer=str(folder / "tokenizer"), out=str(folder / "out"), seed=0,
            quantization=QuantizationConfig(),
        )  # fmt: skip
        peak = (measure_tensors if quantity == "tensors" else measure_resident)(config)
    return {"estimate": estimate_memory(dims, stage, parallel).peak / 1e6, quantity: peak / 1e6}


def balance_counts(dispatcher, counts_E, group, ep_size: int):
    """Return the tokens that rank 0's experts get at equal load; the fake exchange would leave them undefined."""
    return (counts_E.sum() // counts_E.numel()).expand(ep_size, counts_E.numel() // ep_size).contiguous()


def build_step(config) -> tuple[object, Callable[[], None]]:
    """Build the trainer in a fake world; return it and its step without the spike guard (its numbers mean nothing)."""
    import torch
    from torchtitan.config.configs import CommConfig
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
    from torchtitan.trainer import Trainer

    AllToAllTokenDispatcher._token_count_exchange = balance_counts
    config.comm = CommConfig(mode="fake_backend")
    config.checkpoint.enable = False
    trainer = config.build()
    batches = iter(trainer.dataloader)

    def step() -> None:
        inputs, labels = next(batches)
        Trainer.forward_backward_step(
            trainer, input_dict=inputs, labels=labels, global_valid_tokens=torch.tensor(labels.numel())
        )
        trainer.optimizers.step()
        trainer.optimizers.zero_grad()

    return trainer, step


def measure_tensors(config) -> int:
    """Return the most bytes of tensors that are alive at once in the second step."""
    from torch.distributed.tensor import DTensor
    from torch.profiler import ProfilerActivity, profile

    trainer, step = build_step(config)
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in trainer.model_parts[0].parameters()]
    weights = sum(shard.numel() * shard.element_size() for shard in shards)
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    trainer.close()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    alive = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    return 3 * weights + max(alive)  # AdamW's two moments were there before the record began, like the weights


def measure_resident(config) -> int:
    """Return the process's largest resident size in bytes."""
    trainer, step = build_step(config)
    for _ in range(STEPS):
        step()
    trainer.close()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_in_process(layout: str, batch: str, quantity: str, *floor: str) -> dict[str, float]:
    """Run `measure_peak` in a process of its own."""
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    environment |= allocator_environment() | QUANTITIES[quantity]
    command = [sys.executable, __file__, layout, batch, quantity, *floor]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{layout}, {batch}, {quantity}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every layout and batch and print a line for each; with arguments, measure one of them."""
    if len(sys.argv) > 1:
        layout, batch, quantity, *floor = sys.argv[1:]
        print(json.dumps(measure_peak(LAYOUTS[layout], BATCHES[batch], quantity, floor == [FLOOR])), flush=True)
        os._exit(0)  # an orderly end would abort: the loader's thread is in the middle of a batch
    if not allocator_environment():
        sys.exit(
            "tcmalloc is not installed, or LD_PRELOAD is set: apt-get install libtcmalloc-minimal4, unset LD_PRELOAD"
        )
    for layout in LAYOUTS:
        for batch in BATCHES:
            found = {}
            for quantity in QUANTITIES:
                found |= measure_in_process(layout, batch, quantity)
                if quantity != "tensors":
                    small = measure_in_process(layout, batch, quantity, FLOOR)
                    found[f"{quantity}, {FLOOR}"] = small[quantity] - small["estimate"]
                    found[quantity] -= found[f"{quantity}, {FLOOR}"]
            ratios = {f"{name} / estimate": round(found[name] / found["estimate"], 2) for name in QUANTITIES}
            print(f"{layout:22} {batch:32}", {key: round(value) for key, value in found.items()}, ratios, flush=True)


if __name__ == "__main__":
    main()
