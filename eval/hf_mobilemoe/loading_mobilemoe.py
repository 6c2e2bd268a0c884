"""What `from_pretrained` finds in a folder or hub repository; travels inside every exported folder."""

import torch
from transformers.generation import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .configuration_mobilemoe import MobileMoEConfig

HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")


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
