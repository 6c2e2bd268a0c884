"""Conversion between torchtitan's parameter names and the names of the released MobileMoE checkpoints.

A released checkpoint stores experts as [E, in, out] with gate and up concatenated (gate first); torchtitan has them as
[E, out, in]. Both use interleaved RoPE, so q and k need no permutation. The embedding is tied and stored once.

Shape suffixes: E experts, D model dimension, F expert hidden width.
"""

import re
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from core.errors import RefusedInput

_TOP = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.qkv_linear.wq.weight": "self_attn.q_proj.weight",
    "attention.qkv_linear.wk.weight": "self_attn.k_proj.weight",
    "attention.qkv_linear.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "moe.router.gate.weight": "feed_forward.router.weight",
    "moe.expert_bias_E": "feed_forward.expert_bias",
    "moe.shared_experts.w1.weight": "feed_forward.shared_expert.gate_proj.weight",
    "moe.shared_experts.w3.weight": "feed_forward.shared_expert.up_proj.weight",
    "moe.shared_experts.w2.weight": "feed_forward.shared_expert.down_proj.weight",
}
_EXPERTS = "moe.routed_experts.inner_experts."


class MobileMoEStateDictAdapter(StateDictAdapter):
    """Renames, transposes and concatenates tensors; every value and dtype stays the same."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors under their released names.

        Args:
            state_dict: the model's tensors by torchtitan name, without optimizer state.

        Raises:
            RefusedInput: a name belongs to no MobileMoE.
        """
        hf: dict[str, Any] = {}
        for name, value in state_dict.items():
            if name == "lm_head.weight":  # tied with tok_embeddings.weight
                continue
            if name in _TOP:
                hf[_TOP[name]] = value
                continue
            i, rest = _split_layer(name, r"layers\.(\d+)\.(.+)")
            prefix = f"model.layers.{i}."
            if rest in _LAYER:
                hf[prefix + _LAYER[rest]] = value
            elif rest == _EXPERTS + "w1_EFD":
                up_EFD = state_dict[f"layers.{i}.{_EXPERTS}w3_EFD"]
                gate_up_ED2F = torch.cat([value.transpose(1, 2), up_EFD.transpose(1, 2)], dim=-1)
                hf[prefix + "feed_forward.experts.gate_up_proj"] = gate_up_ED2F
            elif rest == _EXPERTS + "w2_EDF":
                # torchtitan writes the result with safetensors, which takes contiguous tensors only.
                hf[prefix + "feed_forward.experts.down_proj"] = value.transpose(1, 2).contiguous()
            elif rest != _EXPERTS + "w3_EFD":
                raise RefusedInput(f"{name}: no such parameter in a MobileMoE; the state dict is of another model")
        return hf

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors under their torchtitan names.

        Args:
            hf_state_dict: tensors by released name; a part of a checkpoint is accepted too.

        Raises:
            RefusedInput: a name belongs to no released MobileMoE checkpoint.
        """
        top = {hf: name for name, hf in _TOP.items()}
        layer = {hf: name for name, hf in _LAYER.items()}
        state_dict: dict[str, Any] = {}
        for name, value in hf_state_dict.items():
            if name in top:
                state_dict[top[name]] = value
                continue
            i, rest = _split_layer(name, r"model\.layers\.(\d+)\.(.+)")
            prefix = f"layers.{i}."
            if rest in layer:
                state_dict[prefix + layer[rest]] = value
            elif rest == "feed_forward.experts.gate_up_proj":
                gate_EDF, up_EDF = value.chunk(2, dim=-1)
                state_dict[prefix + _EXPERTS + "w1_EFD"] = gate_EDF.transpose(1, 2)
                state_dict[prefix + _EXPERTS + "w3_EFD"] = up_EDF.transpose(1, 2)
            elif rest == "feed_forward.experts.down_proj":
                state_dict[prefix + _EXPERTS + "w2_EDF"] = value.transpose(1, 2)
            else:
                raise RefusedInput(f"{name}: no such tensor in a released MobileMoE checkpoint")
        if "tok_embeddings.weight" in state_dict:
            state_dict["lm_head.weight"] = state_dict["tok_embeddings.weight"]
        return state_dict

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        """Return a reader of a folder with unquantized weights.

        Raises:
            RefusedInput: `from_quantized` is set. INT4 folders are converted to bf16 first (eval/export/int4.py).
        """
        if from_quantized:
            raise RefusedInput(f"{path}: convert the INT4 checkpoint to bf16 before loading it for training")
        return HuggingFaceStorageReader(path)


def _split_layer(name: str, pattern: str) -> tuple[str, str]:
    match = re.fullmatch(pattern, name)
    if match is None:
        raise RefusedInput(f"{name}: not a tensor of a MobileMoE; expected the form {pattern}")
    return match.group(1), match.group(2)
