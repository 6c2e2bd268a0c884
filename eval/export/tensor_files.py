"""Reading config.json and the safetensors files of a Hugging Face folder, with errors as the command shows them.

`eval.hf_mobilemoe` does the reading, for `from_pretrained` and for this project alike.
"""

from pathlib import Path
from typing import Any

import torch

from core.errors import RefusedInput, refuse_value_errors
from eval.export import glm4_moe
from eval.hf_mobilemoe import tensors_mobilemoe
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.folder_mobilemoe import check_folder, read_json
from eval.hf_mobilemoe.spellings_mobilemoe import ARCHITECTURES


def read_config(folder: Path) -> MobileMoEConfig:
    """Return config.json of a local folder, as our own class whatever code lies beside it, or a `glm4_moe`'s.

    Raises:
        RefusedInput: there is none, it is no JSON object, lacks a key or has a value that MobileMoE does not, or
            another file of the folder states something else.
    """
    with refuse_value_errors():
        config = MobileMoEConfig.from_dict(read_config_values(folder), name_or_path=str(folder))
        check_folder(folder)
    return config


def read_config_values(folder: Path) -> dict[str, Any]:
    """Return the content of config.json, with MobileMoE's keys if it is a `glm4_moe`'s.

    Raises:
        RefusedInput: there is none, it is no JSON object, or a `glm4_moe` that computes something else.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise RefusedInput(f"{folder} has no config.json; it is not a Hugging Face checkpoint")
    with refuse_value_errors():
        values = read_json(path)
        if values.get("model_type") != glm4_moe.MODEL_TYPE:
            return values
        try:
            return glm4_moe.translate_config(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def check_config(folder: Path) -> None:
    """Read config.json strictly, and with `read_config` if it is MobileMoE's; other models have their own rules.

    Raises:
        RefusedInput: it is no JSON object, or as `read_config`.
    """
    with refuse_value_errors():
        values = read_json(Path(folder) / "config.json")
    is_ours = values.get("model_type") == MobileMoEConfig.model_type
    if is_ours or not set(ARCHITECTURES).isdisjoint(values.get("architectures") or []):
        read_config(folder)


class TensorFiles(tensors_mobilemoe.TensorFiles):
    """The tensors of a local folder's safetensors files; each is read when it is asked for, and not kept.

    Raises:
        RefusedInput: where the class that it extends raises ValueError.
    """

    def __init__(self, folder: Path):
        with refuse_value_errors():
            super().__init__(folder)

    def __getitem__(self, name: str) -> torch.Tensor:
        with refuse_value_errors():
            return super().__getitem__(name)


def open_tensor_files(folder: Path, config: MobileMoEConfig) -> "TensorFiles | glm4_moe.NativeTensors":
    """Return the tensors of a Hugging Face folder, which are those that `config` describes, by MobileMoE's names.

    Raises:
        RefusedInput: they are incomplete or damaged.
    """
    tensors = TensorFiles(folder)
    with refuse_value_errors():
        if read_json(Path(folder) / "config.json").get("model_type") == glm4_moe.MODEL_TYPE:
            return glm4_moe.NativeTensors(tensors, config)
        tensors.check_description(config)
    return tensors


def check_checkpoint(folder: Path) -> MobileMoEConfig:
    """Read a Hugging Face folder once, all values included, and return its config.

    Raises:
        RefusedInput: `from_pretrained`, import and export would refuse it.
    """
    config = read_config(folder)
    with refuse_value_errors():
        open_tensor_files(folder, config).check_values()
    return config
