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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from core.errors import RefusedInput
from eval.hf_mobilemoe.checkpoint_mobilemoe import PackedTensor, packed_tensors
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


def read_stored_scales(folder: Path, config: MobileMoEConfig) -> StoredScales | None:
    """Return the scales beside a folder's float weights, None where there are none.

    Args:
        config: configuration of the folder.

    Raises:
        RefusedInput: the folder is INT4 and has its scales already, or the file is damaged or of another model.
    """
    path = Path(folder) / SCALES_FILE
    if not path.is_file():
        return None
    if config.quantization is not None:
        raise RefusedInput(f"{path} lies beside weights that are INT4 and have scales; remove the file")
    try:
        with safe_open(path, framework="pt") as file:
            layout = json.loads(file.metadata()["quantization"])
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RefusedInput(f"{path} is damaged ({error!r}); copy the folder again, or remove the file") from error
    expected = {p.scale_name: p.packed_shapes()[p.scale_name] for p in _describe_packed(config, layout, path)}
    found = {name: tuple(scale.shape) for name, scale in tensors.items()}
    if found != expected:
        different = sorted({*found.items()} ^ {*expected.items()})[0][0]
        raise RefusedInput(
            f"{path} has {found.get(different, 'no shape')} for {different}, config.json makes it "
            f"{expected.get(different, 'none')}; it is of another model: remove the file"
        )
    for name, scale in tensors.items():
        if scale.dtype != torch.float16 or not scale.isfinite().all():
            raise RefusedInput(f"{path}: {name} is {scale.dtype} or not finite; remove the file")
    return StoredScales(layout, tensors)


def _describe_packed(config: MobileMoEConfig, layout: dict[str, Any], path: Path) -> list[PackedTensor]:
    """Return the packed weights of an INT4 layout that a file states."""
    try:
        described = MobileMoEConfig.from_dict(config.to_dict() | {"quantization": layout})
        return list(packed_tensors(described, described.quantization).values())
    except ValueError as error:
        raise RefusedInput(f"{path}: {error}; remove the file") from error
