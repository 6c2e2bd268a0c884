"""A released-format folder, BF16 or INT4, as a DCP checkpoint that a training stage starts from.

Beside the weights it keeps what a way back needs: config.json, the tokenizer, and the scales of an INT4 checkpoint.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from core.errors import RefusedInput
from eval.export.dimensions import dims_from_config
from eval.export.hf import TensorFiles, read_config
from eval.export.int4 import store_scales
from eval.hf_mobilemoe.checkpoint_mobilemoe import check_tensors, dequantize_tensors
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from titan_ext.config import ModelDims
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def import_folder(folder: Path, out: Path) -> ModelDims:
    """Write the weights of `folder` as a DCP checkpoint (model only, float32) and return its dimensions.

    `open_tensors` reads it again, so that `quantize_folder` and `bf16_folder` take it like a Hugging Face folder.
    Reads one tensor at a time, so that beside the float32 model only one of them is in memory. INT4 weights become the
    numbers they stand for.

    Raises:
        RefusedInput: `folder` is no complete checkpoint (tensor and expectation are named), or `out` exists.
    """
    if out.exists():
        raise RefusedInput(f"{out} exists; name a folder that does not")
    config = read_config(folder)
    tensors = TensorFiles(folder)
    check_tensors(tensors.shapes(), config, str(folder))
    dims = dims_from_config(config)
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
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dcp.save(state, checkpoint_id=partial, no_dist=True)
    _keep_the_rest(folder, config, tensors, partial)
    os.replace(partial, out)
    return dims


def _keep_the_rest(folder: Path, config: MobileMoEConfig, tensors: TensorFiles, out: Path) -> None:
    """What the folder says of an unquantized checkpoint, its tokenizer if it has one, and its scales if it is INT4."""
    values = json.loads((folder / "config.json").read_text())
    values.pop("quantization", None)
    # The code is not copied.
    values.pop("auto_map", None)
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if config.quantization is not None:
        store_scales(tensors, config, out)
