"""Self-distillation: its loss against plain PyTorch, alike under every layout, the same teacher after a resume."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.titan_ext.stage_data import find_differences, write_data
from tests.titan_ext.test_training import DIMS, STAGE, lines
from titan_ext.config import ParallelConfig
from titan_ext.mobilemoe import model_config
from titan_ext.quantization.qat import convert_to_qat
from titan_ext.training.distillation import DistilledCrossEntropy
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import StageSpec, find_final_checkpoint
from titan_ext.training.train import build_stage_config, build_trainer

WEIGHT, STEPS = 0.75, 4
QAT = dataclasses.replace(
    STAGE, steps=STEPS, shards="sft", local_batch_size=1, learning_rate=1e-3, checkpoint_interval=2,
    heldout_interval=STEPS, quantize=True, distillation_weight=WEIGHT,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size)


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory) -> Path:
    """A model that has learnt something, so that quantization has something to spoil."""
    stage = dataclasses.replace(STAGE, checkpoint_interval=20, heldout_interval=20)
    out = tmp_path_factory.mktemp("parent") / "stage"
    spec = StageSpec("pretrain", DIMS, stage, ParallelConfig(1, precision="float32"), data, out, None, seed=0)
    run_ranks(spec, out.parent / "scratch")
    return find_final_checkpoint(out, STAGE.steps)


def qat_spec(data: Path, parent: Path | None, out: Path, layout: dict, **changes) -> StageSpec:
    parallel = ParallelConfig(precision="float32", **layout)
    stage = dataclasses.replace(QAT, **changes)
    return StageSpec("qat", DIMS, stage, parallel, data, out, initial_checkpoint=parent, seed=0)


@pytest.fixture(scope="module")
def one_process(data, parent, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "stage"
    run_ranks(qat_spec(data, parent, out, {"world_size": 1}), out.parent / "scratch")
    return out


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), weight=st.floats(0, 1), masked=st.sets(st.integers(0, 11)))
def test_value_and_gradient_against_loops(seed, weight, masked):
    generator = torch.Generator().manual_seed(seed)
    hidden_BLD, student_BLV = (torch.randn(2, 6, n, generator=generator) for n in (4, 9))
    labels_BL = torch.randint(0, 9, (2, 6), generator=generator)
    for i in masked:
        labels_BL[i // 6, i % 6] = -100
    student_BLV.requires_grad_()
    loss_fn = DistilledCrossEntropy.Config(weight=weight).build(compile_config=None)
    head = torch.nn.Linear(4, 9)
    loss_fn.set_teacher_head(head)
    loss, metrics = loss_fn(student_BLV, labels_BL, torch.tensor(7), teacher_hidden=hidden_BLD)
    (gradient,) = torch.autograd.grad(loss, student_BLV)

    cross_entropy = divergence = 0 * student_BLV.sum()
    for b in range(2):
        for i in range(6):
            if labels_BL[b, i] != -100:
                p = student_BLV[b, i].softmax(0)
                q = head(hidden_BLD[b, i]).softmax(0).detach()
                cross_entropy = cross_entropy - p[labels_BL[b, i]].log() / 7
                divergence = divergence + (q * (q / p).log()).sum() / 7
    (expected,) = torch.autograd.grad((1 - weight) * cross_entropy + weight * divergence, student_BLV)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, cross_entropy, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["kl_mean"], divergence, rtol=1e-4, atol=1e-6)
    without_teacher, metrics = loss_fn(student_BLV, labels_BL, torch.tensor(7))
    torch.testing.assert_close(without_teacher, cross_entropy, rtol=1e-4, atol=1e-6)
    assert metrics == {}


def compare_with_whole_logits(spec: StageSpec) -> None:
    """Chunks, masks and the two models of a trainer against both models called whole, from the same checkpoint."""
    trainer = build_trainer(spec)
    trainer.checkpointer.load(step=-1)
    trainer.distillation.teacher.load(str(spec.initial_checkpoint))
    inputs, labels = next(iter(trainer.dataloader))
    assert 0 < (labels == -100).sum() < labels.numel()
    n_tokens = (labels != -100).sum()
    super(type(trainer), trainer).forward_backward_step(
        input_dict=dict(inputs), labels=labels, global_valid_tokens=n_tokens
    )
    models = []
    for config in (model_config(DIMS), convert_to_qat(model_config(DIMS), spec.quantization)):
        model = config.build()
        model.init_states()
        dcp.load(state := model.state_dict(), checkpoint_id=spec.initial_checkpoint, no_dist=True)
        model.load_state_dict(state)
        models.append(model.train())
    teacher_NV, student_NV = (
        model(inputs["input"], positions=inputs["positions"])[labels != -100].log_softmax(-1) for model in models
    )
    divergence = (teacher_NV.exp() * (teacher_NV - student_NV)).sum() / n_tokens
    assert divergence > 1e-4, f"{divergence}: quantization must have moved something"
    torch.testing.assert_close(trainer.distillation.divergences[0], divergence.detach(), rtol=1e-4, atol=1e-6)
    cross_entropy = -student_NV.gather(1, labels[labels != -100][:, None]).sum() / n_tokens
    ((1 - WEIGHT) * cross_entropy + WEIGHT * divergence.clone()).backward(inputs=list(models[1].parameters()))
    found = dict(trainer.model_parts[0].named_parameters())
    for name, parameter in models[1].named_parameters():
        if "gate" not in name:  # the trainer's gate also has the z-loss's gradient
            gradient = found[name].grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            assert (gradient - parameter.grad).norm() <= 1e-3 * parameter.grad.norm(), name
    trainer.close()
    dist.destroy_process_group()


def test_a_step_against_both_models_called_whole(data, parent, tmp_path):
    spec = qat_spec(data, parent, tmp_path / "stage", {"world_size": 1}, router_z_loss=0.0, local_batch_size=2)
    run_ranks(spec, tmp_path / "scratch", compare_with_whole_logits)


@pytest.mark.parametrize(
    "layout",
    [{"expert_parallel": 2}, {}, {"context_parallel": 2}],
    ids=["ep 2", "fsdp 2", "cp 2"],
)
def test_layouts_give_the_numbers_of_one_process(layout, data, parent, one_process, tmp_path):
    """Another order of summing moves an activation across the edge of two INT8 numbers here and there: 1e-2."""
    spec = qat_spec(data, parent, tmp_path / "stage", {"world_size": 2} | layout)
    run_ranks(spec, tmp_path / "scratch")
    one, two = lines(one_process, "metrics.jsonl"), lines(spec.out, "metrics.jsonl")
    for key, tolerance in (("loss", 2e-3), ("kl", 1e-2), ("grad_norm", 1e-2)):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=tolerance), key
    heldout = [lines(out, "heldout.jsonl")[-1]["loss"] for out in (one_process, spec.out)]
    assert heldout[1] == pytest.approx(heldout[0], rel=2e-3)


def test_a_resumed_stage_has_the_same_teacher(data, parent, one_process, tmp_path):
    """The student has moved on by then: another teacher would give other divergences."""
    spec = qat_spec(data, parent, tmp_path / "stage", {"world_size": 1})
    shutil.copytree(one_process / "checkpoint" / "step-2", spec.out / "checkpoint" / "step-2")
    run_ranks(spec, tmp_path / "scratch")
    keys = ("step", "loss", "kl", "grad_norm")
    resumed, whole = lines(spec.out, "metrics.jsonl"), lines(one_process, "metrics.jsonl")
    assert [[line[k] for k in keys] for line in resumed] == [[line[k] for k in keys] for line in whole[2:]]
    assert find_differences(find_final_checkpoint(spec.out, STEPS), find_final_checkpoint(one_process, STEPS)) == []


def test_a_teacher_needs_a_checkpoint_to_start_from(data, tmp_path):
    with pytest.raises(RuntimeError, match="the teacher is the checkpoint that the stage starts from"):
        run_ranks(qat_spec(data, None, tmp_path / "stage", {"world_size": 1}), tmp_path / "scratch")


def test_tensor_parallelism_is_refused(data, parent, tmp_path):
    with pytest.raises(ValueError, match=r"parallel.tensor_parallel = 2: it splits tokens"):
        build_stage_config(qat_spec(data, parent, tmp_path / "stage", {"world_size": 2, "tensor_parallel": 2}))


def test_a_pipeline_is_refused(data, parent, tmp_path):
    with pytest.raises(ValueError, match=r"parallel.pipeline_parallel = 2 and .* a teacher is not split"):
        build_stage_config(qat_spec(data, parent, tmp_path / "stage", {"world_size": 2, "pipeline_parallel": 2}))
