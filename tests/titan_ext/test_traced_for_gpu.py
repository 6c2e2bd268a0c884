"""Every stage of the recipes s, m and l as one rank of a GPU traces it: numbers equal those of the plain model.

The trainings have spmd_types, flex attention, the recipe's recomputation and every block in one graph (aot_eager in
inductor's place). The models have the recipes' numbers of heads and experts, a quarter of their widths, and one layer.
"""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torchtitan.models.common.attention import FlexAttention

from benchmarks.gpu.correctness import draw_weights, go_both_ways, relative_error
from benchmarks.gpu.one_rank import Training, build_trainer_on, close
from pipelines.recipes import RECIPES
from pipelines.validation.memory_rules import settle
from tests.titan_ext.as_on_a_gpu import pretend_gpu
from titan_ext.config import ModelDims, ParallelConfig
from titan_ext.mobilemoe.attention import DocumentAttention
from titan_ext.mobilemoe.recomputation import KeepProducts
from titan_ext.training.trainer import StageTrainer

SEQ_LEN = 128
"""Number of tokens of a block of flex attention's masks, and of a sequence here."""
PLAIN = ParallelConfig(world_size=1, compile=False, activation_checkpoint="none")


def make_narrow(dims: ModelDims) -> ModelDims:
    widths = ("d_model", "head_dim", "expert_hidden", "shared_hidden")
    narrow = {name: getattr(dims, name) // 4 for name in widths}
    return dataclasses.replace(dims, n_layers=1, vocab_size=512, **narrow)


def list_trainings(name: str) -> dict[str, Training]:
    """Return stage -> its training on one GPU, with what the recipe's own layout compiles and recomputes."""
    recipe = RECIPES[name].build()
    parallel = dataclasses.replace(settle(recipe), world_size=1, data_parallel_replicate=1)
    return {
        stage_name: Training(
            make_narrow(recipe.model),
            dataclasses.replace(
                stage, seq_len=SEQ_LEN, local_batch_size=2, global_batch_size=2, mixture={"web": 1.0}, steps=10
            ),
            parallel,
        )
        for stage_name, stage in recipe.stages.items()
    }


def train_once(training: Training, folder: Path) -> tuple[float, dict[str, torch.Tensor], StageTrainer]:
    trainer = build_trainer_on(training, folder, (SEQ_LEN // 8, SEQ_LEN))
    draw_weights(trainer)
    inputs, labels = next(iter(trainer.dataloader))
    loss, gradients, _ = go_both_ways(trainer, inputs, labels)
    close(trainer)
    return loss, gradients, trainer


def join(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def compare_stages(name: str, folder: Path) -> None:
    """Write differences between the plain model and what a GPU traces, by stage."""
    torch.set_num_threads(1)
    trainings = list_trainings(name)
    plain = {
        stage: train_once(dataclasses.replace(training, parallel=PLAIN), folder / f"{stage}_plain")
        for stage, training in trainings.items()
    }
    pretend_gpu()
    record = {}
    for stage, training in trainings.items():
        counters.clear()
        loss, gradients, trainer = train_once(training, folder / stage)
        expected_loss, expected, plain_trainer = plain[stage]
        attention, other = (
            next(iter(t.model_parts[0].layers.values())).attention.inner_attention for t in (trainer, plain_trainer)
        )
        record[stage] = {
            "loss": (loss, expected_loss),
            "grad_norm": (join(gradients).norm().item(), join(expected).norm().item()),
            "gradient_error": relative_error(join(gradients), join(expected)),
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": dict(counters["graph_break"]),
            "attention": [type(module).__name__ for module in (attention, other)],
            "backend": trainer.config.parallelism.spmd_backend,
            "recomputation": type(trainer.config.activation_checkpoint).__qualname__,
        }
    (folder / "record.json").write_text(json.dumps(record))
    os._exit(0)  # an orderly end would wait for the loader's threads


@pytest.mark.parametrize(("name", "recomputation"), [("s", None), ("m", None), ("l", KeepProducts)])
def test_a_gpu_traces_what_the_plain_model_computes(name, recomputation, tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=compare_stages, args=(name, tmp_path))
    process.start()
    process.join(500)
    process.kill()
    record = json.loads((tmp_path / "record.json").read_text())
    assert record.keys() == {"pretrain", "midtrain", "sft", "qat"}
    for stage, found in record.items():
        assert found["attention"] == [FlexAttention.__name__, DocumentAttention.__name__]
        assert found["backend"] == "spmd_types"
        expected = type(None) if recomputation is None else recomputation.Config
        assert found["recomputation"] == expected.__qualname__
        # One of the block and one of the loss; QAT also has one of the head's input, and two of the weights' rounding,
        # for the first shape and for all others.
        assert found["graphs"] == (5 if stage == "qat" else 2) and found["breaks"] == {}, (stage, found)
        for key in ("loss", "grad_norm"):
            assert found[key][0] == pytest.approx(found[key][1], rel=3e-3), (stage, key, found)
        assert found["gradient_error"] < 0.1, (stage, found)
