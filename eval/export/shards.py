"""This module writes safetensors files tensor by tensor, so that no more than one tensor of a folder is in memory.

The bytes are those of `safetensors.torch.save_file` with all tensors of the file at once.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from core.atomic import write_json
from core.errors import RefusedInput, refuse_value_errors
from eval.export.tensor_layout import TensorSpec
from eval.hf_mobilemoe.checkpoint_mobilemoe import check_shapes
from eval.hf_mobilemoe.tensors_mobilemoe import is_finite

_DTYPES = {
    torch.int64: "I64", torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.uint8: "U8",
}  # fmt: skip
"""Dtypes of our formats and their names in a header, in the order in which safetensors sorts the tensors of a file."""
_ALIGNMENT = 8
"""The header's length in bytes is a multiple of this."""


class SafetensorsFile:
    """A safetensors file whose tensors are written one by one, in any order, each at its place."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]):
        """Write the header.

        Args:
            specs: name -> dtype and shape of every tensor of the file.
            metadata: texts that the header holds, too.
        """
        self._path, self._places = path, dict[str, int]()
        ranks = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name in sorted(specs, key=lambda name: (ranks[specs[name].dtype], name)):
            spec, self._places[name] = specs[name], end
            end += spec.nbytes
            header[name] = {
                "dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [self._places[name], end],
            }  # fmt: skip
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        path.write_bytes(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the values of a tensor, which has the dtype and shape that were given for it."""
        # Opened anew, because a folder may have more files than a process may hold open.
        with self._path.open("r+b", buffering=0) as file:
            file.seek(self._start + self._places[name])
            left = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
            while left:  # one call writes 2 GiB at most
                left = left[file.write(left) :]


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]],
    layout: Mapping[str, TensorSpec],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Write every tensor of a folder when it comes, into files of at most `max_shard_bytes`, and their index.

    A larger tensor gets a file of its own.

    Args:
        tensors: names and values, in any order.
        layout: name -> dtype and shape of all tensors, in the order in which they fill the files.

    Raises:
        RefusedInput: a tensor is missing, is not one of the model's, or holds a value that is not finite.
    """
    files = _start_files(layout, folder, max_shard_bytes)
    written: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors:
        assert name not in written, f"{name} came twice"
        if name not in layout or tuple(tensor.shape) != layout[name].shape:
            rule = f"expected {list(layout[name].shape)}" if name in layout else "is not a tensor of this model"
            raise RefusedInput(f"{name} {list(tensor.shape)}: {rule}")
        assert tensor.dtype == layout[name].dtype, f"{name} is {tensor.dtype}, planned was {layout[name].dtype}"
        if tensor.is_floating_point() and not is_finite(tensor):
            raise RefusedInput(f"{name} holds NaN or infinite values; the checkpoint it comes from is not usable")
        files[name].write(name, tensor)
        written[name] = tuple(tensor.shape)
        del tensor  # before the next one is read
    with refuse_value_errors():
        check_shapes(written, {name: spec.shape for name, spec in layout.items()}, "the exported state dict")


def _start_files(layout: Mapping[str, TensorSpec], folder: Path, max_shard_bytes: int) -> dict[str, SafetensorsFile]:
    """Write the headers of all files, and the index where there are several; return name -> file."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, spec in layout.items():
        if shards[-1] and shard_bytes + spec.nbytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += spec.nbytes
    n = len(shards)
    paths = [SAFE_WEIGHTS_NAME] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    if n > 1:
        weight_map = {name: path for path, names in zip(paths, shards, strict=True) for name in names}
        total_bytes = sum(spec.nbytes for spec in layout.values())
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    files: dict[str, SafetensorsFile] = {}
    for path, names in zip(paths, shards, strict=True):
        file = SafetensorsFile(folder / path, {name: layout[name] for name in names}, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    return files
