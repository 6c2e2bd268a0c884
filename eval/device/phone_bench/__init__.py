"""This package measures a MobileMoE's decoder on a phone, with one static program and one file.

The program (device_bench.cpp and the headers beside it) has our tile kernels and a forward pass around them, and needs
neither ExecuTorch nor any library of the phone. A model file has 4,096 bytes of text, one line for each number of the
shape, and then the packed weights in the order of `list_tensors`. A file that ends after the text is a shape alone; the
program then fills memory with random weights.

    python -m eval.device.phone_bench build --out DIR [--compiler COMPILER]
    python -m eval.device.phone_bench weights FOLDER --out FILE
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from core.atomic import atomic_write, write_bytes
from core.errors import RefusedInput
from eval.device import expert_op
from eval.device.compiler import compile_file
from eval.device.expert_blobs import pack_blobs
from eval.device.weights import DeviceWeights
from eval.export.dimensions import config_from_dims
from eval.export.source import Source
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.modeling_mobilemoe import rotary_frequencies
from titan_ext.config import FLAVORS
from titan_ext.quantization.config import QuantizationConfig

SOURCE = Path(__file__).with_name("device_bench.cpp")
ARM_COMPILER = "aarch64-linux-gnu-g++"
SHAPE_BYTES, ALIGNMENT = 4096, 64
"""Size of the text in front, and of the steps at which tensors begin, as in model_file.h."""


def build(out: Path, compiler: str = ARM_COMPILER) -> None:
    """Compile the static program into `out`/device_bench, and write `out`/FLAVOR.model, a shape each.

    Raises:
        RefusedInput: the compiler is not there, or it fails.
    """
    flags = [*expert_op.ARITHMETIC_FLAGS, "-static", "-pthread", f"-I{expert_op.SOURCES[0].parent}", str(SOURCE)]
    advice = "apt-get install g++-aarch64-linux-gnu, or name another one (docs/on_device.md)"
    compile_file(compiler, flags, out / "device_bench", what="the phone's benchmark", advice=advice)
    groups = QuantizationConfig().group_size
    for name, dims in FLAVORS.items():
        write_bytes(out / f"{name}.model", describe_shape(config_from_dims(dims), groups, groups, groups))


def describe_shape(
    config: MobileMoEConfig, group_size: int, embedding_group_size: int, expert_group_size: int
) -> bytes:
    """Return the first `SHAPE_BYTES` bytes of a model file: names and numbers, and zeros.

    Raises:
        RefusedInput: a matrix has no whole number of groups, or the model has more frequencies than fit.
    """
    for name, width, size in (
        ("hidden_size", config.hidden_size, group_size),
        ("hidden_size", config.hidden_size, embedding_group_size),
        ("hidden_size", config.hidden_size, expert_group_size),
        ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim, group_size),
        ("intermediate_size_mlp", config.intermediate_size_mlp, group_size),
        ("intermediate_size", config.intermediate_size, expert_group_size),
    ):
        if size % 32 or width % size:
            raise RefusedInput(
                f"{name} is {width} and its group {size}: the kernels take whole groups, multiples of 32. "
                "Quantize with a group size that divides it"
            )
    numbers = {
        "d_model": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim,
        "expert_hidden": config.intermediate_size, "shared_hidden": config.intermediate_size_mlp,
        "n_experts": config.num_local_experts, "top_k": config.num_experts_per_tok, "vocab_size": config.vocab_size,
        "group_size": group_size, "embedding_group_size": embedding_group_size,
        "expert_group_size": expert_group_size, "norm_eps": config.rms_norm_eps,
        "route_scale": config.routed_scaling_factor,
        "rope_frequencies": " ".join(f"{f:.9g}" for f in rotary_frequencies(config).tolist()),
    }  # fmt: skip
    text = "".join(f"{line}\n" for line in ("mobilemoe-phone-bench 1", *(f"{k} {v}" for k, v in numbers.items())))
    if len(text) >= SHAPE_BYTES:
        raise RefusedInput(f"head_dim is {config.head_dim}: its frequencies do not fit into {SHAPE_BYTES} bytes")
    return text.encode().ljust(SHAPE_BYTES, b"\0")


def write_model(source: Source, out: Path) -> None:
    """Write a checkpoint as a model file, tensor by tensor.

    Raises:
        RefusedInput: the checkpoint has a dimension, a layout or a routing that the kernels cannot take.
    """
    weights = DeviceWeights(source)
    layout = weights.layout
    shape = describe_shape(
        weights.config, layout["group_size"], layout["embedding_group_size"], weights.expert_group_size
    )
    with atomic_write(out) as partial, partial.open("wb") as file:
        file.write(shape)
        for tensor in list_tensors(weights):
            _write_aligned(file, tensor)


def _write_aligned(file: BinaryIO, tensor: torch.Tensor) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    file.write(tensor.contiguous().numpy().tobytes())


def list_tensors(weights: DeviceWeights) -> Iterator[torch.Tensor]:
    """Give the tensors of a model file in their order, packed (uint8) or float32."""

    def pack(*names: str) -> torch.Tensor:
        values, scales = zip(*(weights.read_matrix(name) for name in names), strict=True)
        return pack_blobs(torch.cat(values)[None], torch.cat(scales)[None])

    yield pack("model.embed_tokens.weight")
    yield weights.read_unquantized("model.norm.weight")
    for i in range(weights.config.num_hidden_layers):
        attention, ffn = f"model.layers.{i}.self_attn", f"model.layers.{i}.feed_forward"
        yield weights.read_unquantized(f"model.layers.{i}.input_layernorm.weight")
        yield weights.read_unquantized(f"model.layers.{i}.post_attention_layernorm.weight")
        yield pack(*(f"{attention}.{p}_proj.weight" for p in "qkv"))
        yield pack(f"{attention}.o_proj.weight")
        yield weights.read_unquantized(f"{ffn}.router.weight")
        yield weights.read_unquantized(f"{ffn}.expert_bias")
        yield pack(*(f"{ffn}.shared_expert.{p}_proj.weight" for p in ("gate", "up")))
        yield pack(f"{ffn}.shared_expert.down_proj.weight")
        yield pack_blobs(*weights.read_expert_matrices(f"{ffn}.experts.gate_up_proj"))
        yield pack_blobs(*weights.read_expert_matrices(f"{ffn}.experts.down_proj"))
