"""Contracts with private and example code of dependencies that eval/compat.py uses."""

import inspect

import pytest
import torch
from torch import nn

from eval import compat

SIZES = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 96, "vocab_size": 32,
    "max_seq_len": 16, "max_context_len": 16, "use_kv_cache": True, "enable_dynamic_shape": True,
}  # fmt: skip


def test_executorchs_example_llama_has_the_parts_that_are_filled():
    """Breaks: eval/device/transformer.py, which puts weights into these attributes and shares the causal mask."""
    model = compat.build_llama(**SIZES)
    assert {"tok_embeddings", "output", "norm", "rope", "layers"} <= {name for name, _ in model.named_children()}
    layer = model.layers[1]
    assert all(isinstance(getattr(layer.attention, f"w{p}"), nn.Linear) for p in "qkvo")
    assert layer.attention.mask is model.layers[0].attention.mask and layer.attention.mask.shape == (16, 16)
    assert hasattr(layer, "attention_norm") and hasattr(layer, "ffn_norm")
    assert hasattr(model.rope, "freqs_cos") and hasattr(model.rope, "freqs_sin")


def test_executorchs_example_llama_takes_the_custom_attention():
    """Breaks: programs would hold the slow attention of the example, or none that traces."""
    compat.register_executorch_ops()
    model = compat.use_custom_attention(compat.build_llama(**SIZES))
    names = {type(module).__name__ for module in model.modules()}
    assert {"CustomKVCache", "SDPACustom"} <= names


@pytest.mark.parametrize("n_groups", [1, 2])
def test_the_4_bit_embedding_reads_the_high_nibble_first(n_groups):
    """Breaks: the embedding of every ExecuTorch program."""
    compat.register_executorch_ops()
    q = torch.randint(-8, 8, (5, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales = torch.full((5, n_groups), 0.25)
    even, odd = (q + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    scales = scales.squeeze(1) if n_groups == 1 else scales
    embedding = compat.int4_embedding((even << 4) | odd, scales, 64, 64 // n_groups)
    assert torch.equal(embedding(torch.arange(5)), q.float() * 0.25)


def test_int4_linears_dequantize_to_value_times_scale():
    """Breaks: the dense layers of every ExecuTorch program (torchao's IntxUnpackedToInt8Tensor)."""
    q = torch.randint(-8, 8, (8, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    weight = compat.int4_linear_weight(q, torch.full((8, 2), 0.5, dtype=torch.float16))
    assert torch.equal(weight.dequantize(), q.float() * 0.5)
    assert weight.qdata.dtype == torch.int8 and weight.scale.shape == (8, 2)
    assert weight.activation_quantization == "int8_asym_per_token"


def test_xnnpacks_partitioner_has_the_seams():
    """Breaks: TransformerPartitioner; test_executorch.py compares its program with XNNPACK's own partitioner's."""
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    spec = compat.xnnpack_partitioner().delegation_spec
    assert spec.backend_id == XnnpackPartitioner().delegation_spec.backend_id
    assert spec.compile_specs[0].key in inspect.getsource(xnnpack_preprocess), "the key that leaves passes out"
    assert callable(XnnpackPartitioner.ops_to_not_decompose)


def test_passes_of_executorch_are_where_they_are_taken_from():
    """Breaks: eval/device/executorch_export.py, lower."""
    config = compat.executorch_backend_config()
    assert [type(p).__name__ for p in config.passes] == ["QuantFusionPass"]
    assert config.do_quant_fusion_and_const_prop
    graph = torch.fx.symbolic_trace(nn.Identity())
    compat.remove_redundant_transposes(graph)


def test_the_thread_pool_can_be_resized():
    """Breaks: --threads of `mobilemoe profile`."""
    from executorch.extension.pybindings import portable_lib

    compat.set_executorch_threads(2)
    assert portable_lib._threadpool_get_thread_count() == 2
