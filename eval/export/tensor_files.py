"""Reading the safetensors files and config.json of a Hugging Face folder, each tensor when it is asked for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from core.errors import RefusedInput, refuse_value_errors
from eval.hf_mobilemoe.checkpoint_mobilemoe import check_dtype, check_tensors
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.loading_mobilemoe import open_file, read_index, remove_tied_head


def read_config(folder: Path) -> MobileMoEConfig:
    """Return config.json of a local folder, as our own class whatever code lies beside it.

    Raises:
        RefusedInput: there is none, it is no JSON object, lacks a key or has a value that MobileMoE does not.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise RefusedInput(f"{folder} has no config.json; it is not a Hugging Face checkpoint")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise RefusedInput(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise RefusedInput(f"{path} is {type(values).__name__} and not a JSON object; copy it again")
    with refuse_value_errors():
        return MobileMoEConfig.from_dict(values, name_or_path=str(folder))


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of a local folder's safetensors files; each is read when it is asked for, and not kept.

    Raises:
        RefusedInput: a file is missing, cut short or no safetensors file, or the index or the head is not as it must
            be; when a tensor is read, its dtype is wrong or a value is not finite.
    """

    def __init__(self, folder: Path):
        index = Path(folder) / SAFE_WEIGHTS_INDEX_NAME
        with refuse_value_errors():
            files = read_index(index) if index.is_file() else {SAFE_WEIGHTS_NAME: []}
            shards = {Path(folder) / name: open_file(Path(folder) / name, names) for name, names in files.items()}
            self._files = {name: path for path, shard in shards.items() for name in shard.keys()}  # noqa: SIM118
            self._shards = {name: shards[path] for name, path in self._files.items()}
            self._shards = remove_tied_head(self._shards, self.__getitem__, folder)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._shards[name].get_tensor(name)
        with refuse_value_errors():
            check_dtype(name, tensor.dtype, self._files[name])
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RefusedInput(
                f"{self._files[name]}: {name} holds NaN or infinite values; the checkpoint is not usable"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every name and shape, from the files' headers alone."""
        return {name: tuple(shard.get_slice(name).get_shape()) for name, shard in self._shards.items()}


def open_tensor_files(folder: Path, config: MobileMoEConfig) -> TensorFiles:
    """Return the tensors of a Hugging Face folder, which are those that `config` describes.

    Raises:
        RefusedInput: they are incomplete or damaged.
    """
    tensors = TensorFiles(folder)
    with refuse_value_errors():
        check_tensors(tensors.shapes(), config, str(folder))
    return tensors
