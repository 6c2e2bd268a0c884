"""What `from_pretrained` finds in a folder or hub repository; travels inside every exported folder."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.generation import GenerationConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .checkpoint_mobilemoe import check_dtype, dequantize_state_dict, kept_in_float32
from .configuration_mobilemoe import MobileMoEConfig

HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")


def config_of(
    name_or_path: str | None, config: MobileMoEConfig | str | None, hub: dict, kwargs: dict
) -> MobileMoEConfig:
    """The one given, or the folder's, changed by those of `kwargs` that are its fields; they are taken out."""
    if isinstance(config, MobileMoEConfig):
        return config
    keys = [key for key in kwargs if key not in (*HUB_OPTIONS, "dtype", "torch_dtype")]
    options = {key: kwargs.pop(key) for key in keys} | {"name_or_path": str(config or name_or_path)}
    config, unused = MobileMoEConfig.from_pretrained(
        config or name_or_path, return_unused_kwargs=True, **hub, **options
    )
    kwargs |= unused
    return config


def tensors_of(where: str, state_dict: dict | None, config: MobileMoEConfig, hub: dict) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by a causal model's names; on the meta device where transformers reads them itself.

    Raises:
        ValueError: a file or the index is damaged, a dtype is wrong, or the head is not the embedding.
    """
    if state_dict is None:
        device = "meta" if config.quantization is None else "cpu"
        found, opened = {}, {}
        for path, expected in checkpoint_files(where, hub).items():
            file = open_file(path, expected)
            tensors = load_state_dict(path, map_location=device)
            for name, tensor in tensors.items():
                check_dtype(name, tensor.dtype, path)
            found |= tensors
            opened |= dict.fromkeys(tensors, file)
        found = without_tied_head(found, lambda name: opened[name].get_tensor(name), where)
    elif config.quantization is None:
        found = without_tied_head(state_dict, state_dict.__getitem__, where)
    else:
        raise ValueError("state_dict cannot be packed: pass it through dequantize_state_dict and drop quantization")
    if any(name.startswith("model.") for name in found):
        return found
    return {f"model.{name}": tensor for name, tensor in found.items()}  # saved from MobileMoEModel


def generation_config_of(cls: type, where: str, hub: dict, kwargs: dict) -> GenerationConfig | None:
    """The one given, or the folder's; transformers does not look for it where it gets no folder's name."""
    if "generation_config" in kwargs:
        return kwargs["generation_config"]
    if cls.can_generate() and _has_file(where, GENERATION_CONFIG_NAME, hub):
        return GenerationConfig.from_pretrained(where, **hub)
    return None


def dtype_of(kwargs: dict, config: MobileMoEConfig) -> torch.dtype:
    """The dtype asked for; float32 if none is."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    dtype = config.dtype if dtype == "auto" else dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def dequantized(where: str, packed: dict, config: MobileMoEConfig, kwargs: dict) -> dict[str, torch.Tensor]:
    """An INT4 checkpoint's tensors in the dtype asked for; ValueError where they are to lie on disk."""
    device_map = kwargs.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ValueError(f"device_map: {where} is INT4 and cannot lie on disk; export it to bf16, or use keep_int4")
    return dequantize_state_dict(packed, config, dtype_of(kwargs, config))


def keep_float32_on_disk(loaded: Any) -> Any:
    """What `from_pretrained` gave, its router and expert bias float32 also where they lie on disk.

    transformers notes the model's dtype for every tensor that it leaves in its file, and each call rounds to it.
    """
    for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        files = getattr(getattr(weights, "dataset", None), "index", {})
        for name in filter(kept_in_float32, files):
            files[name]["dtype"] = "float32"
    return loaded


def _has_file(name_or_path: str, file: str, hub: dict) -> bool:
    return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub) is not None


def checkpoint_files(name_or_path: str, hub: dict) -> dict[str, list[str]]:
    """Paths of the safetensors files of a folder or hub repository, each with the tensors that an index puts there.

    Raises:
        OSError: there are none.
        ValueError: the index is damaged.
    """
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        return {cached_file(name_or_path, SAFE_WEIGHTS_NAME, **hub): []}
    expected = read_index(index)
    paths = get_checkpoint_shard_files(name_or_path, index, **hub)[0]
    return dict(zip(paths, (expected[name] for name in sorted(expected)), strict=True))


def read_index(path: str | Path) -> dict[str, list[str]]:
    """File name -> its tensors, as a model.safetensors.index.json says; ValueError naming `path` if it does not."""
    try:
        weight_map = json.loads(Path(path).read_text())["weight_map"]
        files: dict[str, list[str]] = {file: [] for file in sorted(weight_map.values())}
        for name, file in weight_map.items():
            files[file].append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of tensors and their files ({error!r}); copy it again") from error
    return files


def open_file(path: str | Path, expected: Sequence[str]) -> Any:
    """An open safetensors file that holds the `expected` tensors; ValueError naming it and them if it does not."""
    content = f"; its index expects {_few(expected)} in it" if expected else ""
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; copy the whole folder again{content}") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again{content}") from error
    if absent := sorted(set(expected) - set(file.keys())):
        raise ValueError(f"{path} lacks {_few(absent)}, which its index expects in it; copy the whole folder again")
    return file


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def without_tied_head(found: dict[str, Any], read: Callable[[str], torch.Tensor], where: object) -> dict[str, Any]:
    """`found` without an output projection that is the embedding bit for bit; ValueError naming both if it is not.

    Args:
        found: anything by tensor name.
        read: gives the tensor of a name.
    """
    kept = dict(found)
    for head in [name for name in found if name.startswith("lm_head.")]:
        embedding = head.replace("lm_head.", "model.embed_tokens.", 1)
        if embedding in found and not _same_bits(read(head), read(embedding)):
            raise ValueError(
                f"{where}: {head} differs from {embedding}; MobileMoE's output projection is its embedding"
            )
        if embedding in found:
            del kept[head]
    return kept


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
