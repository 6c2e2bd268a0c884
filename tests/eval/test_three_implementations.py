"""titan_ext's model, eval/hf_mobilemoe and ExecuTorch's llama_transformer, fed the same weights, say the same.

ExecuTorch knows another rule of RoPE scaling, so it is compared without any.
"""

import dataclasses

import pytest
import torch

from eval.export.dimensions import config_from_dims
from eval.hf_mobilemoe import MobileMoEForCausalLM
from tests.eval.test_hf_mobilemoe import executorch_model, relative_error
from tests.eval.tiny_checkpoint import DIMS, random_tensors
from titan_ext.config import RopeScaling
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config

UNSCALED = dataclasses.replace(DIMS, rope_scaling=RopeScaling(factor=1.0))


def build_titan(dims):
    config = model_config(dims)
    model = config.build()
    model.init_states()
    model.load_state_dict(MobileMoEStateDictAdapter(config, None).from_hf(random_tensors()))
    return model.eval()


def build_hf(dims, dtype=torch.float32):
    return MobileMoEForCausalLM.from_pretrained(
        None, config=config_from_dims(dims), state_dict=random_tensors(), dtype=dtype
    ).eval()


@pytest.fixture
def tokens():
    return torch.randint(8, DIMS.vocab_size, (1, 60), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_logits_of_all_three_agree(tokens):
    device = executorch_model(random_tensors())
    titan = build_titan(UNSCALED)(tokens, positions=torch.arange(60)[None])
    hf = build_hf(UNSCALED)(tokens).logits
    for name, logits in (("hf", hf), ("executorch", device(tokens))):
        assert relative_error(titan, logits) < 1e-4, name


@torch.no_grad()
def test_packed_documents_agree_with_the_released_scaling(tokens):
    lengths = (25, 3, 32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    titan = build_titan(DIMS)(tokens, positions=positions)
    assert relative_error(build_hf(DIMS)(tokens, position_ids=positions).logits, titan) < 1e-4


@torch.no_grad()
def test_bfloat16_stays_within_its_rounding(tokens):
    """The median counts: where a token's fourth and fifth expert are nearly equal, bfloat16 may choose the other."""
    exact = build_titan(DIMS)(tokens, positions=torch.arange(60)[None])[0]
    titan = build_titan(DIMS).bfloat16()
    for block in titan.layers.values():
        block.moe.expert_bias_E = block.moe.expert_bias_E.float()
    titan_LV = titan(tokens, positions=torch.arange(60)[None])[0]
    hf_LV = build_hf(DIMS, torch.bfloat16)(tokens).logits[0]
    for logits_LV in (titan_LV, hf_LV):
        errors = (logits_LV.double() - exact.double()).norm(dim=-1) / exact.double().norm(dim=-1)
        assert errors.median() < 0.04


@torch.no_grad()
def test_greedy_text_with_cache_is_that_of_the_trained_model_without(tokens):
    titan, hf = build_titan(DIMS), build_hf(DIMS)
    prompt = tokens[:, :8]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    generated = hf.generate(prompt, max_new_tokens=64, min_new_tokens=64, use_cache=True, **options)
    logits = titan(generated[:, :-1], positions=torch.arange(generated.shape[1] - 1)[None])[0]
    assert generated.shape[1] == 72
    assert torch.equal(logits[7:].argmax(-1), generated[0, 8:])
