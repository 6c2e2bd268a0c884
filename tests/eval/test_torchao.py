"""Why there is no torchao-quantized folder: what torchao 0.18 and transformers 4.57 do with experts in one 3-D tensor.

When one of these fails, that has changed, and docs/export.md should be looked at again.
"""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

from eval.export.hf_folder import write_hf_folder
from tests.eval.tiny_checkpoint import DIMS, random_tensors, write_tokenizer

INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def test_torchao_refuses_int4_in_three_dimensions():
    module = nn.ParameterDict({"experts": nn.Parameter(torch.randn(4, 64, 32))})
    with pytest.raises(ValueError, match="only works for 2-d and 4-d Tensors, got: 3"):
        quantize_(nn.ModuleDict({"m": module}), FqnToConfig(OrderedDict({"m.experts": INT4})), filter_fn=None)


def test_transformers_quantizes_linears_only_and_saves_no_int4_safetensors(tmp_path):
    write_hf_folder(random_tensors(), DIMS, write_tokenizer(tmp_path / "tokenizer"), tmp_path / "bf16")
    config = TorchAoConfig(FqnToConfig(OrderedDict({"re:.*experts.*": INT4, "_default": INT4})))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", quantization_config=config, dtype=torch.bfloat16)
    layer = model.model.layers[0]
    assert type(layer.self_attn.q_proj.weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert layer.self_attn.q_proj.weight.qdata.dtype == torch.int8, "a byte a weight: twice an INT4 file"
    assert type(layer.feed_forward.experts.gate_up_proj) is nn.Parameter, "the experts stay bfloat16"
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "torchao")
