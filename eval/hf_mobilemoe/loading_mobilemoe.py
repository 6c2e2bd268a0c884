"""What `from_pretrained` finds in a folder or hub repository; travels inside every exported folder."""

import torch
from transformers.generation import GenerationConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

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
    """A checkpoint's tensors by a causal model's names; on the meta device where transformers reads them itself."""
    if state_dict is None:
        files = checkpoint_files(where, hub)
        device = "meta" if config.quantization is None else "cpu"
        found = {n: t for file in files for n, t in load_state_dict(file, map_location=device).items()}
    elif config.quantization is None:
        found = state_dict
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


def _has_file(name_or_path: str, file: str, hub: dict) -> bool:
    return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub) is not None


def checkpoint_files(name_or_path: str, hub: dict) -> list[str]:
    """Paths of the safetensors files of a folder or hub repository; OSError where there are none."""
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        return [cached_file(name_or_path, SAFE_WEIGHTS_NAME, **hub)]
    return get_checkpoint_shard_files(name_or_path, index, **hub)[0]
