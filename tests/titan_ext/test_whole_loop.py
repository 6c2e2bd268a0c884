"""Whole stages against a training loop that shares no code with them, step by step in float64 (reference_loop.py).

Held-out passes are made on the way, of which the reference knows nothing: they leave nothing behind (torchtitan #4148).
The stage of conversations runs on two ranks, whose micro-batches have unequal numbers of targets (torchtitan #2148).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.titan_ext.in_float64 import train_in_float64
from tests.titan_ext.reference_batches import read_batches
from tests.titan_ext.reference_loop import Step, Variant, draw_weights, train
from tests.titan_ext.stage_data import load_tensors, write_data
from tests.titan_ext.test_training import DIMS, lines
from titan_ext.config import ParallelConfig, StageConfig
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import StageSpec, find_final_checkpoint

TOLERANCE = 1e-9
"""Largest relative difference of loss, gradient norm and rate, and of a weight to its tensor's largest."""
SEED, PAD = 5, DIMS.vocab_size - 1
"""With this seed no two tokens at the edge of a capacity have equal weights: which is dropped would not be defined."""
STAGE = StageConfig(
    steps=24, seq_len=64, global_batch_size=4, local_batch_size=1, learning_rate=3e-3, shards="pretrain",
    mixture={"web": 0.6, "code": 0.4}, warmup_steps=3, max_grad_norm=4.0, router_z_loss=1e-2,
    expert_bias_update_rate=1e-2, checkpoint_interval=0, heldout_interval=5, heldout_batches=1, log_interval=1,
)  # fmt: skip
STAGES = {
    "pretrain": STAGE,
    "capacity": dataclasses.replace(STAGE, capacity_factor=1.0, decay_fraction=0.5),
    "sft": dataclasses.replace(STAGE, shards="sft", schedule="linear"),
    "qat": dataclasses.replace(STAGE, quantize=True),
}
RANKS = {"sft": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size)


@pytest.fixture(scope="module")
def initial_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("initial") / "step-0"
    weights = draw_weights(DIMS, SEED)
    dcp.save(weights | {"lm_head.weight": weights["tok_embeddings.weight"]}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture(scope="module")
def run_stage(data, initial_checkpoint, tmp_path_factory):
    """A function: name of a stage -> the folder of its run, which tests share."""

    @functools.cache
    def run(name: str) -> Path:
        ranks = RANKS.get(name, 1)
        parallel = ParallelConfig(world_size=ranks, expert_parallel=ranks, precision="float32")
        out = tmp_path_factory.mktemp(name) / "stage"
        spec = StageSpec(name, DIMS, STAGES[name], parallel, data, out, initial_checkpoint, SEED)
        run_ranks(spec, out.parent / "scratch", train_in_float64)
        return out

    return run


@pytest.fixture(scope="module")
def take_batches(data, tmp_path_factory):
    """A function: name of the shards -> the global batches of a stage."""

    @functools.cache
    def take(shards: str) -> list[torch.Tensor]:
        stage = dataclasses.replace(STAGE, shards=shards)
        return list(
            islice(read_batches(stage, data, tmp_path_factory.mktemp("copies"), seed=SEED, pad=PAD), stage.steps)
        )

    return take


def read_steps(out: Path, stage: StageConfig) -> list[Step]:
    """Return what a run logged of its steps."""
    choices = stage.global_batch_size * stage.seq_len * DIMS.top_k
    steps = []
    for logged, loads in zip(lines(out, "metrics.jsonl"), lines(out, "expert_load.jsonl"), strict=True):
        biases = [[logged[f"{layer}_{expert}"] for expert in range(DIMS.n_experts)] for layer in range(DIMS.n_layers)]
        counts = [[round(share * choices) for share in layer["load"]] for layer in loads["layers"]]
        steps.append(Step(logged["loss"], logged["grad_norm"], logged["lr"], logged["router_z"], counts, biases))
    return steps


def find_disagreement(steps: Iterable[Step], others: Iterable[Step]) -> str | None:
    """Return the first step and value in which two loops differ; None where they agree to the end."""
    for number, (step, other) in enumerate(zip(steps, others, strict=True), 1):
        for name in ("loss", "grad_norm", "lr"):
            if not math.isclose(getattr(step, name), getattr(other, name), rel_tol=TOLERANCE):
                return f"step {number}, {name}: {getattr(step, name)!r}, {getattr(other, name)!r}"
        if not math.isclose(step.router_z, other.router_z, rel_tol=1e-6):  # counted in float32
            return f"step {number}, router_z: {step.router_z!r}, {other.router_z!r}"
        if step.loads != other.loads:
            return f"step {number}, loads: {step.loads}, {other.loads}"
        if not torch.allclose(torch.tensor(step.biases), torch.tensor(other.biases), rtol=0, atol=1e-6):
            return f"step {number}, biases: {step.biases}, {other.biases}"
    return None


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_the_reference_loop_at_every_step(name, run_stage, take_batches):
    stage, weights = STAGES[name], draw_weights(DIMS, SEED)
    out = run_stage(name)
    assert find_disagreement(read_steps(out, stage), train(weights, DIMS, stage, take_batches(stage.shards))) is None
    trained = load_tensors(find_final_checkpoint(out, stage.steps))
    errors = {
        tensor: float((trained[tensor] - expected.detach()).abs().max() / expected.detach().abs().max())
        for tensor, expected in weights.items()
        if "expert_bias" not in tensor
    }
    assert max(errors.values()) < TOLERANCE, errors
    assert [line["step"] for line in lines(out, "heldout.jsonl")] == [5, 10, 15, 20, 24]


def test_the_stages_have_what_they_are_compared_in(run_stage, take_batches):
    """Tokens are dropped, some steps are clipped, loads are uneven, and micro-batches have unequal targets."""
    dropped = [line["dropped"] for line in lines(run_stage("capacity"), "metrics.jsonl")]
    assert all(share > 0.01 for share in dropped)
    steps = read_steps(run_stage("pretrain"), STAGE)
    is_clipped = [step.grad_norm > STAGE.max_grad_norm for step in steps]
    assert any(is_clipped) and not all(is_clipped)
    assert all(max(load) > 1.2 * min(load) for load in steps[0].loads)
    targets = [(part[..., 2] != -100).sum().item() for part in take_batches("sft")[0].split(STAGE.local_batch_size)]
    assert max(targets) > 1.1 * min(targets)


CHANGED_STAGES = {
    "beta2": ("pretrain", {"beta2": 0.951}),
    "weight decay": ("pretrain", {"weight_decay": 0.101}),
    "warm-up off by one": ("pretrain", {"warmup_steps": 4}),
    "minimum of the rate": ("pretrain", {"min_lr_factor": 0.101}),
    "linear for cosine": ("pretrain", {"schedule": "linear"}),
    "clipping": ("pretrain", {"max_grad_norm": 3.99}),
    "z-loss": ("pretrain", {"router_z_loss": 1.001e-2}),
    "rate of the bias": ("pretrain", {"expert_bias_update_rate": 1.01e-2}),
    "end of the plateau": ("capacity", {"decay_fraction": 0.55}),
    "capacity off by one": ("capacity", {"capacity_factor": 1.02}),
    "nothing dropped": ("capacity", {"capacity_factor": None}),
    "not quantized": ("qat", {"quantize": False}),
}
VARIANTS = {
    "sign of the bias": ("pretrain", Variant(bias_sign=-1.0)),
    "bias not centred": ("pretrain", Variant(centred_bias=False)),
    "norms not decayed": ("pretrain", Variant(decayed_norms=False)),
    "mean of means": ("sft", Variant(mean_of_means=True)),
}


CHANGED_LOOPS = {
    fault: (name, dataclasses.replace(STAGES[name], **changes), Variant())
    for fault, (name, changes) in CHANGED_STAGES.items()
} | {fault: (name, STAGES[name], variant) for fault, (name, variant) in VARIANTS.items()}


@pytest.mark.parametrize(("name", "stage", "variant"), CHANGED_LOOPS.values(), ids=CHANGED_LOOPS.keys())
def test_a_loop_with_one_fault_is_told_from_the_stage(name, stage, variant, run_stage, take_batches):
    loop = train(draw_weights(DIMS, SEED), DIMS, stage, take_batches(stage.shards), variant)
    assert find_disagreement(read_steps(run_stage(name), STAGES[name]), loop) is not None
