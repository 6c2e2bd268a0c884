"""ExecuTorch programs: a model trained a little, exported through the command, against the transformers model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes.quant_fusion_pass import QuantFusionPass
from executorch.runtime import Runtime
from torch import nn
from transformers import AutoTokenizer

from core.checksums import verify_checksums
from eval.compat import int4_linear_weight, xnnpack_partitioner
from eval.config import DeviceConfig
from eval.device import prompts
from eval.device.executorch_export import export_moe
from eval.device.expert_op import declare
from eval.device.runtime import DeviceProgram
from eval.device.transformer import DenseDims, count_weight_bytes, dense_transformer, moe_transformer
from eval.device.weights import DeviceWeights
from eval.export.dimensions import config_from_dims
from eval.export.int4 import derive_scale
from eval.export.source import Source, open_folder
from eval.hf_mobilemoe import MobileMoEForCausalLM
from pipelines.cli import REFUSED, main
from tests.eval.tiny_checkpoint import DIMS, dequantize_folder, random_tensors, write_int4_folder, write_tokenizer
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.formulas import quantize_int4

TOLERANCE = 0.1
"""Of the standard deviation of the logits: tokens closer than that may change places, because the device rounds
activations to INT8 in front of every linear and the transformers model does not."""


@pytest.fixture(scope="module")
def hf(int4_folder):
    return MobileMoEForCausalLM.from_pretrained(int4_folder).eval()


@pytest.fixture(scope="module")
def five_prompts(int4_folder):
    tokenizer = AutoTokenizer.from_pretrained(int4_folder)
    text = prompts.load_texts()["knowledge"]
    return [tokenizer(text[start : start + 40])["input_ids"] for start in (0, 150, 300, 450, 600)]


@torch.no_grad()
def test_greedy_text_is_the_transformers_models(program_folder, hf, five_prompts):
    program = DeviceProgram(program_folder / "model.pte")
    equal = 0
    for prompt in five_prompts:
        found = program.greedy(prompt, 64)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 64}
        expected = hf.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        if found == expected:
            equal += 1
            continue
        first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        logits = hf(torch.tensor([prompt + expected[:first]])).logits[0, -1]
        assert logits[expected[first]] - logits[found[first]] < TOLERANCE * logits.std(), (prompt, first)
    assert equal >= 1


@torch.no_grad()
def test_logits_token_by_token_and_at_once(program_folder, hf, five_prompts):
    """Teacher-forced: prompt in one call, then one token a call, against one pass of the transformers model."""
    program, tokens = DeviceProgram(program_folder / "model.pte"), [*five_prompts[0], *five_prompts[1]]
    n = len(five_prompts[0])
    expected = hf(torch.tensor([tokens])).logits[0, n - 1 :]
    found = torch.stack(
        [program.logits(tokens[:n], 0), *(program.logits([tokens[i]], i) for i in range(n, len(tokens)))]
    )
    assert sqnr(found, expected) > 20
    assert nn.functional.cosine_similarity(found, expected).min() > 0.99


@torch.no_grad()
@pytest.mark.parametrize("expert_op", ["stock", "fast"])
def test_every_layer_of_the_traced_model(tmp_path, expert_op):
    """The modules that are exported, run eagerly on random weights: hidden states after each layer."""
    declare()
    write_tokenizer(tmp_path / "tokenizer")
    folder = write_int4_folder(random_tensors(), DIMS, tmp_path / "tokenizer", tmp_path / "int4", QuantizationConfig())
    model, hf = (
        moe_transformer(DeviceWeights(open_folder(folder)), 128, expert_op),
        MobileMoEForCausalLM.from_pretrained(folder).eval(),
    )
    outputs: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0][0]))
    expected: list[torch.Tensor] = []
    for layer in hf.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: expected.append(output[0]))
    tokens = torch.randint(8, DIMS.vocab_size, (1, 100), generator=torch.Generator().manual_seed(0))
    model(tokens, {"input_pos": torch.tensor([0])})
    hf(tokens)
    assert len(outputs) == len(expected) == DIMS.n_layers
    for found, wanted in zip(outputs, expected, strict=True):
        assert sqnr(found, wanted) > 20
        assert nn.functional.cosine_similarity(found, wanted).mean() > 0.99


@torch.no_grad()
def test_the_program_computes_what_the_traced_model_does(int4_folder, program_folder, five_prompts):
    """Same integers in XNNPACK and in torchao's eager arithmetic; an activation on an edge may round otherwise."""
    model = moe_transformer(DeviceWeights(open_folder(int4_folder)), 128, "stock")
    eager = model(torch.tensor([five_prompts[2]]), {"input_pos": torch.tensor([0])})[0]
    assert sqnr(DeviceProgram(program_folder / "model.pte").logits(five_prompts[2], 0), eager) > 35


@torch.no_grad()
def test_a_program_with_an_int8_cache_and_the_fast_ops(tmp_path):
    """One layer, a prompt in one call and five tokens after it: against a float32 cache, and lowered against eager."""
    dims = dataclasses.replace(DIMS, n_layers=1)
    write_tokenizer(tmp_path / "tokenizer")
    folder = write_int4_folder(
        random_tensors(dims), dims, tmp_path / "tokenizer", tmp_path / "int4", QuantizationConfig()
    )
    weights = DeviceWeights(open_folder(folder))
    device = DeviceConfig(context=128, expert_op="fast", kv_cache="int8")
    path = export_moe(weights, tmp_path / "tokenizer", tmp_path / "program", device)
    program = DeviceProgram(path / "model.pte")
    assert program.constant("uses_int8_kv_cache") and program.uses_fast_op
    float_cache, int8_cache = (moe_transformer(weights, 128, "fast", cache) for cache in ("float32", "int8"))
    tokens = torch.randint(8, dims.vocab_size, (1, 70), generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 65), *((i, i + 1) for i in range(65, 70))):
        piece, position = tokens[:, start:end], {"input_pos": torch.tensor([start])}
        expected, found = float_cache(piece, position)[0], int8_cache(piece, position)[0]
        assert 25 < sqnr(found, expected) < 60
        assert sqnr(program.logits(piece[0].tolist(), start), found) > 30
    for layer in int8_cache.layers:
        cache = layer.attention.kv_cache
        assert cache.k_cache.dtype == cache.v_cache.dtype == torch.int8
        assert cache.k_cache_scales.shape == (1, 128, dims.n_kv_heads, 1)


class Residual(nn.Module):
    """The smallest model with all that a block gives to XNNPACK: a norm, a quantized linear, a sum."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64), nn.Linear(64, 64, bias=False)
        weight = self.linear.weight.detach()
        scale = derive_scale(weight, 1, 32)
        q = quantize_int4(weight, scale, 1, 32)
        self.linear.weight = nn.Parameter(int4_linear_weight(q, scale), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.silu(self.linear(self.norm(x)))


@torch.no_grad()
def test_the_partitioner_changes_no_bit():
    """XNNPACK's own partitioner runs sixteen more passes; delegates and numbers are the same."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(5, 64)
    shapes = ({0: torch.export.Dim("tokens", max=64)},)
    outputs, delegates = [], []
    for partitioner in (XnnpackPartitioner(), xnnpack_partitioner()):
        program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=True)
        edge = to_edge_transform_and_lower(
            program, partitioner=[partitioner], compile_config=EdgeCompileConfig(_check_ir_validity=False)
        )
        targets = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
        delegates.append(targets)
        buffer = edge.to_executorch(ExecutorchBackendConfig(passes=[QuantFusionPass()])).buffer
        outputs.append(Runtime.get().load_program(buffer).load_method("forward").execute((x,))[0].clone())
    assert torch.equal(*outputs) and delegates[0] == delegates[1]
    assert any("delegate" in target for target in delegates[0]) and sqnr(outputs[0], model(x)) > 35


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to quantization noise, dB."""
    return (20 * torch.log10(expected.norm() / (found - expected).norm())).item()


def test_weights_are_the_folders_bit_for_bit(int4_folder, hf):
    model = moe_transformer(DeviceWeights(open_folder(int4_folder)), 128, "stock")
    own, theirs = model.layers[0], hf.model.layers[0]
    assert torch.equal(model.output.weight.dequantize(), hf.lm_head.weight)
    every = torch.arange(DIMS.vocab_size)[None]
    assert torch.equal(model.tok_embeddings(every), hf.model.embed_tokens(every))
    assert torch.equal(own.attention.wk.weight.dequantize(), theirs.self_attn.k_proj.weight)
    shared = own.block_sparse_moe.shared_expert
    assert torch.equal(shared.w2.weight.dequantize(), theirs.feed_forward.shared_expert.down_proj.weight)
    assert torch.equal(own.block_sparse_moe.router_ED, theirs.feed_forward.router.weight)
    assert torch.equal(own.block_sparse_moe.bias_E, theirs.feed_forward.expert_bias)


def test_every_source_gives_the_same_weights(int4_folder, tmp_path):
    """An INT4 folder and the BF16 folder made of it; the packer's own test holds the experts' bytes."""
    folders = (int4_folder, dequantize_folder(int4_folder, tmp_path / "bf16"))
    sources = [DeviceWeights(open_folder(folder)) for folder in folders]
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"):
        for a, b in zip(*(source.read_matrix(name) for source in sources), strict=True):
            assert torch.equal(a, b)
    for name in ("gate_up_proj", "down_proj"):
        pairs = [source.read_expert_matrices(f"model.layers.0.feed_forward.experts.{name}") for source in sources]
        for a, b in zip(*pairs, strict=True):
            assert torch.equal(a, b)


def test_the_folder_is_complete(program_folder, hf):
    assert verify_checksums(program_folder) >= 7
    program = DeviceProgram(program_folder / "model.pte")
    assert program.context == program.constant("get_max_seq_len") == 128
    assert program.constant("get_bos_id") == hf.config.bos_token_id
    assert program.constant("get_eos_ids") == hf.config.eos_token_id
    assert program.constant("get_vocab_size") == DIMS.vocab_size
    assert AutoTokenizer.from_pretrained(program_folder).chat_template
    settings = json.loads((program_folder / "program.json").read_text())
    assert settings["expert_op"] == "stock" and not program.uses_fast_op
    with pytest.raises(ValueError, match="130 tokens: the program's context is 128"):
        program.logits([1] * 130, 0)


@pytest.mark.parametrize("group_size", [64, 128])
def test_experts_in_larger_groups_need_less(group_size):
    dims = dataclasses.replace(DIMS, d_model=128, expert_hidden=128)
    tensors = random_tensors(dims)
    models = [
        moe_transformer(DeviceWeights(Source(tensors, config_from_dims(dims), Path()), n), 64, "stock")
        for n in (32, group_size)
    ]
    small, large = (count_weight_bytes(model)["expert_bytes"] for model in models)
    bits = {32: 6.0, 64: 5.0, 128: 4.5}
    assert large / small == pytest.approx(bits[group_size] / bits[32], rel=0.01)


@torch.no_grad()
def test_a_dense_baseline_is_an_ordinary_llama():
    model = dense_transformer(DenseDims(64, 2, 4, 2, 96, 320, head_dim=16), 64)
    assert model(torch.tensor([[1, 2, 3]]), {"input_pos": torch.tensor([0])}).shape == (1, 320)


def refused(dims=DIMS, layout=None, expert_group_size=None, **extra):
    config = config_from_dims(dims, **extra)
    with pytest.raises(ValueError) as caught:
        DeviceWeights(Source({}, config, Path(), layout=layout), expert_group_size)
    return str(caught.value)


def test_what_the_op_cannot_take_is_refused_by_name():
    from eval.hf_mobilemoe.configuration_mobilemoe import describe_quantization

    assert "expert_group_axis" in refused(layout=describe_quantization(32, "out"))
    assert "hidden_size is 64" in refused(expert_group_size=128)
    assert "intermediate_size is 32" in refused(expert_group_size=64)
    assert "intermediate_size is 48" in refused(dataclasses.replace(DIMS, expert_hidden=48))
    assert "intermediate_size_mlp is 80" in refused(dataclasses.replace(DIMS, shared_hidden=80))
    assert "expert_group_size is 48" in refused(expert_group_size=48)
    assert "quantization.group_size is 16" in refused(layout=describe_quantization(16, "in"), expert_group_size=32)
    assert "scoring_func is 'softmax'" in refused(scoring_func="softmax")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "executorch", "--context", "512"], "context is 512"),
        (["--format", "int4", "--context", "512"], "is an option of --format executorch"),
    ],
)
def test_the_command_refuses(int4_folder, tmp_path, capsys, arguments, message):
    assert main(["export", str(int4_folder), "--out", str(tmp_path / "out"), *arguments]) == REFUSED
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
