"""From the released formats into training and back: no value changes, and nothing incomplete is taken."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.export.bf16 import export_bf16
from eval.export.dcp_checkpoint import CheckpointTensors
from eval.export.dimensions import config_from_dims, dims_from_config
from eval.export.hf_folder import write_hf_folder
from eval.export.import_hf import import_folder
from eval.export.source import open_run_checkpoint
from eval.export.tensor_files import read_config
from eval.hf_mobilemoe import MobileMoEForCausalLM
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_state_dict
from eval.hf_mobilemoe.modeling_mobilemoe import rotary_embedding
from pipelines.cli import main
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from tests.titan_ext.stage_data import write_data
from tests.titan_ext.test_training import STAGE, lines
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import StageSpec


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bf16(tokenizer_dir, tmp_path_factory):
    """A folder of several files with an index, as the larger releases are."""
    out = tmp_path_factory.mktemp("released") / "bf16"
    return write_hf_folder(random_tensors(), DIMS, tokenizer_dir, out, max_shard_bytes=60_000)


def stored_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_bf16_comes_in_and_goes_out_without_a_changed_bit(bf16, tokenizer_dir, tmp_path):
    assert len(list(bf16.glob("*.safetensors"))) > 2
    assert import_folder(bf16, tmp_path / "dcp") == DIMS
    source = open_run_checkpoint(tmp_path / "dcp", DIMS, tokenizer_dir, QuantizationConfig(), "float32")
    export_bf16(source, tmp_path / "again")
    before, after = stored_tensors(bf16), stored_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_int4_comes_in_as_the_numbers_it_stands_for(axis, bf16, tmp_path):
    folder = quantize_folder(bf16, tmp_path / "int4", QuantizationConfig(expert_group_axis=axis))
    import_folder(folder, tmp_path / "dcp")
    expected = dequantize_state_dict(stored_tensors(folder), read_config(folder))
    found = CheckpointTensors(tmp_path / "dcp", DIMS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)


def test_the_command_imports_and_refuses(bf16, tmp_path, capsys):
    assert main(["import", str(bf16), "--out", str(tmp_path / "dcp"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dimensions"]["n_experts"] == DIMS.n_experts
    assert (tmp_path / "dcp/.metadata").is_file()
    assert main(["import", str(bf16), "--out", str(tmp_path / "dcp")]) == 2
    assert "exists; name a folder that does not" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["import", str(tmp_path / "empty"), "--out", str(tmp_path / "other")]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_stage_starts_from_it(bf16, tmp_path):
    """On another layout, at a learning rate that changes nothing: the loss is the imported model's."""
    import_folder(bf16, tmp_path / "dcp")
    data = write_data(tmp_path / "data", DIMS.vocab_size)
    stage = dataclasses.replace(
        STAGE, steps=1, learning_rate=1e-12, weight_decay=0.0, seq_len=64, heldout_interval=1, warmup_steps=0
    )
    parallel = ParallelConfig(world_size=2, expert_parallel=2, precision="float32")
    heldout = []
    for name, checkpoint in (("imported", tmp_path / "dcp"), ("random", None)):
        run = StageSpec("sft", DIMS, stage, parallel, data, tmp_path / name, initial_checkpoint=checkpoint, seed=0)
        run_ranks(run, tmp_path / f"scratch_{name}")
        heldout.append(lines(run.out, "heldout.jsonl")[-1]["loss"])
    assert abs(heldout[0] - heldout[1]) > 0.5, "weights of 0.3 predict worse than those of the initialisation"


@pytest.mark.parametrize("flavor", FLAVORS)
def test_dimensions_survive_config_json(flavor, tmp_path):

    config_from_dims(FLAVORS[flavor]).save_pretrained(tmp_path)
    assert dims_from_config(read_config(tmp_path)) == FLAVORS[flavor]


def damage(folder, change):
    file = sorted(folder.glob("*.safetensors"))[0]
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif change == "absent":
        file.unlink()
    else:
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensor = tensors.pop(name)
        if change == "misshaped":
            tensors[name] = tensor[:-1].clone()
        if change == "superfluous":
            tensors |= {name: tensor, "model.layers.0.self_attn.q_norm.weight": tensor.clone()}
        save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("cut", r"model-00001-\S+ is damaged .*; its index expects model\.embed_tokens\.weight"),
        ("absent", "is missing; copy the whole folder again"),
        ("dropped", r"model-00001-\S+ lacks model\.\S+, which its index expects in it"),
        ("misshaped", r"model\.\S+ has shape \[.*\], expected"),
        ("superfluous", r"q_norm\.weight \[.*\] is not a tensor of this model"),
    ],
)
def test_incomplete_folders_are_refused_and_leave_nothing(change, words, bf16, tmp_path):
    folder = shutil.copytree(bf16, tmp_path / "copy")
    damage(folder, change)
    with pytest.raises(ValueError, match=words):
        import_folder(folder, tmp_path / "dcp")
    assert not list(tmp_path.glob("dcp*"))


def test_no_rope_scaling_is_scaling_by_one():
    plain = config_from_dims(DIMS, rope_scaling=None)
    scaled = config_from_dims(dims_from_config(plain))
    assert scaled.rope_scaling["factor"] == 1.0 and dims_from_config(config_from_dims(DIMS)) == DIMS
    positions = torch.arange(200)[None]
    assert torch.equal(rotary_embedding(scaled, positions), rotary_embedding(plain, positions))


def rewrite(change):
    """A damage to the file that holds the embedding: `change` makes other tensors of it."""

    def damage(folder):
        (file,) = (path for path in folder.glob("*.safetensors") if any("embed_tokens" in n for n in load_file(path)))
        tensors = load_file(file)
        save_file({n: t.contiguous() for n, t in (tensors | change(tensors)).items()}, file, metadata={"format": "pt"})

    return damage


def reindex(change):
    """A damage to the index's text."""

    def damage(folder):
        path = folder / "model.safetensors.index.json"
        path.write_text(change(path.read_text()))

    return damage


def in_the_last_file(text: str) -> str:
    """The embedding, which the first file holds, said to be in the last one."""
    index = json.loads(text)
    index["weight_map"]["model.embed_tokens.weight"] = max(index["weight_map"].values())
    return json.dumps(index)


EMBEDDING = "model.embed_tokens.weight"
DAMAGES = {
    "cut short": (lambda folder: damage(folder, "cut"), r"model-00001-\S+ is damaged"),
    "a file is absent": (lambda folder: damage(folder, "absent"), r"model-00001-\S+ is missing"),
    "index cut short": (reindex(lambda text: text[:40]), r"index\.json is no index of tensors"),
    "index of another kind": (reindex(lambda text: "{}"), r"index\.json is no index of tensors.*KeyError"),
    "index names another file": (reindex(in_the_last_file), rf"lacks {EMBEDDING}, which its index expects"),
    "whole numbers": (rewrite(lambda t: {EMBEDDING: t[EMBEDDING].int()}), rf"{EMBEDDING} has dtype torch.int32"),
    "another head": (
        rewrite(lambda t: {"lm_head.weight": t[EMBEDDING] + 1}), rf"lm_head\.weight differs from {EMBEDDING}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_folders_are_named_by_import_and_from_pretrained(kind, bf16, tmp_path):
    folder = shutil.copytree(bf16, tmp_path / "copy")
    change, words = DAMAGES[kind]
    change(folder)
    for read in (MobileMoEForCausalLM.from_pretrained, lambda folder: import_folder(folder, tmp_path / "dcp")):
        with pytest.raises(ValueError, match=words):
            read(folder)


def test_numbers_that_are_not_finite_are_not_imported(bf16, tmp_path):
    folder = shutil.copytree(bf16, tmp_path / "copy")
    rewrite(lambda t: {EMBEDDING: t[EMBEDDING].index_fill(0, torch.tensor(7), float("nan"))})(folder)
    with pytest.raises(ValueError, match=rf"model-\S+: {EMBEDDING} holds NaN"):
        import_folder(folder, tmp_path / "dcp")
    int4 = quantize_folder(bf16, tmp_path / "int4", QuantizationConfig())
    scale = "model.embed_tokens.weight_scale"
    rewrite(lambda t: {scale: torch.full_like(t[scale], float("nan"))})(int4)
    with pytest.raises(ValueError, match=rf"{scale} holds NaN"):
        import_folder(int4, tmp_path / "dcp")
    assert not list(tmp_path.glob("dcp*"))


@pytest.mark.parametrize("layout", ["bf16", "int4"])
def test_a_head_that_is_the_embedding_is_accepted(layout, bf16, tmp_path):
    folder = shutil.copytree(bf16, tmp_path / "copy")
    if layout == "int4":
        folder = quantize_folder(bf16, tmp_path / "int4", QuantizationConfig())
    tokens = torch.arange(8, 40)[None]
    before = MobileMoEForCausalLM.from_pretrained(folder)(tokens).logits
    rewrite(lambda t: {n.replace("model.embed_tokens", "lm_head"): x.clone() for n, x in t.items() if "embed" in n})(
        folder
    )
    assert torch.equal(MobileMoEForCausalLM.from_pretrained(folder)(tokens).logits, before)
    assert import_folder(folder, tmp_path / "dcp") == DIMS
