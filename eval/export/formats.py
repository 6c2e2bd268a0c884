"""The export formats: one table, from which the command line derives its choices. Imports no torch.

A new format is a function (source, out, options) -> out in a file of its own and an entry in FORMATS.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eval.config import DeviceConfig, ExportConfig, GgufConfig
from eval.export.limits import (
    explain_block_misfit,
    explain_mlx_misfit,
    explain_native_misfit,
    explain_packed_native_misfit,
)
from titan_ext.config import ModelDims
from titan_ext.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    from eval.export.source import Source


@dataclass(frozen=True)
class ExportOptions:
    """Everything besides the checkpoint that a format may depend on."""

    export: ExportConfig = field(default_factory=ExportConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    gguf: GgufConfig = field(default_factory=GgufConfig)


@dataclass(frozen=True)
class ExportFormat:
    """One export format: its description and the function that writes it."""

    description: str
    write: Callable[["Source", Path, ExportOptions], Path]
    """Write the artifact's folder `out`, which appears when it is complete, and return it."""
    artifact: str
    """Folder below a run's artifacts/."""
    of: str
    """Artifact that a run makes it from; empty for a checkpoint."""
    explain_misfit: Callable[[ModelDims, QuantizationConfig], str] = lambda model, quantization: ""
    """Return why the format cannot hold such a model, or an empty text."""
    own_options: str = ""
    """Field of `ExportOptions` that this format alone reads."""


def _write_bf16(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.export.bf16 import export_bf16

    return export_bf16(source, out, max_shard_bytes=options.export.max_shard_bytes)


def _write_int4(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.export.int4 import export_int4

    return export_int4(source, out, max_shard_bytes=options.export.max_shard_bytes)


def _write_native(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.export.hf_native import export_native

    return export_native(source, out)


def _write_gguf(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.export.gguf_file import export_gguf

    return export_gguf(source, out, options.gguf)


def _write_mlx(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.export.mlx_folder import export_mlx

    return export_mlx(source, out)


def _write_compressed_tensors(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.export.compressed_tensors import export_compressed_tensors

    return export_compressed_tensors(source, out)


def _write_program(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.device.executorch_export import export_moe
    from eval.device.weights import DeviceWeights

    return export_moe(DeviceWeights(source, options.device.expert_group_size), source.tokenizer, out, options.device)


FORMATS = {
    "bf16": ExportFormat("Hugging Face folder, bfloat16", _write_bf16, "bf16", ""),
    "int4": ExportFormat("Hugging Face folder, INT4 weights (mobilemoe-int4-g32)", _write_int4, "int4", ""),
    "hf-native": ExportFormat(
        "Hugging Face folder that stock transformers opens (glm4_moe), bfloat16", _write_native, "bf16-native", "bf16",
        explain_native_misfit,
    ),
    "gguf": ExportFormat(
        "GGUF file for llama.cpp", _write_gguf, "gguf", "int4", explain_block_misfit, own_options="gguf"
    ),
    "compressed-tensors": ExportFormat(
        "Hugging Face folder for vLLM and SGLang (glm4_moe), INT4", _write_compressed_tensors, "int4-native", "int4",
        explain_packed_native_misfit,
    ),
    "mlx": ExportFormat("4-bit folder for mlx-lm", _write_mlx, "mlx", "int4", explain_mlx_misfit),
    "executorch": ExportFormat(
        "ExecuTorch program for a phone", _write_program, "program", "int4", explain_block_misfit, own_options="device"
    ),
}  # fmt: skip
PACKAGED = tuple(name for name, entry in FORMATS.items() if entry.of)
"""Formats that a run makes from its own artifacts."""
