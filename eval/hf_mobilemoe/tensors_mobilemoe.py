"""This module reads the safetensors files of a folder, each tensor when it is asked for; every export has a copy.

It compares what the files hold with what the index and config.json say of them. `from_pretrained`, import, export, the
device and the evaluation all open a folder here.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint_mobilemoe import check_dtype, check_shapes, checkpoint_shapes, kept_in_float32
from .configuration_mobilemoe import MobileMoEConfig
from .folder_mobilemoe import check_folder, read_index, read_json

_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
"""Name of a dtype in a safetensors header -> torch's."""

_HELD_BY = {
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
    torch.float32: (torch.float32,),
}
"""Dtype of a tensor -> dtypes that hold its values exactly."""


def open_checkpoint(folder: Path, config: MobileMoEConfig) -> "TensorFiles":
    """Return the tensors of a folder, which are those that its files and `config` describe; their values are not read.

    Raises:
        ValueError: the folder states a fact twice and differently, or tensors are missing, superfluous or misshaped.
    """
    check_folder(folder)
    tensors = TensorFiles(folder)
    tensors.check_description(config)
    return tensors


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of a local folder's safetensors files by the names of a causal model; none is kept.

    Raises:
        ValueError: a file is missing, cut short or no safetensors file, or the index or the head is not as it must be;
            when a tensor is read, its dtype is wrong or a value is not finite.
    """

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        index = self._folder / SAFE_WEIGHTS_INDEX_NAME
        self._index = read_index(index) if index.is_file() else None
        self._metadata = read_json(index)["metadata"] if index.is_file() else {}
        files = {SAFE_WEIGHTS_NAME: []} if self._index is None else self._index
        shards = {name: open_file(self._folder / name, names) for name, names in files.items()}
        self._places = [(name, file) for file, shard in shards.items() for name in shard.keys()]  # noqa: SIM118
        stored = dict(self._places)
        self._stored = {full_name(name, stored): name for name in stored}
        self._files = {name: self._folder / stored[self._stored[name]] for name in self._stored}
        self._all_shards = {name: shards[stored[self._stored[name]]] for name in self._stored}
        self._shards = remove_tied_head(self._all_shards, self.__getitem__, folder)

    def __getitem__(self, name: str) -> torch.Tensor:
        check_dtype(name, self._read_dtype(name), self._files[name])
        tensor = self._all_shards[name].get_tensor(self._stored[name])
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"{self._files[name]}: {name} holds NaN or infinite values; the checkpoint is not usable")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every name and shape, from the files' headers alone."""
        return {name: tuple(self._slice(name).get_shape()) for name in self._shards}

    def check_values(self) -> None:
        """Read every tensor once; raise ValueError if one holds a value that is not finite."""
        for name in self:
            self[name]

    def check_description(self, config: MobileMoEConfig) -> None:
        """Compare names, shapes and dtypes with those of `config` and of the index; raise ValueError if they differ."""
        self.check_content(checkpoint_shapes(config), config.quantization is not None, kept_in_float32)

    def check_content(
        self, expected: Mapping[str, tuple[int, ...]], quantized: bool, in_float32: Callable[[str], bool]
    ) -> None:
        """Compare names, shapes and dtypes with what is expected, and the files with their index.

        Args:
            expected: name -> shape.
            quantized: whether some of the tensors are packed integers and scales.
            in_float32: function that returns whether a tensor may be float32 in a model of any dtype.

        Raises:
            ValueError: they differ.
        """
        check_shapes(self.shapes(), expected, str(self._folder))
        dtypes = {name: self._read_dtype(name) for name in self}
        for name in self:
            check_dtype(name, dtypes[name], self._files[name])
        self._check_model_dtype(dtypes, quantized, in_float32)
        if self._index is not None:
            self._check_index(self._index)

    def _slice(self, name: str) -> Any:
        return self._all_shards[name].get_slice(self._stored[name])

    def _read_dtype(self, name: str) -> Any:
        """Return a torch.dtype, or the header's name of one that no checkpoint has; `check_dtype` refuses it."""
        code = self._slice(name).get_dtype()
        return _DTYPES.get(code, code)

    def _count_bytes(self, names: Iterable[str]) -> int:
        return sum(math.prod(self._slice(name).get_shape()) * self._read_dtype(name).itemsize for name in names)

    def _check_model_dtype(
        self, dtypes: Mapping[str, torch.dtype], quantized: bool, in_float32: Callable[[str], bool]
    ) -> None:
        """Refuse tensors that config.json's dtype, in which `dtype="auto"` loads them, does not hold exactly.

        The router's weight and the expert bias are float32 for every dtype. Where config.json has none, transformers
        takes that of the first tensor, so all must be of one.
        """
        path = self._folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        stated = config.get("dtype") or config.get("torch_dtype")
        of_index = self._metadata.get("dtype", stated)
        if of_index != stated:
            raise ValueError(f"{path} has dtype {stated} and {SAFE_WEIGHTS_INDEX_NAME} {of_index}; correct one of them")
        if stated is None and quantized:
            return  # loaded as float32
        model_dtype = getattr(torch, stated) if stated else dtypes["model.norm.weight"]
        for name, dtype in dtypes.items():
            if dtype == torch.uint8 or name.endswith("_scale"):
                continue
            exact = model_dtype in (_HELD_BY[dtype] if stated else (dtype,))
            if in_float32(name):
                exact = exact or stated is not None or dtype == torch.float32
            if not exact:
                other = f"dtype {stated}" if stated else f"no dtype, and model.norm.weight is {model_dtype}"
                raise ValueError(f"{self._files[name]}: {name} is {dtype}, {path} has {other}; correct one of them")

    def _check_index(self, index: Mapping[str, Sequence[str]]) -> None:
        """Compare the index with the files: transformers reads only what it names, other programs read all."""
        places = {name: file for file, names in index.items() for name in names}
        for name, file in self._places:
            if name.startswith("lm_head.") and name not in places:
                continue  # the embedding once more, which no reader needs
            if places.get(name) != file:
                raise ValueError(
                    f"{self._folder / file} holds {name}, but {SAFE_WEIGHTS_INDEX_NAME} says it is "
                    f"{'in ' + places[name] if name in places else 'in no file'}; copy the whole folder again"
                )
        sizes = {self._count_bytes(self), self._count_bytes(self._stored)}
        if (total := self._metadata.get("total_size")) is not None and total not in sizes:
            raise ValueError(
                f"{self._folder}/{SAFE_WEIGHTS_INDEX_NAME} has total_size {total}, the files hold {min(sizes)} bytes "
                "of tensors; the index is of other files: copy the whole folder again, or correct the number"
            )


def full_name(name: str, names: Iterable[str]) -> str:
    """Return a tensor's name in a causal model; a checkpoint of `MobileMoEModel` alone has names without "model."."""
    return name if any(other.startswith("model.") for other in names) else f"model.{name}"


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite, in one pass without a copy; the minimum and maximum keep NaN."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def open_file(path: str | Path, expected: Sequence[str]) -> Any:
    """Open a safetensors file; raise ValueError if it is missing, damaged or lacks one of the `expected` tensors."""
    content = f"; its index expects {_join_names(expected)} in it" if expected else ""
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; copy the whole folder again{content}") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again{content}") from error
    metadata = file.metadata()
    if metadata is not None and metadata.get("format") not in ("pt", "mlx"):
        raise ValueError(f"{path} has format {metadata.get('format')!r} in its metadata; torch's tensors have 'pt'")
    if absent := sorted(set(expected) - set(file.keys())):
        raise ValueError(
            f"{path} lacks {_join_names(absent)}, which its index expects in it; copy the whole folder again"
        )
    return file


def _join_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def remove_tied_head(found: dict[str, Any], read: Callable[[str], torch.Tensor], where: object) -> dict[str, Any]:
    """Return `found` without the output projection, if it equals the embedding bit for bit.

    Args:
        found: dict whose keys are tensor names.
        read: function that returns the tensor of a name.

    Raises:
        ValueError: the output projection differs from the embedding.
    """
    kept = dict(found)
    for head in [name for name in found if name.startswith("lm_head.")]:
        embedding = head.replace("lm_head.", "model.embed_tokens.", 1)
        if embedding in found and not _have_same_bits(read(head), read(embedding)):
            raise ValueError(
                f"{where}: {head} differs from {embedding}; MobileMoE's output projection is its embedding"
            )
        if embedding in found:
            del kept[head]
    return kept


def _have_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
