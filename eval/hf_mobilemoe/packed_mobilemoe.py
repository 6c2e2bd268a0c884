"""MobileMoE with its INT4 weights kept packed: each is dequantized when it is used and dropped again.

Travels inside every exported folder. The numbers are those of a model dequantized when it is loaded; memory holds the
packed weights, and floats of one matrix, of one expert or of a slice of the vocabulary at a time.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint_mobilemoe import PackedTensor, dequantize_int4, kept_in_float32, packed_tensors, unpack_int4
from .configuration_mobilemoe import MobileMoEConfig
from .loading_mobilemoe import dtype_of, generation_config_of

HEAD_ROWS = 1 << 14
"""Rows of the output projection that are floats at once."""


class PackedWeight(nn.Module):
    """One INT4 weight; an index into its first dimension gives floats. `PackedTensor` says how it lies."""

    def __init__(self, packed: PackedTensor, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dim, self.group_size, self.dtype = packed.shape, packed.dim, packed.group_size, dtype
        self.register_buffer("qweight", tensors[packed.qweight_name])
        self.register_buffer("scale", tensors[packed.scale_name])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Casting a model changes the dtype of the floats this gives; the packed numbers move as they are."""
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
    """Linear without bias; a long output in slices."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        starts = range(0, len(self.weight), HEAD_ROWS)
        return torch.cat([F.linear(x, self.weight[start : start + HEAD_ROWS]) for start in starts], dim=-1)


class PackedEmbedding(nn.Module):
    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


def fill_packed(model: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str, dtype: torch.dtype) -> None:
    """Put an INT4 checkpoint's tensors into a model on the meta device whose config has `quantization`.

    Args:
        prefix: what the checkpoint's names have before the model's: "" for a causal model, "model." for its decoder.
    """
    packed = packed_tensors(model.config, model.config.quantization)
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


def packed_model(
    cls: type, where: str, packed: Mapping[str, torch.Tensor], config: MobileMoEConfig, hub: dict, **kwargs
) -> nn.Module:
    """`cls.from_pretrained(where, keep_int4=True)`, of the checkpoint's tensors.

    Raises:
        ValueError: the checkpoint is not quantized, or `kwargs` has an option that packed weights do not take.
    """
    if config.quantization is None:
        raise ValueError(f"keep_int4: {where} is not quantized; leave the option out")
    dtype = dtype_of(kwargs, config)
    generation_config = generation_config_of(cls, where, hub, kwargs)
    attention = {key: kwargs.pop(key) for key in ("attn_implementation",) if key in kwargs}
    # The last two are what the Auto classes pass on.
    taken = {"dtype", "torch_dtype", "generation_config", "trust_remote_code", "adapter_kwargs"}
    if unknown := sorted(kwargs.keys() - taken):
        raise ValueError(f"keep_int4 does not go together with {', '.join(unknown)}; leave it or them out")
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype, **attention)
    fill_packed(model, packed, "" if cls.can_generate() else "model.", dtype)
    if generation_config is not None:
        model.generation_config = generation_config
    model.name_or_path = model.config.name_or_path = where
    return model.eval()
