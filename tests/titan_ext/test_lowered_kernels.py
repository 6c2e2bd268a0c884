"""The Triton code that inductor writes for an H100, without a GPU: what it is made of, and the numbers it gives.

It relies on inductor's and Triton's internals. When it fails after an upgrade, mend benchmarks/gpu/lowering.py,
mocked_h100.py and interpreted.py; training does not use them.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import lowering
from benchmarks.gpu.lowering import CASES, Lowered, lower_case, report
from benchmarks.gpu.one_rank import describe_training
from tests.test_import_rules import ROOT
from tests.titan_ext.as_on_a_gpu import pretend_gpu
from titan_ext.config import FLAVORS
from titan_ext.roofline import ROUNDED_WEIGHT


def lower_toy(path: Path) -> None:
    """Lower a narrow block with QAT, and write what was found and its report."""
    pretend_gpu()
    dims = dataclasses.replace(
        FLAVORS["S"], d_model=192, head_dim=16, expert_hidden=96, shared_hidden=384, vocab_size=64
    )
    training = describe_training(
        dims, seq_len=256, local_batch_size=2, micro_batches=1, capacity_factor=1.5, quantize=True,
        activation_checkpoint="selective",
    )  # fmt: skip
    lowering.CASES = {"toy": lambda: training}
    training, graphs, lowered = lower_case("toy")
    found = {
        "graphs": graphs,
        "lowered": [dataclasses.asdict(graph) | {"calls": graph.count_calls()} for graph in lowered],
        "report": report("toy", training, graphs, lowered),
    }
    path.write_text(json.dumps(found))
    os._exit(0)


def test_a_block_lowers_to_triton_in_one_graph(tmp_path):
    path = tmp_path / "lowered.json"
    process = multiprocessing.get_context("forkserver").Process(target=lower_toy, args=(path,))
    process.start()
    process.join(500)
    process.kill()
    found = json.loads(path.read_text())
    assert found["graphs"] == 1
    forward, backward, rounding = found["lowered"]
    assert [graph["name"] for graph in found["lowered"]] == ["forward", "backward", "rounding"]
    for graph in (forward, backward):
        assert "tl.program_id" in graph["code"] and "cc=90" in graph["code"]
        assert "tl.atomic" not in graph["code"], "all sums are made in one order"
        assert not [call for call in graph["calls"] if re.search("complex|scatter|index_put", call)]
        assert len(graph["moved"]) > 20 and sum(size for _, _, size in graph["moved"]) > 1e6
    products = [
        sum(n for call, n in graph["calls"].items() if lowering.PRODUCTS.search(call)) for graph in found["lowered"]
    ]
    assert products[0] == 4 + 3 + 1 + 3, "attention, shared expert, router, routed experts"
    assert products[1] >= 2 * products[0]
    assert any("flex_attention" in operators for _, operators, _ in forward["moved"])
    assert re.search(r"div_rn\(", forward["code"]), "QAT divides exactly"
    ((kind, _, moved),) = rounding["moved"]
    weights = 60 * 96 * 192
    assert kind == "Triton" and moved == ROUNDED_WEIGHT * weights, "one pass, as the roofline counts"
    assert all(f"| toy, {name} |" in found["report"] for name in ("forward", "backward", "rounding"))


def test_a_report_counts_what_the_code_has():
    code = """
def triton_poi_fused_0(in_ptr0):
    tl.atomic_add(in_ptr0)
    extern_kernels.mm(a, b)
    buf1 = torch.ops.aten._grouped_mm.default(a, b)
    buf2 = torch.ops.aten.view_as_complex.default(buf1)
    # call_function[target=torch.ops.aten.mul.Tensor](args = (%a, %b))
"""
    graph = Lowered("forward", code, [("Triton", "mul.Tensor", 2_550_000_000)])
    assert graph.count_calls() == {"mm": 1, "_grouped_mm.default": 1, "view_as_complex.default": 1}
    text = report("S 2,048 capacity", CASES["S 2,048 capacity"](), 1, [graph])
    assert "| S 2,048 capacity, forward | 1 | 2 | 1 | view_as_complex.default 1 | 1 | 2.55 | 1.00 |" in text
    assert "| mul.Tensor (Triton, forward) | 2.55 | 1.00 |" in text


def run_interpreted(*cases: str) -> dict:
    """Return what benchmarks/gpu/interpreted.py finds; Triton decides at its import whether to interpret."""
    command = [sys.executable, "-m", "benchmarks.gpu.interpreted", "--case", *cases]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
def test_the_kernels_compute_what_eager_computes():
    found = run_interpreted("MoE, capacity 1", "MoE, dropless", "QAT")
    for name in ("MoE, capacity 1", "MoE, dropless"):
        errors = found[name]["errors"]
        assert {"output", "input", "router.gate.weight"} <= errors.keys() and found[name]["kernels"] > 10
        assert max(errors.values()) < 2e-2, (name, errors)  # fused kernels leave out roundings to bfloat16
    errors = found["QAT"]["errors"]
    assert len(errors) == 8 and set(errors.values()) == {0.0}, errors
