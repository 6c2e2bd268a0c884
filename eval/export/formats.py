"""The export formats: one table, from which the command line derives its choices. Imports no torch.

A new format is a function (source, out, options) -> out in a file of its own and an entry in FORMATS.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eval.config import DeviceConfig, ExportConfig

if TYPE_CHECKING:
    from eval.export.source import Source


@dataclass(frozen=True)
class ExportOptions:
    """Everything besides the checkpoint that a format may depend on."""

    export: ExportConfig = field(default_factory=ExportConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass(frozen=True)
class ExportFormat:
    """One export format: its description and the function that writes it."""

    description: str
    write: Callable[["Source", Path, ExportOptions], Path]
    """Write the artifact's folder `out`, which appears when it is complete, and return it."""
    takes_device_options: bool = False
    """Whether `ExportOptions.device` matters to it."""


def _write_bf16(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.export.bf16 import export_bf16

    return export_bf16(source, out, max_shard_bytes=options.export.max_shard_bytes)


def _write_int4(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.export.int4 import export_int4

    return export_int4(source, out, max_shard_bytes=options.export.max_shard_bytes)


def _write_program(source: "Source", out: Path, options: ExportOptions) -> Path:
    from eval.device.executorch_export import export_moe
    from eval.device.weights import DeviceWeights

    return export_moe(DeviceWeights(source, options.device.expert_group_size), source.tokenizer, out, options.device)


FORMATS = {
    "bf16": ExportFormat("Hugging Face folder, bfloat16", _write_bf16),
    "int4": ExportFormat("Hugging Face folder, INT4 weights (mobilemoe-int4-g32)", _write_int4),
    "executorch": ExportFormat("ExecuTorch program for a phone", _write_program, takes_device_options=True),
}
