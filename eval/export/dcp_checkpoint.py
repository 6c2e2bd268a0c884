"""Reading a DCP checkpoint of torchtitan, without a process group or a GPU."""

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from core.errors import RefusedInput
from eval.hf_mobilemoe.checkpoint_mobilemoe import kept_in_float32
from titan_ext.config import ModelDims
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config


def is_dcp_checkpoint(folder: Path) -> bool:
    """Return whether the folder holds a finished DCP checkpoint; DCP writes its metadata last."""
    return (folder / ".metadata").is_file()


def read_checkpoint(checkpoint: Path, dims: ModelDims) -> dict[str, torch.Tensor]:
    """Return the model's tensors by released names, in the float32 of the master weights.

    Args:
        checkpoint: a step folder written under any parallel layout.

    Raises:
        RefusedInput: no finished checkpoint there, or it is of a model with other dimensions.
    """
    if not is_dcp_checkpoint(checkpoint):
        raise RefusedInput(f"{checkpoint}: no finished DCP checkpoint; expected a step folder with a .metadata file")
    config = model_config(dims)
    with torch.device("meta"):
        shapes = config.build().state_dict()
    # Any: torch types an entry as that of a tensor or of bytes, and the model has tensors only.
    stored: dict[str, Any] = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for name, expected in shapes.items():
        if name not in stored:
            raise RefusedInput(f"{checkpoint}: tensor {name} is missing; the checkpoint is of another model")
        if stored[name].size != expected.shape:
            raise RefusedInput(
                f"{checkpoint}: {name} is {list(stored[name].size)}, the model's dimensions make it "
                f"{list(expected.shape)}; give the dimensions the checkpoint was trained with"
            )
    layers = {int(match[1]) for name in stored if (match := re.match(r"layers\.(\d+)\.", name))}
    if max(layers) >= dims.n_layers:
        raise RefusedInput(
            f"{checkpoint}: it has layer {max(layers)}, the model's dimensions have {dims.n_layers} layers; give the "
            "dimensions the checkpoint was trained with"
        )
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in shapes.items()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return MobileMoEStateDictAdapter(config, None).to_hf(state)


def read_trained_weights(checkpoint: Path, dims: ModelDims, precision: str) -> dict[str, torch.Tensor]:
    """Return the weights as the stage's forward pass saw them, in float32 by released names.

    The INT4 grid of quantization-aware training is that of the weights rounded to the training precision, not of the
    float32 master weights: rounding moves some of them, and some scales, to the neighbouring value.

    Args:
        precision: name of the dtype in which the stage saw its weights (`ParallelConfig.precision`).

    Raises:
        RefusedInput: as `read_checkpoint`.
    """
    dtype = getattr(torch, precision)
    return {
        name: tensor if kept_in_float32(name) else tensor.to(dtype).float()
        for name, tensor in read_checkpoint(checkpoint, dims).items()
    }
