"""This module reads the files of `from_pretrained` from a folder or hub repository; every export has a copy."""

import copy
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

# transformers names that are private or undocumented, in this package. The code ships inside artifacts, so a compat
# module of the project cannot hold them. The tests that fail when one changes are in tests/eval/test_hf_mobilemoe.py
# unless said otherwise:
#   check_model_inputs, _can_record_outputs: test_hidden_states_and_attentions_are_recorded
#   ALL_ATTENTION_FUNCTIONS, config._attn_implementation, _supports_sdpa: test_logits_equal_the_loops
#   _keep_in_fp32_modules_strict: test_router_and_bias_stay_float32_under_bfloat16
#   _init_weights, _tied_weights_keys: test_untrained_model_is_initialized
#   cached_file(_raise_exceptions_for_missing_entries), load_state_dict: test_save_pretrained_round_trip
#   _no_split_modules, accelerate's module._hf_hook: test_layers_on_disk_compute_the_same
#   _from_config: test_packed_weights_give_the_same_numbers in tests/eval/test_int4.py

HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")
"""Options of `from_pretrained` for the origin of files. Every `hub` argument below is a dict of them."""


def read_config(
    name_or_path: str | None, config: MobileMoEConfig | str | None, hub: dict, kwargs: dict
) -> MobileMoEConfig:
    """Return `config`, or the folder's configuration with the fields that `kwargs` has.

    These fields are removed from `kwargs`.
    """
    if isinstance(config, MobileMoEConfig):
        return config
    keys = [key for key in kwargs if key not in (*HUB_OPTIONS, "dtype", "torch_dtype")]
    options = {key: kwargs.pop(key) for key in keys} | {"name_or_path": str(config or name_or_path)}
    source: Any = config or name_or_path
    loaded: Any
    loaded, unused = MobileMoEConfig.from_pretrained(source, return_unused_kwargs=True, **hub, **options)
    kwargs |= unused
    return loaded


def load_tensors(where: str, state_dict: dict | None, config: MobileMoEConfig, hub: dict) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors with the names of a causal model.

    Unquantized tensors are on the meta device, because transformers reads their values itself.

    Raises:
        ValueError: a file or the index is damaged, a dtype is wrong, or the output projection is not the embedding.
    """
    if state_dict is None:
        device = "meta" if config.quantization is None else "cpu"
        found: dict[str, torch.Tensor] = {}
        opened: dict[str, Any] = {}
        for path, expected in find_checkpoint_files(where, hub).items():
            file = open_file(path, expected)
            tensors = load_state_dict(path, map_location=device)
            for name, tensor in tensors.items():
                check_dtype(name, tensor.dtype, path)
            found |= tensors
            opened |= dict.fromkeys(tensors, file)
        found = remove_tied_head(found, lambda name: opened[name].get_tensor(name), where)
    elif config.quantization is None:
        found = remove_tied_head(state_dict, state_dict.__getitem__, where)
    else:
        raise ValueError("state_dict cannot be packed: pass it through dequantize_state_dict and drop quantization")
    if any(name.startswith("model.") for name in found):
        return found
    return {f"model.{name}": tensor for name, tensor in found.items()}  # saved from MobileMoEModel


def load_generation_config(cls: Any, where: str, hub: dict, kwargs: dict) -> GenerationConfig | None:
    """Return `kwargs["generation_config"]` or the folder's, which transformers does not read if it gets no folder."""
    if "generation_config" in kwargs:
        return kwargs["generation_config"]
    if cls.can_generate() and _has_file(where, GENERATION_CONFIG_NAME, hub):
        return GenerationConfig.from_pretrained(where, **hub)
    return None


def choose_dtype(kwargs: dict, config: MobileMoEConfig) -> torch.dtype:
    """Return the dtype that the options ask for; the default is float32."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    dtype = config.dtype if dtype == "auto" else dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def dequantize_checkpoint(
    cls: type, where: str, packed: dict, config: MobileMoEConfig, hub: dict, kwargs: dict
) -> dict[str, Any]:
    """Return the options for transformers' `from_pretrained` that load an INT4 checkpoint as an unquantized one.

    They are `kwargs`, the tensors in the requested dtype, the configuration without `quantization`, and the folder's
    generation config.

    Raises:
        ValueError: the tensors are not those that `config` describes, or the device map puts some of them on disk.
    """
    device_map = kwargs.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ValueError(f"device_map: {where} is INT4 and cannot lie on disk; export it to bf16, or use keep_int4")
    options = kwargs | {"state_dict": dequantize_state_dict(packed, config, choose_dtype(kwargs, config))}
    if (generation_config := load_generation_config(cls, where, hub, kwargs)) is not None:
        options["generation_config"] = generation_config
    options["config"] = copy.deepcopy(config)
    options["config"].quantization = None
    return options


def keep_float32_on_disk(loaded: Any) -> Any:
    """Keep router and expert bias float32 if they stay on disk, and return `from_pretrained`'s result.

    transformers records the model's dtype for every tensor that stays in its file, and each call rounds to it.
    """
    for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        files = getattr(getattr(weights, "dataset", None), "index", {})
        for name in filter(kept_in_float32, files):
            files[name]["dtype"] = "float32"
    return loaded


def record_source(loaded: Any, where: str) -> Any:
    """Record in a model the origin of its checkpoint, and return `from_pretrained`'s result."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = where
    return loaded


def _has_file(name_or_path: str, file: str, hub: dict) -> bool:
    return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub) is not None


def find_checkpoint_files(name_or_path: str, hub: dict) -> dict[str, list[str]]:
    """Return safetensors file -> names of the tensors that the index expects in it; empty if there is no index.

    Raises:
        OSError: there is no safetensors file.
        ValueError: the index is damaged.
    """
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        weights = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **hub)
        assert weights is not None, "cached_file raises where there is no file"
        return {weights: []}
    expected = read_index(index)
    paths = get_checkpoint_shard_files(name_or_path, index, **hub)[0]
    return dict(zip(paths, (expected[name] for name in sorted(expected)), strict=True))


def read_index(path: str | Path) -> dict[str, list[str]]:
    """Return file -> names of its tensors from a model.safetensors.index.json; a damaged one raises a ValueError."""
    try:
        weight_map = json.loads(Path(path).read_text())["weight_map"]
        files: dict[str, list[str]] = {file: [] for file in sorted(weight_map.values())}
        for name, file in weight_map.items():
            files[file].append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of tensors and their files ({error!r}); copy it again") from error
    return files


def open_file(path: str | Path, expected: Sequence[str]) -> Any:
    """Open a safetensors file; raise ValueError if it is missing, damaged or lacks one of the `expected` tensors."""
    content = f"; its index expects {_join_names(expected)} in it" if expected else ""
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; copy the whole folder again{content}") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again{content}") from error
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
