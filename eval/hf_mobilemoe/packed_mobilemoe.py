"""This module keeps the INT4 weights of MobileMoE packed; each is dequantized when it is used, and dropped after it.

The results are those of a model that is dequantized when it is loaded. Memory holds the packed weights, and the floats
of one matrix, of one expert or of a slice of the vocabulary at a time. A copy of this file is in every exported folder.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint_mobilemoe import PackedTensor, dequantize_int4, kept_in_float32, packed_tensors, unpack_int4
from .configuration_mobilemoe import MobileMoEConfig
from .loading_mobilemoe import HUB_OPTIONS, choose_dtype, load_generation_config, record_source

HEAD_ROWS = 1 << 14
"""Number of rows of the output projection that are dequantized at once."""


class PackedWeight(nn.Module):
    """One INT4 weight; indexing its first dimension returns floats. `PackedTensor` describes its layout."""

    qweight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, packed: PackedTensor, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dim, self.group_size, self.dtype = packed.shape, packed.dim, packed.group_size, dtype
        self.register_buffer("qweight", tensors[packed.qweight_name])
        self.register_buffer("scale", tensors[packed.scale_name])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Apply a cast or move. A cast changes the dtype of the floats only; the packed tensors keep theirs."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        self.qweight = fn(self.qweight)
        self.scale = fn(self.scale.view(torch.int16)).view(torch.float16)
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | torch.Tensor) -> torch.Tensor:
        qweight, scale = self.qweight[index], self.scale[index]
        dim = self.dim + qweight.dim() - len(self.shape)
        return dequantize_int4(unpack_int4(qweight, dim), scale, dim, self.group_size).to(self.dtype)


class PackedLinear(nn.Module):
    """Linear layer without bias; a long output is computed in slices."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T, [..., in] -> [..., out]."""
        starts = range(0, len(self.weight), HEAD_ROWS)
        return torch.cat([F.linear(x, self.weight[start : start + HEAD_ROWS]) for start in starts], dim=-1)


class PackedEmbedding(nn.Module):
    """Embedding whose rows are dequantized when they are looked up."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of `ids`, [...] -> [..., D]."""
        return self.weight[ids]


def fill_packed(model: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str, dtype: torch.dtype) -> None:
    """Put an INT4 checkpoint's tensors into a model on the meta device whose config has `quantization`.

    Args:
        tensors: tensors of the checkpoint by name.
        prefix: prefix of the checkpoint's names that the model's do not have: "" for a causal model, "model." for its
            decoder.
        dtype: dtype of the floats, except the router's weight and the expert bias.
    """
    config: Any = model.config
    packed = packed_tensors(config, config.quantization)
    rest = {
        name.removeprefix(prefix): tensor.to(torch.float32 if kept_in_float32(name) else dtype)
        for name, tensor in tensors.items()
        if not any(name in (p.qweight_name, p.scale_name) for p in packed.values())
    }
    for name, p in packed.items():
        path, attribute = name.removeprefix(prefix).rsplit(".", 1)
        weight = PackedWeight(p, tensors, dtype)
        if attribute == "weight":
            kind = PackedEmbedding if path.endswith("embed_tokens") else PackedLinear
            model.set_submodule(path, kind(weight))
            if kind is PackedEmbedding and hasattr(model, "lm_head"):
                model.lm_head = PackedLinear(weight)
        else:
            experts = model.get_submodule(path)
            delattr(experts, attribute)
            setattr(experts, attribute, weight)
    model.load_state_dict(rest, strict=False, assign=True)
    model.requires_grad_(False)


def build_packed_model(
    cls: Any, where: str, packed: Mapping[str, torch.Tensor], config: MobileMoEConfig, hub: dict, **kwargs: Any
) -> nn.Module:
    """Build the model of `cls.from_pretrained(where, keep_int4=True)` from the checkpoint's tensors.

    Raises:
        ValueError: the checkpoint is not quantized, or `kwargs` has an option that packed weights do not take.
    """
    if config.quantization is None:
        raise ValueError(f"keep_int4: {where} is not quantized; leave the option out")
    dtype = choose_dtype(kwargs, config)
    generation_config = load_generation_config(cls, where, hub, kwargs)
    attention = {key: kwargs.pop(key) for key in ("attn_implementation",) if key in kwargs}
    # The Auto classes pass on all but the first three.
    taken = {"dtype", "torch_dtype", "generation_config", "trust_remote_code", "adapter_kwargs", *HUB_OPTIONS}
    if unknown := sorted(kwargs.keys() - taken):
        raise ValueError(f"keep_int4 does not go together with {', '.join(unknown)}; leave it or them out")
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype, **attention)
    fill_packed(model, packed, "" if cls.can_generate() else "model.", dtype)
    if generation_config is not None:
        model.generation_config = generation_config
    return record_source(model, where).eval()
