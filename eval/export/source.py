"""Opening a checkpoint to export: one of a run, a Hugging Face folder, or an imported one, all in one form."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.run_folder import find_run
from eval.export.dimensions import config_from_dims, dims_from_config, int4_layout
from eval.export.stored_scales import StoredScales, read_stored_scales
from eval.export.tensor_files import open_tensor_files, read_config
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from titan_ext.config import ModelDims
from titan_ext.quantization.config import QuantizationConfig


@dataclass(frozen=True)
class Source:
    """A checkpoint that any export format can be made from."""

    tensors: Mapping[str, torch.Tensor]
    """Tensors by the names of `checkpoint_shapes(config)`; a tensor may be read when it is asked for."""
    config: MobileMoEConfig
    """Architecture; with `quantization` if the tensors are INT4."""
    tokenizer: Path
    """Folder of the Hugging Face tokenizer."""
    layout: dict[str, Any] | None = None
    """INT4 layout (config.json's `quantization`) to round to; None leaves the choice to `stored` or the default."""
    origin: str = "a checkpoint"
    """Run and place in it, or name of the folder, for people; no path of this machine."""
    stored: StoredScales | None = None
    """INT4 grid that the float tensors lie on, if they came from INT4."""

    @property
    def is_int4(self) -> bool:
        """Whether the tensors are INT4 values and scales."""
        return self.config.quantization is not None

    def scales_for(self, layout: dict[str, Any]) -> Mapping[str, torch.Tensor] | None:
        """Return the stored scales if they are of this INT4 layout, else None."""
        return self.stored.tensors if self.stored is not None and self.stored.layout == layout else None


def open_folder(folder: Path) -> Source:
    """Open a Hugging Face folder, INT4 or not, or a checkpoint that `mobilemoe import` wrote.

    Raises:
        RefusedInput: no complete checkpoint there, or a damaged one.
    """
    config = read_config(folder)
    if (folder / ".metadata").is_file():
        from eval.export.dcp_checkpoint import CheckpointTensors  # imports torchtitan, which other folders do not need

        tensors: Mapping[str, torch.Tensor] = CheckpointTensors(folder, dims_from_config(config))
    else:
        tensors = open_tensor_files(folder, config)
    stored = read_stored_scales(folder, config)
    return Source(tensors, config, folder, origin=_describe_origin(folder), stored=stored)


def open_run_checkpoint(
    checkpoint: Path, dims: ModelDims, tokenizer: Path, quantization: QuantizationConfig, precision: str
) -> Source:
    """Open a step folder of a run.

    Args:
        quantization: groups of the run's recipe, which INT4 exports take.
        precision: dtype in which the stage saw its weights (`ParallelConfig.precision`).

    Raises:
        RefusedInput: no finished checkpoint there, or it is of a model with other dimensions.
    """
    from eval.export.dcp_checkpoint import read_trained_weights

    tensors = read_trained_weights(checkpoint, dims, precision)
    config = config_from_dims(dims)
    config.dtype = torch.bfloat16  # what `dtype="auto"` loads: without it an INT4 folder would be read as float32
    return Source(tensors, config, tokenizer, layout=int4_layout(quantization), origin=_describe_origin(checkpoint))


def _describe_origin(checkpoint: Path) -> str:
    """Return a checkpoint's path from its run on; outside of a run, its name."""
    path = checkpoint.absolute()
    run = find_run(path)
    return path.name if run is None else f"{run.name}/{path.relative_to(run)}"
