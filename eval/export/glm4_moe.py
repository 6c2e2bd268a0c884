"""MobileMoE as `glm4_moe`, an architecture that transformers itself has: config and tensors, there and back.

The class `Glm4MoeForCausalLM` computes what MobileMoE computes: DeepSeek-V3's router (sigmoid scores, a bias that only
chooses, normalized weights times a factor) over attention with QK norm. What is written differently:

- Rotary pairs are the channels (i, i + C/2) of a head and not (2i, 2i+1), so the rows of q and k change places.
- QK norm has a weight, which is one here.
- Every expert has three linears [out, in], where MobileMoE has two tensors [E, in, out] of all experts.
- The shared expert's width is a multiple of the routed experts'.

Shapes: E experts, d = hidden_size, F = width of a routed expert, C = head_dim.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from core.errors import RefusedInput
from eval.export.dimensions import dims_from_config
from eval.export.limits import explain_native_misfit
from eval.export.tensor_layout import TensorLayout, TensorSpec, describe_folder
from eval.hf_mobilemoe.checkpoint_mobilemoe import tensor_shapes
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.spellings_mobilemoe import is_same
from eval.hf_mobilemoe.tensors_mobilemoe import TensorFiles
from titan_ext.quantization.config import QuantizationConfig

MODEL_TYPE = "glm4_moe"
ARCHITECTURE = "Glm4MoeForCausalLM"

_SAME_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "routed_scaling_factor",
    "num_experts_per_tok", "norm_topk_prob", "use_qk_norm", "attention_bias", "tie_word_embeddings", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Keys of config.json that both architectures have, with one meaning."""

_FIXED: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "use_qk_norm": True,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
"""Keys whose defaults in `glm4_moe` are no MobileMoE, so config.json must state these values."""
_NEUTRAL: dict[str, Any] = {"partial_rotary_factor": 1.0, "attention_dropout": 0.0, "num_nextn_predict_layers": 0}
"""Keys that may be absent. (transformers 5 moves the first one into `rope_parameters`.)"""

_NAMES = {
    "feed_forward.router.weight": "mlp.gate.weight",
    "feed_forward.expert_bias": "mlp.gate.e_score_correction_bias",
    "feed_forward.shared_expert.gate_proj.weight": "mlp.shared_experts.gate_proj.weight",
    "feed_forward.shared_expert.up_proj.weight": "mlp.shared_experts.up_proj.weight",
    "feed_forward.shared_expert.down_proj.weight": "mlp.shared_experts.down_proj.weight",
}
"""Ending of a tensor's name in MobileMoE -> its ending in `glm4_moe`, where these differ."""
_ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
_GATE_UP, _DOWN = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"


def kept_in_float32(name: str) -> bool:
    """Return whether a tensor may be float32 in a model of any dtype: the router's weight and the expert bias."""
    return name.endswith(("mlp.gate.weight", "mlp.gate.e_score_correction_bias"))


def build_native_config(config: MobileMoEConfig) -> dict[str, Any]:
    """Return the content of a `glm4_moe` config.json, in the form that transformers 4 and 5 both read.

    Raises:
        RefusedInput: the class has no such model.
    """
    if reason := explain_native_misfit(dims_from_config(config), QuantizationConfig()):
        raise RefusedInput(f"{reason}; export to bf16 or int4, which have code of their own")
    values = {key: getattr(config, key) for key in _SAME_KEYS if getattr(config, key) is not None}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": str(config.dtype).removeprefix("torch."),
        **values,
        "rope_scaling": config.rope_scaling,
        "n_routed_experts": config.num_local_experts,
        "n_shared_experts": config.intermediate_size_mlp // config.intermediate_size,
        "moe_intermediate_size": config.intermediate_size,
        "intermediate_size": config.intermediate_size_mlp,  # of dense layers, which there are none of
        **_FIXED,
        **_NEUTRAL,
    }


def translate_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a `glm4_moe` config.json with MobileMoE's keys: the inverse of `build_native_config`.

    Raises:
        ValueError: a key is missing, or has a value with which the class computes something else than MobileMoE.
    """
    for key, wanted in (_FIXED | _NEUTRAL).items():
        found = values.get(key, _NEUTRAL.get(key))
        if not is_same(found, wanted):
            raise ValueError(f"{key} is {found!r}; MobileMoE's layers are {MODEL_TYPE}'s with {wanted!r}")
    counts = {
        "num_local_experts": "n_routed_experts",
        "intermediate_size": "moe_intermediate_size",
        "intermediate_size_mlp": "n_shared_experts",
    }
    if missing := [key for key in counts.values() if type(values.get(key)) is not int or values[key] < 1]:
        raise ValueError(f"{missing[0]} is {values.get(missing[0])!r}; it must be a positive whole number")
    kept = (*_SAME_KEYS, "rope_parameters", "dtype", "torch_dtype", "quantization_config")
    translated = {key: values[key] for key in kept if key in values}
    translated |= {key: values[name] for key, name in counts.items()}
    translated["intermediate_size_mlp"] *= values["moe_intermediate_size"]
    return translated | {"model_type": MobileMoEConfig.model_type}


def native_shapes(config: MobileMoEConfig) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape of the `glm4_moe` checkpoint of a model."""
    meta = ((name, torch.empty(shape, device="meta")) for name, shape in tensor_shapes(config).items())
    return {name: tuple(tensor.shape) for name, tensor in convert_tensors(meta, config)}


def describe_native(config: MobileMoEConfig, order: Iterable[str] = ()) -> TensorLayout:
    """Return the tensors of the `glm4_moe` checkpoint of an unquantized model, in floats of `config.dtype`.

    Args:
        order: names of MobileMoE's tensors in the order in which `convert_tensors` takes them; as `describe_folder`.
    """
    layout = describe_folder(config, order).items()
    meta = ((name, torch.empty(spec.shape, dtype=spec.dtype, device="meta")) for name, spec in layout)
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in convert_tensors(meta, config)}


def convert_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], config: MobileMoEConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the `glm4_moe` checkpoint, each tensor of an unquantized MobileMoE taken one by one."""
    for name, tensor in tensors:
        if name.endswith(_ROTATED):
            yield name, to_half_split(tensor, config.head_dim)
            norm = name.replace("_proj.", "_norm.")
            yield norm, torch.ones(config.head_dim, dtype=tensor.dtype, device=tensor.device)
        elif name.endswith(_GATE_UP):
            for e, expert_dF in enumerate(tensor):
                gate_dF, up_dF = expert_dF.chunk(2, dim=-1)
                yield _name_expert(name, e, "gate"), gate_dF.T.contiguous()
                yield _name_expert(name, e, "up"), up_dF.T.contiguous()
        elif name.endswith(_DOWN):
            for e, expert_Fd in enumerate(tensor):
                yield _name_expert(name, e, "down"), expert_Fd.T.contiguous()
        else:
            yield rename(name), tensor


def rename(name: str) -> str:
    """Return the name in `glm4_moe` of a MobileMoE tensor that is one tensor there, too."""
    layer, own = re.fullmatch(r"(model\.layers\.\d+\.)?(.*)", name).groups(default="")  # type: ignore[union-attr]
    return layer + _NAMES.get(own, own)


def _name_expert(name: str, expert: int, part: str) -> str:
    return f"{name.partition('feed_forward.')[0]}mlp.experts.{expert}.{part}_proj.weight"


def to_half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return q's or k's rows [heads * C, ...] with the channels (2i, 2i+1) of a head at (i, i + C/2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo `to_half_split`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def arrange(values: torch.Tensor, part: str, head_dim: int) -> torch.Tensor:
    """Return a weight, or its INT4 values or scales, with the input axis last and the rows in stock programs' order.

    Args:
        values: [out, in], or [E, in, out] for experts.
        part: "rotated" for q and k, "gate", "up" or "down" for experts, empty for what stays as it is.
    """
    if part == "rotated":
        return to_half_split(values, head_dim)
    if part in ("gate", "up", "down"):
        values = values.transpose(1, 2)
    return values.chunk(2, dim=1)[part == "up"] if part in ("gate", "up") else values


class NativeTensors(Mapping[str, torch.Tensor]):
    """The tensors of a `glm4_moe` folder by MobileMoE's names and in its form; each is made when it is asked for."""

    def __init__(self, files: TensorFiles, config: MobileMoEConfig):
        """Compare the files with `config`.

        Raises:
            ValueError: tensors are missing, superfluous, misshaped or of another dtype, or a QK norm has weights.
        """
        files.check_content(native_shapes(config), quantized=False, in_float32=kept_in_float32)
        self._files, self._config, self._names = files, config, list(tensor_shapes(config))
        for name in files:
            if name.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight")) and not (files[name] == 1).all():
                raise ValueError(f"{name} is not one everywhere; MobileMoE's QK norm has no weight")

    def __getitem__(self, name: str) -> torch.Tensor:
        if name.endswith(_GATE_UP):
            return torch.stack([self._read_gate_up(name, e) for e in range(self._config.num_local_experts)])
        if name.endswith(_DOWN):
            experts = (self._files[_name_expert(name, e, "down")] for e in range(self._config.num_local_experts))
            return torch.stack([down_dF.T for down_dF in experts])
        tensor = self._files[rename(name)]
        return to_interleaved(tensor, self._config.head_dim) if name.endswith(_ROTATED) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def check_values(self) -> None:
        """Read every tensor once; raise ValueError if one holds a value that is not finite."""
        self._files.check_values()

    def _read_gate_up(self, name: str, expert: int) -> torch.Tensor:
        parts = (self._files[_name_expert(name, expert, part)] for part in ("gate", "up"))
        return torch.cat([weight_Fd.T for weight_Fd in parts], dim=-1)
