"""INT8 activations of an exported folder against the forward pass of QAT."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.errors import RefusedInput
from eval.benchmarks.harness import load_model
from eval.benchmarks.int8_activations import round_activations
from eval.export.hf_folder import write_hf_folder
from eval.hf_mobilemoe.modeling_mobilemoe import MobileMoEForCausalLM
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.qat import convert_to_qat


def decibels(expected, found):
    return float(20 * torch.log10(expected.norm() / (found - expected).norm()))


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    root = tmp_path_factory.mktemp("int8")
    tokenizer = write_tokenizer(root / "tokenizer")
    plain = write_hf_folder(random_tensors(), DIMS, tokenizer, root / "plain", dtype=torch.float32)
    return quantize_folder(plain, root / "int4", QuantizationConfig())


@torch.no_grad()
def test_logits_are_those_of_qats_forward_pass(int4):
    tokens = torch.randint(8, DIMS.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    model = MobileMoEForCausalLM.from_pretrained(int4, dtype=torch.float32).eval()
    qat = convert_to_qat(model_config(DIMS), QuantizationConfig()).build()
    released = {
        name: tensor.bfloat16().float()
        if name.endswith("norm.weight")
        else tensor  # an INT4 folder has norms in bfloat16
        for name, tensor in random_tensors().items()
    }
    qat.load_state_dict(MobileMoEStateDictAdapter(model_config(DIMS), None).from_hf(released))
    trained = qat.eval()(tokens, positions=torch.arange(40).expand(2, -1))
    plain = model(tokens).logits
    round_activations(model)
    rounded = model(tokens).logits
    # One activation at the edge of two integers may fall to the other one.
    assert decibels(trained, rounded) > 60
    assert decibels(trained, plain) < 50


@torch.no_grad()
def test_a_token_is_rounded_alone(int4):
    lm = load_model(int4, batch_tokens=200, activations="int8")
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randint(8, 300, (n,), generator=generator).tolist() for n in (40, 7, 23, 40, 12)]
    together = lm._loglikelihood_tokens([(("", ""), ids[:-3], ids[-3:]) for ids in pairs], disable_tqdm=True)
    for ids, (score, _) in zip(pairs, together, strict=True):
        logprobs = lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        expected = sum(float(logprobs[len(ids) - 4 + i, ids[-3 + i]]) for i in range(3))
        assert score == pytest.approx(expected, rel=1e-3)


def test_another_model_is_refused():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(RefusedInput, match="LlamaForCausalLM is no MobileMoE model; leave the option out"):
        round_activations(LlamaForCausalLM(config))
