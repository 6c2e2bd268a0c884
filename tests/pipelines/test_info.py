"""`mobilemoe info`: the bytes are those of a real export, and bad dimensions are refused."""

import dataclasses
import json
import subprocess
import sys

import pytest
from safetensors import safe_open

from eval.export.hf_folder import write_hf_folder
from eval.export.sizes import bf16_bytes, int4_bytes
from pipelines.cli import main
from pipelines.commands.info import PUBLISHED, TOLERANCES
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from titan_ext.config import FLAVORS, ModelDims
from titan_ext.quantization.config import QuantizationConfig

NEEDED = [f.name for f in dataclasses.fields(ModelDims) if f.default is f.default_factory is dataclasses.MISSING]


def tensor_bytes(folder) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_bytes_are_those_of_an_export(axis, tmp_path):
    bf16 = write_hf_folder(random_tensors(), DIMS, write_tokenizer(tmp_path / "tokenizer"), tmp_path / "bf16")
    int4 = quantize_folder(bf16, tmp_path / "int4", QuantizationConfig(expert_group_axis=axis))
    assert bf16_bytes(DIMS) == tensor_bytes(bf16)
    assert int4_bytes(DIMS) == tensor_bytes(int4)


@pytest.mark.parametrize(("flavor", "total"), [("S", 713_863_008), ("M", 1_590_916_144), ("L", 3_004_279_040)])
def test_int4_bytes_are_those_of_the_released_layout(flavor, total):
    """Tensor by tensor as released: nibbles, float16 scales, float32 router, bfloat16 for the rest."""
    m = FLAVORS[flavor]
    d, f, e, heads = m.d_model, m.expert_hidden, m.n_experts, m.n_heads * m.head_dim
    quantized = [d * heads, d * m.n_kv_heads * m.head_dim, d * m.n_kv_heads * m.head_dim, heads * d]
    quantized += [e * d * 2 * f, e * f * d, m.shared_hidden * d, m.shared_hidden * d, d * m.shared_hidden]
    layer = sum(n // 2 + n // 32 * 2 for n in quantized) + e * d * 4 + e * 2 + 2 * d * 2
    embedding = m.vocab_size * d
    assert m.n_layers * layer + embedding // 2 + embedding // 32 * 2 + d * 2 == total
    assert int4_bytes(m) == total


@pytest.mark.parametrize("flavor", ["S", "M", "L"])
def test_published_table_is_met(flavor, capsys):
    assert main(["info", flavor, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    published = described["published"]
    assert described["parameters"]["total"] == pytest.approx(published["total"], rel=0.03)
    assert described["parameters"]["active"] == pytest.approx(published["active"], rel=0.01)
    assert described["bytes"]["int4"] == pytest.approx(published["int4_bytes"], rel=0.10)
    checks = described["against_published"]
    assert {key: check["tolerance"] for key, check in checks.items()} == TOLERANCES
    assert all(check["within"] for check in checks.values()) and "without scales" in described["note"]
    assert checks["total"]["ratio"] == pytest.approx(described["parameters"]["total"] / published["total"], abs=1e-4)


def test_a_figure_that_does_not_fit_is_said_to(monkeypatch, capsys):
    monkeypatch.setitem(PUBLISHED, "S", PUBLISHED["S"] | {"active": 300e6})
    assert main(["info", "S"]) == 0
    printed = capsys.readouterr().out
    assert "0.908, beyond 1%" in printed and "within 3%" in printed and "5 to 9% above" in printed


def test_any_dimensions_and_a_table_for_people(capsys):
    assert main(["info", "tiny", "--n-layers", "8", "--max-seq-len", "4096", "--context", "4096"]) == 0
    printed = capsys.readouterr().out
    assert "tiny, changed" in printed and "4,096" in printed and "published" not in printed


def test_lower_case_and_no_flavor_at_all(capsys):
    assert main(["info", "s", "--json"]) == 0
    small = json.loads(capsys.readouterr().out)
    options = [f"--{key.replace('_', '-')}={small['dimensions'][key]}" for key in NEEDED]
    assert main(["info", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == small
    with pytest.raises(SystemExit, match="2"):
        main(["info", *options[1:]])
    assert "--d-model" in capsys.readouterr().err


def test_nothing_heavy_is_imported():
    script = "import sys; from pipelines.cli import main; main(['info', 'S']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "torchao", "ray"}.isdisjoint(done.stdout.split()) and not done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "XL"], "choose one of tiny, S, M, L"),
        (["info", "S", "--top-k", "61"], "cannot choose more experts"),
        (["info", "S", "--d-model", "777"], "must divide --d-model = 777"),
        (["info", "S", "--top-k", "61"], "--top-k = 61"),
        (["info", "S", "--norm-eps", "nan"], "--norm-eps = nan: must be above 0 and finite"),
        (["info", "S", "--rope-scaling.factor", "-2"], "--rope-scaling.factor = -2.0"),
        (["info", "S", "--context", "0"], "--context 0: give 1 to 8192"),
        (["info", "S", "--seq-len", "8193"], "--seq-len 8193: give 2 to 8192, or raise --max-seq-len"),
    ],
)
def test_refusals(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
