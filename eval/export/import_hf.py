"""Importing a released-format folder, BF16 or INT4, as a DCP checkpoint that a training stage starts from.

Beside the weights the checkpoint keeps what an export needs: config.json, the tokenizer, and the scales of an INT4
checkpoint.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from core.atomic import atomic_write, write_json
from core.errors import RefusedInput, refuse_value_errors
from eval.export.dimensions import dims_from_config
from eval.export.stored_scales import collect_scales, read_stored_scales, write_stored_scales
from eval.export.tensor_files import open_tensor_files, read_config, read_config_values
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_tensors
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from titan_ext.config import ModelDims
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def import_folder(folder: Path, out: Path) -> ModelDims:
    """Write the weights of `folder` as a DCP checkpoint (model only, float32) and return its dimensions.

    `eval.export.source.open_folder` reads it like a Hugging Face folder. Reads one tensor at a time, so that beside
    the float32 model only one of them is in memory. INT4 weights become the numbers they stand for.

    Raises:
        RefusedInput: `folder` is no complete checkpoint (tensor and expectation are named), or `out` exists.
    """
    if out.exists():
        raise RefusedInput(f"{out} exists; name a folder that does not")
    config = read_config(folder)
    tensors = open_tensor_files(folder, config)
    dims = dims_from_config(config)
    with refuse_value_errors():
        state = _read_state(tensors, config, dims)
    with atomic_write(out) as partial:
        dcp.save(state, checkpoint_id=partial, no_dist=True)
        _copy_description(folder, config, tensors, partial)
    return dims


def _read_state(
    tensors: Mapping[str, torch.Tensor], config: MobileMoEConfig, dims: ModelDims
) -> dict[str, torch.Tensor]:
    """Return torchtitan's state dict, float32, filled tensor by tensor."""
    model = model_config(dims)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in model.build().state_dict().items()}
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    adapter = MobileMoEStateDictAdapter(model, None)
    stream = tensors.items() if config.quantization is None else dequantize_tensors(tensors, config)
    missing = set(state)
    for hf_name, tensor in stream:
        for name, part in adapter.from_hf({hf_name: tensor}).items():
            state[name].copy_(part)
            missing.remove(name)
    assert not missing, f"the released format has no {sorted(missing)}"
    return state


def _copy_description(folder: Path, config: MobileMoEConfig, tensors: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write the config of an unquantized checkpoint, the tokenizer if there is one, and the scales of an INT4 grid."""
    values = read_config_values(folder)
    values.pop("quantization", None)
    # The code that it names is not copied.
    values.pop("auto_map", None)
    write_json(out / "config.json", values)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    stored = read_stored_scales(folder, config)
    if config.quantization is not None:
        stored = collect_scales(tensors, config)
    if stored is not None:
        write_stored_scales(stored, out)
