"""This module reads the files of `from_pretrained` from a folder or hub repository; every export has a copy."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers.generation import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .checkpoint_mobilemoe import dequantize_state_dict, kept_in_float32
from .configuration_mobilemoe import MobileMoEConfig
from .folder_mobilemoe import read_index
from .tensors_mobilemoe import full_name, open_checkpoint, remove_tied_head

# transformers names that are private or undocumented, in this package. The code ships inside artifacts, so a compat
# module of the project cannot hold them. The tests that fail when one changes are in tests/eval/test_hf_mobilemoe.py
# unless said otherwise:
#   what versions_mobilemoe.py names: tests/eval/test_transformers5.py
#   check_model_inputs, _can_record_outputs: test_hidden_states_and_attentions_are_recorded
#   ALL_ATTENTION_FUNCTIONS, config._attn_implementation, _supports_sdpa: test_logits_equal_the_loops
#   _keep_in_fp32_modules_strict: test_router_and_bias_stay_float32_under_bfloat16
#   _init_weights, _tied_weights_keys: test_untrained_model_is_initialized
#   cached_file(_raise_exceptions_for_missing_entries): test_save_pretrained_round_trip
#   _no_split_modules, accelerate's module._hf_hook: test_layers_on_disk_compute_the_same
#   _from_config, accelerate's infer_auto_device_map: test_int4_is_not_left_on_disk in tests/eval/test_one_reading.py
#   _from_config: test_packed_weights_give_the_same_numbers in tests/eval/test_int4.py

HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")
"""Options of `from_pretrained` for the origin of files. Every `hub` argument below is a dict of them."""

_SAFETENSORS_ALONE = {"use_safetensors": True, "variant": None, "gguf_file": None, "from_tf": False, "from_flax": False}
"""Options of transformers for other files than those that are checked here -> the value that chooses these."""


def read_config(name_or_path: str | None, config: Any, kwargs: dict) -> tuple[MobileMoEConfig, dict]:
    """Return `config`, or the folder's configuration with the fields that `kwargs` has, and the hub's options.

    These fields are removed from `kwargs`.

    Raises:
        ValueError: the configuration is not MobileMoE's, or an option names weights of another kind.
    """
    for key, neutral in _SAFETENSORS_ALONE.items():
        if kwargs.get(key) not in (None, neutral):
            raise ValueError(f"{key} is {kwargs[key]!r}: the weights are read from safetensors alone; leave it out")
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    if isinstance(config, MobileMoEConfig):
        return config, hub
    if getattr(config, "model_type", None) == MobileMoEConfig.model_type:
        # transformers 5 imports a folder's code a second time for the model, so its class of the config is another.
        return MobileMoEConfig.from_dict(config.to_dict(), name_or_path=config.name_or_path), hub
    keys = [key for key in kwargs if key not in (*HUB_OPTIONS, "dtype", "torch_dtype")]
    options = {key: kwargs.pop(key) for key in keys} | {"name_or_path": str(config or name_or_path)}
    source: Any = config or name_or_path
    loaded: Any
    loaded, unused = MobileMoEConfig.from_pretrained(source, return_unused_kwargs=True, **hub, **options)
    kwargs |= unused
    return loaded, hub


def load_tensors(where: str, state_dict: dict | None, config: MobileMoEConfig, hub: dict) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors with the names of a causal model.

    Unquantized tensors are on the meta device, because transformers reads their values itself.

    Raises:
        ValueError: as `open_checkpoint`.
    """
    if state_dict is None:
        tensors = open_checkpoint(find_checkpoint_folder(where, hub), config)
        if config.quantization is not None:
            return dict(tensors)
        tensors.check_values()
        return {name: torch.empty(shape, device="meta") for name, shape in tensors.shapes().items()}
    if config.quantization is not None:
        raise ValueError("state_dict cannot be packed: pass it through dequantize_state_dict and drop quantization")
    found = remove_tied_head(state_dict, state_dict.__getitem__, where)
    return {full_name(name, found): tensor for name, tensor in found.items()}


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
    unquantized = copy.deepcopy(config)
    unquantized.quantization = None
    device_map = _infer_device_map(cls, unquantized, kwargs)
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ValueError(f"device_map: {where} is INT4 and cannot lie on disk; export it to bf16, or use keep_int4")
    options = kwargs | {"state_dict": dequantize_state_dict(packed, config, choose_dtype(kwargs, config))}
    if device_map is not None:
        options["device_map"] = device_map
    if (generation_config := load_generation_config(cls, where, hub, kwargs)) is not None:
        options["generation_config"] = generation_config
    options["config"] = unquantized
    return options


def _infer_device_map(cls: Any, config: MobileMoEConfig, kwargs: dict) -> Any:
    """Return `kwargs["device_map"]`, with the devices that accelerate chooses where it is "auto" or the like.

    transformers would ask accelerate later. If some layers go to disk then, it drops the tensors that it was given.
    """
    device_map = kwargs.get("device_map")
    if device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        return device_map
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    dtype = choose_dtype(kwargs, config)
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
    model.tie_weights()
    options: dict[str, Any] = {"no_split_module_classes": list(cls._no_split_modules), "dtype": dtype}
    memory = kwargs.get("max_memory")
    if device_map != "sequential":
        low_zero = device_map == "balanced_low_0"
        memory = get_balanced_memory(model, max_memory=memory, low_zero=low_zero, **options)
    return infer_auto_device_map(model, max_memory=memory, **options)


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


def find_checkpoint_folder(name_or_path: str, hub: dict) -> Path:
    """Return the local folder with the safetensors files of a folder or hub repository, which are downloaded to it.

    Raises:
        ValueError: there is no safetensors file, or the index is damaged.
    """
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    # transformers takes this file where there is an index, too.
    weights = cached_file(name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is not None:
        read_index(index)  # names a damage that the next line would not
        get_checkpoint_shard_files(name_or_path, index, **hub)
    found = index or weights
    if found is None:
        raise ValueError(f"{name_or_path}/{SAFE_WEIGHTS_NAME} is missing; copy the whole folder again")
    return Path(found).parent
