"""The scales of an INT4 checkpoint beside the float weights that were made from it, for the way back to INT4.

q * scale has max|q| 7 or 8 in a group and not 7.5: scales derived from the floats would be others. float32 holds
q * scale exactly; bfloat16 rounds it once, by at most 2^-8 of its size and so by at most 1/32 of a quantization step:
the stored scales recover every q from either.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eval.hf_mobilemoe.checkpoint_mobilemoe import packed_tensors
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig

SCALES_FILE = "int4/scales.safetensors"
"""Path inside an artifact. It lies in a subfolder, so that readers of *.safetensors do not meet it."""


@dataclass(frozen=True)
class StoredScales:
    """The INT4 grid that a checkpoint's float weights lie on."""

    layout: dict[str, Any]
    """config.json's `quantization` of the INT4 checkpoint."""
    tensors: Mapping[str, torch.Tensor]
    """float16 scales by the names of the INT4 checkpoint."""


def collect_scales(tensors: Mapping[str, torch.Tensor], config: MobileMoEConfig) -> StoredScales:
    """Return the scales of an INT4 checkpoint's tensors."""
    assert config.quantization is not None, "the checkpoint is not quantized"
    names = [packed.scale_name for packed in packed_tensors(config, config.quantization).values()]
    return StoredScales(config.quantization, {name: tensors[name] for name in names})


def write_stored_scales(scales: StoredScales, folder: Path) -> None:
    """Write the scales into a folder that gets the weights as floats."""
    (folder / SCALES_FILE).parent.mkdir()
    metadata = {"format": "pt", "quantization": json.dumps(scales.layout, sort_keys=True)}
    save_file(dict(scales.tensors), folder / SCALES_FILE, metadata=metadata)


def read_stored_scales(folder: Path) -> StoredScales | None:
    """Return the scales beside a folder's float weights, None where there are none."""
    path = Path(folder) / SCALES_FILE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        layout = json.loads(file.metadata()["quantization"])
    return StoredScales(layout, load_file(path))
