"""This module describes a checkpoint's tensors: names, shapes and INT4 layout; every exported folder has a copy."""

from collections.abc import Iterator, Mapping

import torch

from .configuration_mobilemoe import EXPERT_GROUP_AXES, MobileMoEConfig

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of the tensors that are not packed."""

CHUNK_VALUES = 1 << 20
"""Number of values that are dequantized at once; 4 MB in float32."""


def tensor_shapes(config: MobileMoEConfig) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape of an unquantized checkpoint, in the order of the network."""
    d, f, shared = config.hidden_size, config.intermediate_size, config.intermediate_size_mlp
    experts, n_q = config.num_local_experts, config.num_attention_heads * config.head_dim
    n_kv = config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (n_q, d),
        "self_attn.k_proj.weight": (n_kv, d),
        "self_attn.v_proj.weight": (n_kv, d),
        "self_attn.o_proj.weight": (d, n_q),
        "post_attention_layernorm.weight": (d,),
        "feed_forward.router.weight": (experts, d),
        "feed_forward.expert_bias": (experts,),
        "feed_forward.experts.gate_up_proj": (experts, d, 2 * f),
        "feed_forward.experts.down_proj": (experts, f, d),
        "feed_forward.shared_expert.gate_proj.weight": (shared, d),
        "feed_forward.shared_expert.up_proj.weight": (shared, d),
        "feed_forward.shared_expert.down_proj.weight": (d, shared),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (d,)}


def kept_in_float32(name: str) -> bool:
    """Return whether a tensor is float32 for every dtype of the model: the router's weight and the expert bias."""
    return name.endswith(("feed_forward.router.weight", "feed_forward.expert_bias"))


class PackedTensor:
    """The layout of one quantized weight in an INT4 file.

    The tensor `qweight_name` is uint8 and has the weight's shape, halved along `dim` (two values a byte in two's
    complement, the low nibble first). The tensor `scale_name` is float16; its shape is divided by `group_size` along
    `dim`.
    """

    def __init__(self, name: str, shape: tuple[int, ...], quantization: Mapping) -> None:
        self.name, self.shape = name, shape
        self.group_size: int = quantization["group_size"]
        self.dim = len(shape) - 1
        if ".experts." in name:
            base = name.removesuffix("_proj")
            self.group_size = quantization.get("expert_group_size", self.group_size)
            self.qweight_name, self.scale_name = f"{base}_qweight", f"{base}_scale"
            self.dim = 1 if quantization["expert_group_axis"] == EXPERT_GROUP_AXES["in"] else 2
        else:
            base = name.removesuffix(".weight")
            self.qweight_name, self.scale_name = f"{base}.qweight", f"{base}.weight_scale"
        if name.endswith("embed_tokens.weight"):
            self.group_size = quantization["embedding_group_size"]
        if shape[self.dim] % self.group_size:
            raise ValueError(
                f"{name} {list(shape)} cannot be quantized: dimension {self.dim} is not a multiple of "
                f"the group size {self.group_size}"
            )

    def divided_shape(self, divisor: int) -> tuple[int, ...]:
        """Return the weight's shape with dimension `dim` divided by `divisor`."""
        return tuple(n // divisor if i == self.dim else n for i, n in enumerate(self.shape))

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the packed values and of their scales, by name."""
        return {self.qweight_name: self.divided_shape(2), self.scale_name: self.divided_shape(self.group_size)}


def packed_tensors(config: MobileMoEConfig, quantization: Mapping | None) -> dict[str, PackedTensor]:
    """Return the weights that are packed in an INT4 file: linears, experts and embedding; not router, bias or norms."""
    assert quantization is not None, "the checkpoint is not quantized"
    return {
        name: PackedTensor(name, shape, quantization)
        for name, shape in tensor_shapes(config).items()
        if len(shape) > 1 and not kept_in_float32(name)
    }


def checkpoint_shapes(config: MobileMoEConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the checkpoint that `config` describes; with `quantization`, those of the packed tensors."""
    if config.quantization is None:
        return tensor_shapes(config)
    packed = packed_tensors(config, config.quantization)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        shapes |= packed[name].packed_shapes() if name in packed else {name: shape}
    return shapes


def check_tensors(found: Mapping[str, tuple[int, ...]], config: MobileMoEConfig, where: str) -> None:
    """Compare names and shapes with those of `config`; raise a ValueError that names the first ten differences."""
    check_shapes(found, checkpoint_shapes(config), where)


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes; raise a ValueError that names the first ten differences."""
    faults = [f"{n} {list(s)} is missing" for n, s in expected.items() if n not in found]
    faults += [f"{n} {list(s)} is not a tensor of this model" for n, s in found.items() if n not in expected]
    faults += [
        f"{n} has shape {list(found[n])}, expected {list(s)}"
        for n, s in expected.items()
        if n in found and tuple(found[n]) != s
    ]
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(f"{where} does not hold the tensors its config.json describes: {'; '.join(faults[:10])}{more}")


def check_dtype(name: str, dtype: object, where: object) -> None:
    """Raise ValueError unless packed values are uint8, scales float16, and any other tensor a float of 16 or 32 bits.

    A wider float would be rounded on the way into training; narrower ones need scales, which the format does not have.
    """
    wanted = {"qweight": (torch.uint8,), "scale": (torch.float16,)}.get(
        name.replace(".", "_").rsplit("_", 1)[-1], FLOATS
    )
    if dtype not in wanted:
        raise ValueError(f"{where}: {name} has dtype {dtype}, expected {' or '.join(map(str, wanted))}")


def unpack_int4(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """Unpack uint8 (two's-complement nibbles along `dim`, the low one first) to int8 in -8..7 with `dim` doubled."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=dim + 1).flatten(dim, dim + 1)
    return (nibbles.to(torch.int8) ^ 8) - 8


def dequantize_int4(q: torch.Tensor, scale: torch.Tensor, dim: int, group_size: int) -> torch.Tensor:
    """Return q * scale in float32, which is exact; `group_size` values along `dim` share a scale."""
    groups = q.unflatten(dim, (-1, group_size)).float() * scale.float().unsqueeze(dim + 1)
    return groups.flatten(dim, dim + 1)


def dequantize_tensors(
    tensors: Mapping[str, torch.Tensor], config: MobileMoEConfig, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an INT4 checkpoint as those of an unquantized one, one by one.

    Args:
        tensors: tensors that `check_tensors` accepts; each is read once.
        config: configuration that has `quantization`.
        dtype: dtype of the result, except the router's weight and the expert bias, which are float32.

    Raises:
        ValueError: a tensor has a wrong dtype.
    """
    packed = packed_tensors(config, config.quantization)
    for name in tensor_shapes(config):
        if name not in packed:
            yield name, tensors[name].to(torch.float32 if kept_in_float32(name) else dtype)
            continue
        p = packed[name]
        qweight, scale = tensors[p.qweight_name], tensors[p.scale_name]
        check_dtype(p.qweight_name, qweight.dtype, "the INT4 checkpoint")
        check_dtype(p.scale_name, scale.dtype, "the INT4 checkpoint")
        yield name, _dequantize_packed(qweight, scale, p, dtype)


def _dequantize_packed(qweight: torch.Tensor, scale: torch.Tensor, p: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight in `dtype`, computed in parts of its first axis, so that no float32 copy of it is in memory."""
    weight = torch.empty(p.shape, dtype=dtype, device=qweight.device)
    rows = max(1, CHUNK_VALUES * len(weight) // weight.numel())
    for q, s, out in zip(qweight.split(rows), scale.split(rows), weight.split(rows), strict=True):
        out.copy_(dequantize_int4(unpack_int4(q, p.dim), s, p.dim, p.group_size))
    return weight


def dequantize_state_dict(
    tensors: Mapping[str, torch.Tensor], config: MobileMoEConfig, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return all of `dequantize_tensors`; a missing, superfluous or misshaped tensor also raises a ValueError."""
    check_tensors({n: tuple(t.shape) for n, t in tensors.items()}, config, "the INT4 checkpoint")
    return dict(dequantize_tensors(tensors, config, dtype))
