"""The script for a GPU (benchmarks/gpu): every part at toy size on this device, and what a run keeps of its checks."""

import json
import math
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.gpu.checks
import benchmarks.gpu.run
from benchmarks.gpu import table
from benchmarks.gpu.checks import CHECKS, PARTS, Check, run_one
from benchmarks.gpu.correctness import CASES, draw_hard_weights
from benchmarks.gpu.one_rank import RECIPE_GPUS, describe_training
from benchmarks.gpu.pack import NAMES, OTHER_VERSIONS, copy_site
from benchmarks.gpu.reference import Options, Reference
from benchmarks.gpu.run import run_check, run_checks
from core.errors import RefusedInput
from pipelines.recipes import RECIPES
from pipelines.validation.memory_rules import settle
from tests.supply.locked import LOCK, read_pins
from tests.titan_ext import reference as token_by_token
from titan_ext.config import FLAVORS, ModelDims

DIMS = ModelDims(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, expert_hidden=8, shared_hidden=16, n_experts=6,
    top_k=2, vocab_size=32, max_seq_len=16,
)  # fmt: skip
MACHINE = {
    "device": "NVIDIA H200", "memory_bytes": 150e9, "cuda": "13.0", "python": "3.12.3", "packages": {"torch": "2.11.0"},
}  # fmt: skip


def run_toy(name: str, path: Path) -> None:
    run_one(name, path, toy=True)
    sys.stdout.flush()
    os._exit(0)  # as the check's own process ends


def run_forked(name: str, folder: Path) -> dict:
    """Return the record of a check that ran at toy size, in a process that has imported torchtitan already."""
    path = folder / "record.json"
    process = multiprocessing.get_context("forkserver").Process(target=run_toy, args=(name, path))
    process.start()
    process.join(500)
    process.kill()
    record = json.loads(path.read_text())
    assert record["status"] == "done", record.get("traceback", record)
    return record["found"]


def test_training_agrees_with_float64_and_repeats_its_bits(tmp_path):
    found = run_forked("training, on this device", tmp_path)
    assert found.keys() == CASES.keys()
    for name, case in found.items():
        limits = table.FLOAT32_BOUNDS if name.startswith("float32") else (2e-3, 0.5)
        assert case["loss_error"] < limits[0] and case["gradient_error"] < limits[1], (name, case)
        assert case["tokens_routed_otherwise"] <= (0 if name.startswith("float32") else 0.02) * case["choices"]
        assert case["loss"] == pytest.approx(math.log(512), abs=0.3), "random weights know nothing"
    assert all(case["repeatable"] for name, case in found.items() if name.startswith("bfloat16"))


def test_qat_rounds_as_the_exporter(tmp_path):
    found = run_forked("QAT bits", tmp_path)
    assert len(found) == 3 * 2 * 3 and {case["different"] for case in found.values()} == {0}
    weight = draw_hard_weights((13 * 4, 64), torch.float32, -1)
    assert (weight[3::11] == 0).all() and weight.abs().max() > 0.03


def test_ceilings_are_measured(tmp_path):
    found = run_forked("ceilings", tmp_path)
    speeds = {name: value for name, value in found.items() if name.endswith(("_flops", "_bytes"))}
    assert len(speeds) == 7 and all(value > 1e6 for value in speeds.values())
    assert "CPU" in found["flex"]


def test_a_training_is_timed_beside_its_estimate(tmp_path):
    found = run_forked("S 2,048 capacity", tmp_path)
    assert found["steps"] == len(found["step_seconds"]) == 3 and found["tokens_a_step"] == 2 * 2 * 128
    median = sorted(found["step_seconds"])[1]
    assert found["tokens_a_second"] == pytest.approx(512 / median) and found["first_step_seconds"] > median
    assert found["estimated_bytes"] > 1e6 and found["peak_bytes"] is None


def test_a_profile_names_the_kernels(tmp_path):
    found = run_forked("kernels of S 2,048", tmp_path)
    assert any("mm" in kernel["name"] for kernel in found["kernels"])
    listed = sum(kernel["milliseconds"] for kernel in found["kernels"]) + found["others_milliseconds"]
    assert listed == pytest.approx(1e3 * found["kernel_seconds"])


def test_a_run_goes_on_skips_and_refuses(tmp_path, monkeypatch):
    """Checks are processes; here they are replaced by a function, and the next test starts a real one."""
    started = []

    def pretend(name, check, out, seconds, toy):
        started.append((name, seconds))
        status = "failed" if name == "QAT bits" else "done"
        return {"status": status, "reason": "RuntimeError: no\nmore", "traceback": "...", "found": {}, "seconds": 1.0}

    monkeypatch.setattr(benchmarks.gpu.run, "run_check", pretend)
    names = ["ceilings", "QAT bits", "S 8,192 dropless"]
    out = tmp_path / "out"
    result = run_checks(out, names, seconds=50, toy=True)
    assert [name for name, _ in started] == ["ceilings", "QAT bits"], "the third needs more than 50 seconds"
    assert [result["checks"][name]["status"] for name in names] == ["done", "failed", "skipped"]
    assert "70 s" in result["checks"]["S 8,192 dropless"]["reason"]
    assert json.loads((out / "result.json").read_text()) == result
    assert "- QAT bits: failed. RuntimeError: no\n" in (out / "table.md").read_text()
    run_checks(out, names, seconds=500, toy=True)
    assert [name for name, _ in started[2:]] == ["QAT bits", "S 8,192 dropless"], "what is done stays"
    assert started[-1][1] == pytest.approx(3 * 70, abs=1), "a check that hangs leaves time for others"
    with pytest.raises(RefusedInput, match="another machine"):
        run_checks(out, names, seconds=50, toy=False)


def test_a_check_that_hangs_is_killed(tmp_path):
    record = run_check("ceilings", CHECKS["ceilings"], tmp_path, seconds=0.2, toy=True)
    assert record["status"] == "failed" and record["reason"].startswith("killed after")
    assert not (tmp_path / "running.json").exists()


def test_a_failure_keeps_what_was_found(tmp_path, monkeypatch):
    def fail(save, folder, toy):
        save({"first": 1})
        raise ValueError("a kernel is missing")

    monkeypatch.setitem(benchmarks.gpu.checks.CHECKS, "ceilings", Check("ceilings", 1, fail))
    run_one("ceilings", tmp_path / "record.json", toy=True)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["status"] == "failed" and record["found"] == {"first": 1}
    assert record["reason"] == "ValueError: a kernel is missing" and "in fail" in record["traceback"]


def test_tables_of_a_run():
    case = {
        "loss_error": 1e-4, "gradient_error": 0.03, "tokens_routed_otherwise": 2.0, "choices": 100, "repeatable": True,
    }  # fmt: skip
    rows = {
        "ceilings": {"matmul_flops": 800e12, "copy_bytes": 4.3e12, "flex": "not measured"},
        "S 2,048 capacity": {
            "tokens_a_second": 1e5, "flops_a_token": 2e9, "peak_bytes": 50e9, "estimated_bytes": 40e9,
            "first_step_seconds": 60.0, "steps": 5,
        },
        "training, on this device": {
            "bfloat16, QAT": case, "bfloat16, dropless": case | {"gradient_error": 0.05}, "float32, dropless": case,
        },
        "training, on the CPU": dict.fromkeys(("bfloat16, QAT", "bfloat16, dropless"), case | {"gradient_error": 0.02}),
        "kernels of S 2,048": {
            "kernels": [{"name": "gemm|`x`", "calls": 3, "milliseconds": 30.0}], "kernel_seconds": 0.04,
            "step_seconds": 0.05,
        },
    }  # fmt: skip
    checks = {name: {"part": CHECKS[name].part, "status": "done", "found": found} for name, found in rows.items()}
    text = table.format_tables({"machine": MACHINE, "toy": False, "checks": checks})
    assert "| S 2,048 capacity | 100,000 | 25.0% | 20.2% | 50.0 | 40.0 | 1.25 | 60 | 5 |" in text
    assert "| bfloat16, QAT | 1.0e-04 | 3.0e-02 | 1.0e-03 and 4.0e-02 | 2 of 100 | yes | yes |" in text
    assert re.search(r"bfloat16, dropless .* no \|", text) and re.search(r"float32, dropless .* no \|", text)
    assert "| `gemm/'x'` | 30.00 | 75.0% | 3 |" in text and "kernels are 80.0% of 50 ms" in text
    assert "| copy | 4.3 TB/s |" in text and "failed" not in text


@pytest.mark.parametrize("name", ["s", "m", "l"])
def test_trainings_recompute_what_their_recipes_do(name):
    recipe, dims = RECIPES[name].build(), FLAVORS[name.upper()]
    expected = settle(recipe).activation_checkpoint
    assert RECIPE_GPUS[name.upper()] == recipe.parallel.world_size
    sizes = {"seq_len": 2048, "local_batch_size": 8, "micro_batches": 8}
    assert describe_training(dims, **sizes).parallel.activation_checkpoint == expected
    stated = describe_training(dims, activation_checkpoint="full", **sizes)
    assert stated.parallel.activation_checkpoint == "full"


def test_every_part_has_checks_and_a_first_run_fits():
    assert PARTS == ("ceilings", "throughput", "correctness", "profile")
    assert sum(check.needs for check in list(CHECKS.values())[:6]) <= 400


@pytest.mark.parametrize("capacity_factor", [None, 3.0])
def test_the_float64_reference_agrees_with_one_token_by_token(capacity_factor):
    """A capacity of three times the share drops no token here."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3).requires_grad_()

    d, f, shared, e = DIMS.d_model, DIMS.expert_hidden, DIMS.shared_hidden, DIMS.n_experts
    weights = {"tok_embeddings.weight": draw(DIMS.vocab_size, d), "norm.weight": draw(d)}
    released = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    kv = DIMS.n_kv_heads * DIMS.head_dim
    for i in range(DIMS.n_layers):
        own, other = f"layers.{i}.", f"model.layers.{i}."
        shapes = {
            "attention_norm.weight": ("input_layernorm.weight", (d,)),
            "ffn_norm.weight": ("post_attention_layernorm.weight", (d,)),
            "attention.qkv_linear.wq.weight": ("self_attn.q_proj.weight", (DIMS.n_heads * DIMS.head_dim, d)),
            "attention.qkv_linear.wk.weight": ("self_attn.k_proj.weight", (kv, d)),
            "attention.qkv_linear.wv.weight": ("self_attn.v_proj.weight", (kv, d)),
            "attention.wo.weight": ("self_attn.o_proj.weight", (d, DIMS.n_heads * DIMS.head_dim)),
            "moe.router.gate.weight": ("feed_forward.router.weight", (e, d)),
            "moe.shared_experts.w1.weight": ("feed_forward.shared_expert.gate_proj.weight", (shared, d)),
            "moe.shared_experts.w3.weight": ("feed_forward.shared_expert.up_proj.weight", (shared, d)),
            "moe.shared_experts.w2.weight": ("feed_forward.shared_expert.down_proj.weight", (d, shared)),
        }
        for name, (hf, shape) in shapes.items():
            weights[own + name] = released[other + hf] = draw(*shape)
        experts = [draw(e, f, d), draw(e, f, d), draw(e, d, f)]
        for name, weight in zip(("w1_EFD", "w3_EFD", "w2_EDF"), experts, strict=True):
            weights[f"{own}moe.routed_experts.inner_experts.{name}"] = weight
        released[other + "feed_forward.expert_bias"] = torch.zeros(e, dtype=torch.float64)
        released[other + "feed_forward.experts.gate_up_proj"] = torch.cat([experts[0], experts[1]], 1).transpose(1, 2)
        released[other + "feed_forward.experts.down_proj"] = experts[2].transpose(1, 2)
    tokens = torch.randint(0, DIMS.vocab_size, (2, 12), generator=generator)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).repeat(2, 1)
    labels = torch.randint(0, DIMS.vocab_size, (2, 12), generator=generator)
    labels[0, 3] = -100
    documents = [(row, part) for row in range(2) for part in (slice(0, 5), slice(5, 12))]
    logits = torch.cat([token_by_token.logits(tokens[row, part].tolist(), released, DIMS) for row, part in documents])
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    options = Options(capacity_factor, False, 8, 0.0, torch.float64)
    found = Reference(weights, DIMS, options).compute_loss(tokens, positions, labels)
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-12) and found[0] == found[1]
    own = torch.autograd.grad(found[1], list(weights.values()))
    for one, other, name in zip(own, torch.autograd.grad(expected, list(weights.values())), weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_what_is_packed_for_another_machine(tmp_path):
    locked = read_pins(LOCK.read_text())
    assert set(NAMES) <= locked.keys() and locked["torchtitan"] == "0.3.0"
    assert {name for name, _ in OTHER_VERSIONS} <= set(NAMES)
    copy_site(tmp_path / "site")
    copy_site(tmp_path / "site")
    files = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.py")}
    assert {"sitecustomize.py", "torch211_shim.py", "torch211_fsdp/__init__.py"} <= files
