"""From a run's DCP checkpoint to a Hugging Face folder, bf16 or INT4, without a process group or a GPU."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from core.errors import RefusedInput
from eval.config import ExportConfig
from eval.device.weights import DeviceWeights
from eval.export.dimensions import config_from_dims
from eval.export.hf import write_hf_folder
from eval.export.int4 import layout_of, write_int4_folder
from eval.hf_mobilemoe.checkpoint_mobilemoe import kept_in_float32
from titan_ext.config import ModelDims
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config


def read_checkpoint(checkpoint: Path, model: ModelDims) -> dict[str, torch.Tensor]:
    """The model's tensors by released names, in the float32 of the master weights.

    Args:
        checkpoint: a step folder written under any parallel layout.

    Raises:
        RefusedInput: no finished checkpoint there, or it is of a model with other dimensions.
    """
    if not (checkpoint / ".metadata").exists():
        raise RefusedInput(f"{checkpoint}: no finished DCP checkpoint; expected a step folder with a .metadata file")
    config = model_config(model)
    with torch.device("meta"):
        shapes = config.build().state_dict()
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for name, expected in shapes.items():
        if name not in stored:
            raise RefusedInput(f"{checkpoint}: tensor {name} is missing; the checkpoint is of another model")
        if stored[name].size != expected.shape:
            raise RefusedInput(
                f"{checkpoint}: {name} is {list(stored[name].size)}, the model's dimensions make it "
                f"{list(expected.shape)}; give the dimensions the checkpoint was trained with"
            )
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in shapes.items()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return MobileMoEStateDictAdapter(config, None).to_hf(state)


def export_bf16(checkpoint: Path, model: ModelDims, tokenizer: Path, out: Path, config: ExportConfig) -> Path:
    """Write the bf16 folder of a checkpoint; see `write_hf_folder`."""
    return write_hf_folder(
        read_checkpoint(checkpoint, model), model, tokenizer, out, max_shard_bytes=config.max_shard_bytes
    )


def export_int4(
    checkpoint: Path, model: ModelDims, tokenizer: Path, out: Path, config: ExportConfig, precision: str
) -> Path:
    """Write the INT4 folder of a checkpoint: of a QAT stage, exactly the weights that its forward pass used.

    Args:
        precision: dtype in which the stage saw its weights (`ParallelConfig.precision`): the grid is that of the
            weights rounded to it, not of the float32 masters.
    """
    return write_int4_folder(_seen(checkpoint, model, precision).items(), model, tokenizer, out, config)


def device_weights(
    checkpoint: Path, model: ModelDims, config: ExportConfig, precision: str, expert_group_size: int | None
) -> DeviceWeights:
    """The weights of a checkpoint for the device program, on the grid that `export_int4` writes."""
    layout = layout_of(config)
    tensors = _seen(checkpoint, model, precision)
    return DeviceWeights(tensors, config_from_dims(model), layout=layout, expert_group_size=expert_group_size)


def _seen(checkpoint: Path, model: ModelDims, precision: str) -> dict[str, torch.Tensor]:
    """The weights as the stage's forward pass saw them, in float32."""
    return {
        name: tensor if kept_in_float32(name) else tensor.to(getattr(torch, precision)).float()
        for name, tensor in read_checkpoint(checkpoint, model).items()
    }
