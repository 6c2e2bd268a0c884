"""This module holds what transformers 4.57 and 5 name differently; a copy of it is in every exported folder.

The versions that the tests run are 4.57.6, and 5.24.0 in tests/eval/test_transformers5.py.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers import masking_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

try:  # transformers 5, whose types mypy does not see here
    from transformers.utils.generic import merge_with_config_defaults  # type: ignore[attr-defined]
    from transformers.utils.output_capturing import capture_outputs  # type: ignore[import-not-found]

    def record_outputs(forward: Callable) -> Callable:
        """Decorate a model's `forward`, which takes defaults from the config and records states and attentions."""
        return merge_with_config_defaults(capture_outputs(forward))

except ImportError:
    from transformers.utils.generic import check_model_inputs as record_outputs  # noqa: F401  the same in 4.57

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""Name of the KV cache among the arguments and outputs of a model: versions before 5.24 have the second one."""


def build_causal_mask(x_BLD: torch.Tensor, past: Any, **arguments: Any) -> Any:
    """Return `create_causal_mask` of embeddings, of the cache `past`, and of those of `arguments` that it takes."""
    names = inspect.signature(masking_utils.create_causal_mask).parameters
    embeds = "inputs_embeds" if "inputs_embeds" in names else "input_embeds"
    cache = "cache" if "cache" in names else "past_key_values"
    taken = {name: value for name, value in arguments.items() if name in names}
    return masking_utils.create_causal_mask(**{embeds: x_BLD, cache: past}, **taken)


def read_capacity(cache: Any) -> int:
    """Return the number of tokens that a KV cache can hold; -1 for one that grows."""
    return cache.get_max_length() if hasattr(cache, "get_max_length") else cache.get_max_cache_shape()
