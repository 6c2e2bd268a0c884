"""This module reads a DCP checkpoint of torchtitan tensor by tensor, without a process group or a GPU."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from core.checksums import CHECKSUMS, verify_checksums
from core.errors import RefusedInput
from eval.export.chunks import MAX_CHUNK_VALUES
from eval.hf_mobilemoe.checkpoint_mobilemoe import kept_in_float32
from titan_ext.config import ModelDims
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config


def is_dcp_checkpoint(folder: Path) -> bool:
    """Return whether the folder holds a finished DCP checkpoint; DCP writes its metadata last."""
    return (folder / ".metadata").is_file()


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """A checkpoint's tensors by released names, in float32; each is read when it is asked for, and not kept."""

    def __init__(self, checkpoint: Path, dims: ModelDims, precision: torch.dtype = torch.float32):
        """Read what the checkpoint says of itself, and compare it with the model.

        Args:
            checkpoint: a step folder written under any parallel layout.
            precision: dtype that every tensor is rounded to, and back to float32; except those of `kept_in_float32`.

        Raises:
            RefusedInput: no finished checkpoint there, or it is of a model with other dimensions.
            DamagedData: a file is missing or has changed since the checkpoint was written.
        """
        if not is_dcp_checkpoint(checkpoint):
            raise RefusedInput(
                f"{checkpoint}: no finished DCP checkpoint; expected a step folder with a .metadata file"
            )
        if (checkpoint / CHECKSUMS).is_file():  # one that `mobilemoe import` wrote has none
            verify_checksums(checkpoint)
        self._precision = precision
        config = model_config(dims)
        self._adapter = MobileMoEStateDictAdapter(config, None)
        with torch.device("meta"):
            state = config.build().state_dict()
        self._reader = dcp.FileSystemReader(checkpoint)
        # Kept, because that of a large run takes seconds to read: it lists the parts of all tensors and optimizer
        # states on every rank.
        self._index = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)
        _check_dimensions(checkpoint, self._index.state_dict_metadata, state, dims)
        self._meta: dict[str, torch.Tensor] = self._adapter.to_hf(state)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.empty_like(self._meta[name], device="cpu")
        parts = self._adapter.from_hf({name: tensor})  # views of it, into which the reader copies what it finds
        parts.pop("lm_head.weight", None)  # the embedding once more
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(parts, self._index, is_coordinator=True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        if not kept_in_float32(name):
            _round_in_place(tensor, self._precision)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._meta)

    def __len__(self) -> int:
        return len(self._meta)


def _check_dimensions(
    checkpoint: Path, stored: Mapping[str, Any], state: Mapping[str, torch.Tensor], dims: ModelDims
) -> None:
    """Compare the names and shapes that a checkpoint's metadata has with those of the model.

    Raises:
        RefusedInput: they differ.
    """
    for name, expected in state.items():
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


def _round_in_place(tensor: torch.Tensor, precision: torch.dtype) -> None:
    if precision != tensor.dtype:
        for part in tensor.view(-1).split(MAX_CHUNK_VALUES):
            part.copy_(part.to(precision))


def read_trained_weights(checkpoint: Path, dims: ModelDims, precision: str) -> CheckpointTensors:
    """Return the weights as the stage's forward pass saw them, in float32 by released names.

    The INT4 grid of quantization-aware training is that of the weights rounded to the training precision, not of the
    float32 master weights: rounding moves some of them, and some scales, to the neighbouring value.

    Args:
        precision: name of the dtype in which the stage saw its weights (`ParallelConfig.precision`).

    Raises:
        RefusedInput: as `CheckpointTensors`.
    """
    return CheckpointTensors(checkpoint, dims, getattr(torch, precision))
