"""This module is MobileMoE's configuration (arXiv 2605.27358) for transformers; every exported folder has a copy."""

import math
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from .spellings_mobilemoe import is_same, join_spellings

INT4_FORMAT = "mobilemoe-int4-g32"
"""Name of the INT4 layout in config.json."""

EXPERT_GROUP_AXES = {"in": "in (dim 1 of [E, in, out])", "out": "out (last dim of [E, in, out])"}
"""Short name of the grouped axis of an expert tensor [E, in, out] -> its name in config.json."""

_FIXED = {
    "hidden_act": "silu",
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "norm_topk_prob": True,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
"""Keys of the released config.json that do not vary in this architecture; another value is refused."""

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "num_local_experts",
    "num_experts_per_tok",
)  # fmt: skip
_MOST, _MOST_OF_OTHERS = {"num_hidden_layers": 10_000, "num_local_experts": 100_000}, 2**31
"""Largest values: a list has an entry a layer, a number that somebody made up would fill the memory."""
_NUMBERS = ("rms_norm_eps", "rope_theta", "routed_scaling_factor")

REQUIRED_KEYS = ("model_type", *_COUNTS, *_NUMBERS, "rope_scaling")
"""Keys that every config.json must have. A default would be a guess. Most keys do not change the shape of a tensor, so
a model with a wrong guess would load and compute something else."""

_QUANTIZATION_FIXED = {
    "format": INT4_FORMAT,
    "qmin": -8,
    "qmax": 7,
    "symmetric": True,
    "packed": True,
    "scale_dtype": "float16",
    "linear_group_axis": "in (last dim of [out, in])",
}

DEFAULT_ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 16.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
}


class MobileMoEConfig(PretrainedConfig):
    """Configuration of a decoder in which every layer has attention, routed experts and one shared expert.

    The defaults are flavor S. `intermediate_size` is the hidden width of one routed expert, `intermediate_size_mlp`
    that of the shared expert. `rope_scaling` is None or the llama3 type, named by `rope_type` or `type`. `quantization`
    is None or the description of an INT4 checkpoint (see `describe_quantization`). It describes the files; the config
    of a model that was dequantized does not have it.

    Raises:
        ValueError: the architecture does not allow a value; the message names the key and the rule.
    """

    model_type = "mobilemoe"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 128_256,
        hidden_size: int = 768,
        intermediate_size: int = 384,
        intermediate_size_mlp: int = 1536,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 12,
        num_key_value_heads: int = 4,
        head_dim: int = 64,
        hidden_act: str = "silu",
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500_000.0,
        rope_scaling: dict[str, Any] | None = DEFAULT_ROPE_SCALING,
        num_local_experts: int = 60,
        num_experts_per_tok: int = 4,
        interleave_moe_layer_step: int = 1,
        no_rope_layers: list[int] | None = None,
        layer_types: list[str] | None = None,
        use_qk_norm: bool = True,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 2.5,
        attention_bias: bool = False,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        quantization: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.intermediate_size_mlp = intermediate_size_mlp
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling = dict(rope_scaling) if isinstance(rope_scaling, dict) else rope_scaling
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.interleave_moe_layer_step = interleave_moe_layer_step
        self.use_qk_norm = use_qk_norm
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.attention_bias = attention_bias
        self.use_cache = use_cache
        self.quantization = None if quantization is None else dict(quantization)
        self._check_numbers()
        self.no_rope_layers = [1] * num_hidden_layers if no_rope_layers is None else no_rope_layers
        self.layer_types = ["full_attention"] * num_hidden_layers if layer_types is None else layer_types
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from a config.json's content.

        Raises:
            ValueError: a key is missing, a value is impossible, or two keys state a fact differently.
        """
        where = f"{kwargs['name_or_path']}/config.json" if kwargs.get("name_or_path") else "config.json"
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"{where}: model_type is {model_type!r}; this code reads {cls.model_type!r}")
        try:
            values = join_spellings(config_dict)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if missing := [key for key in REQUIRED_KEYS if key not in values]:
            raise ValueError(f"{where} lacks {', '.join(missing)}; a MobileMoE's states them")
        try:
            return super().from_dict(values, **kwargs)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def to_diff_dict(self) -> dict[str, Any]:
        """Return transformers' dict and `tie_word_embeddings`, which transformers omits if it has the default value."""
        return super().to_diff_dict() | {"tie_word_embeddings": self.tie_word_embeddings}

    def _check_numbers(self) -> None:
        for key in _COUNTS:
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key} is {value!r}; it must be a whole number above 0")
            if value > (most := _MOST.get(key, _MOST_OF_OTHERS)):
                raise ValueError(f"{key} is above {most:,}; no model has as many")
        for key in _NUMBERS:
            _check_number(key, getattr(self, key))

    def _check(self) -> None:
        for key, value in _FIXED.items():
            if not is_same(getattr(self, key), value):
                raise ValueError(f"{key} is {getattr(self, key)!r}; MobileMoE has {value!r} and nothing else")
        for key, value in (("no_rope_layers", 1), ("layer_types", "full_attention")):
            found = getattr(self, key)
            if not is_same(found, [value] * self.num_hidden_layers):
                raise ValueError(
                    f"{key} is {found}; MobileMoE has {value!r} for each of {self.num_hidden_layers} layers"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must be 1 to num_local_experts "
                f"({self.num_local_experts})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding pairs channels, so it must be even")
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)
        if self.quantization is not None:
            _check_quantization(self.quantization)


def _check_number(key: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}; it must be a number above 0")


def _check_rope_scaling(scaling: Any) -> None:
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling is {scaling!r}; it must be an object of type 'llama3', or null")
    for key in ("rope_type", "type"):
        if scaling.get(key, "llama3") != "llama3":
            raise ValueError(f"rope_scaling.{key} is {scaling[key]!r}; MobileMoE has 'llama3', or rope_scaling null")
    for key in DEFAULT_ROPE_SCALING.keys() - {"rope_type"}:
        if key not in scaling:
            raise ValueError(f"rope_scaling lacks {key}; give all four factors, or rope_scaling null")
        _check_number(f"rope_scaling.{key}", scaling[key])
    if scaling["low_freq_factor"] > scaling["high_freq_factor"]:
        raise ValueError(
            f"rope_scaling.low_freq_factor is {scaling['low_freq_factor']!r}; it must not be above "
            f"high_freq_factor ({scaling['high_freq_factor']!r})"
        )


def describe_quantization(
    group_size: int, expert_group_axis: str, expert_group_size: int | None = None
) -> dict[str, Any]:
    """Return config.json's `quantization` of an INT4 folder.

    Args:
        group_size: number of weights that share a scale.
        expert_group_axis: "in" or "out", the grouped axis of the routed experts.
        expert_group_size: number of weights that share a scale in the routed experts; None for `group_size`. Released
            checkpoints do not have the key, so it is written only if it differs from `group_size`.

    Raises:
        ValueError: `expert_group_axis` is not "in" or "out".
    """
    if expert_group_axis not in EXPERT_GROUP_AXES:
        raise ValueError(f"expert_group_axis is {expert_group_axis!r}; choose one of {sorted(EXPERT_GROUP_AXES)}")
    own = {} if expert_group_size in (None, group_size) else {"expert_group_size": expert_group_size}
    return _QUANTIZATION_FIXED | {
        "group_size": group_size,
        "embedding_group_size": group_size,
        "expert_group_axis": EXPERT_GROUP_AXES[expert_group_axis],
        **own,
    }


def _check_quantization(quantization: dict[str, Any]) -> None:
    for key, value in _QUANTIZATION_FIXED.items():
        if not is_same(quantization.get(key), value):
            raise ValueError(f"quantization.{key} is {quantization.get(key)!r}; this code reads {value!r}")
    if quantization.get("expert_group_axis") not in EXPERT_GROUP_AXES.values():
        raise ValueError(
            f"quantization.expert_group_axis is {quantization.get('expert_group_axis')!r}; "
            f"this code reads {sorted(EXPERT_GROUP_AXES.values())}"
        )
    known = {*_QUANTIZATION_FIXED, "group_size", "embedding_group_size", "expert_group_axis", "expert_group_size"}
    if unknown := sorted(quantization.keys() - known):
        raise ValueError(f"quantization.{unknown[0]} is {quantization[unknown[0]]!r}; {INT4_FORMAT} has no such key")
    sizes = {key: quantization.get(key) for key in ("group_size", "embedding_group_size")}
    sizes |= {key: size for key, size in quantization.items() if key == "expert_group_size"}
    for key, size in sizes.items():
        if not isinstance(size, int) or size < 2 or size % 2:
            raise ValueError(f"quantization.{key} is {size!r}; it must be an even number of values")


__all__ = ["MobileMoEConfig"]
