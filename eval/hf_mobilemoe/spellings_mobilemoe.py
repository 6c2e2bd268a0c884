"""This module reads the spellings of config.json: a fact that stands there twice is the same, or it is refused.

Other models and newer versions of transformers name some of MobileMoE's numbers in another way. A reader that knows one
name would compute something else than a reader that knows the other. Every exported folder has a copy of this file.
"""

from collections.abc import Mapping
from typing import Any

ALIASES = {
    "hidden_size": ("d_model", "n_embd", "dim"),
    "intermediate_size": ("moe_intermediate_size", "expert_intermediate_size"),
    "intermediate_size_mlp": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "num_hidden_layers": ("num_layers", "n_layers", "n_layer"),
    "num_attention_heads": ("n_heads", "n_head"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads"),
    "head_dim": ("head_size", "attention_head_dim"),
    "max_position_embeddings": ("max_sequence_length", "max_seq_len", "n_positions", "n_ctx"),
    "rms_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "hidden_act": ("hidden_activation", "activation_function"),
    "num_local_experts": ("num_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    "norm_topk_prob": ("norm_topk", "route_norm", "moe_norm_topk_prob"),
    "routed_scaling_factor": ("route_scale", "moe_routed_scaling_factor"),
    "tie_word_embeddings": ("tie_embeddings", "tied_embeddings"),
}
"""Key of MobileMoE -> names of the same number in other architectures' config.json."""

NEUTRAL_VALUES: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "score_function": "sigmoid",
    "topk_method": "noaux_tc",
    "use_expert_bias": True,
    "moe_router_enable_expert_bias": True,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "mlp_bias": False,
    "use_bias": False,
    "qkv_bias": False,
    "partial_rotary_factor": 1.0,
    "rotary_pct": 1.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
"""Switches of other architectures -> the only value with which they compute what MobileMoE does; null says nothing."""

ELSEWHERE = (
    "quantization_config", "compression_config", "configuration_files", "transformers_weights", "text_config",
    "base_model_name_or_path",
)  # fmt: skip
"""Keys that make transformers read another file, another part or another form than this code does."""

ARCHITECTURES = ("MobileMoEForCausalLM", "MobileMoEModel")
"""Classes that `architectures` and `auto_map` may name."""

DTYPES = ("bfloat16", "float16", "float32")
"""Values of `dtype`."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json and generation_config.json that hold token ids."""

_SCALING_FACTORS = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def join_spellings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with one name for every fact.

    RoPE's are `rope_theta` and `rope_scaling` (None, or a dict with `rope_type` and four factors), whether the file has
    these or `rope_parameters`, the form of transformers 5.

    Raises:
        ValueError: a fact stands there twice with two values, a switch of another architecture is on, a key points to
            another file, or a token id is outside of the vocabulary; the message names keys and values.
    """
    check_elsewhere(values)
    for key, neutral in NEUTRAL_VALUES.items():
        if values.get(key) is not None and not is_same(values[key], neutral):
            raise ValueError(f"{key} is {values[key]!r}; MobileMoE computes {neutral!r} and nothing else")
    for key, names in ALIASES.items():
        _agree({name: values[name] for name in (key, *names) if values.get(name) is not None})
    dtypes = {key: values[key] for key in ("dtype", "torch_dtype") if values.get(key) is not None}
    _agree({key: _name_dtype(dtype) for key, dtype in dtypes.items()})
    for key, dtype in dtypes.items():
        if _name_dtype(dtype) not in DTYPES:
            raise ValueError(f"{key} is {dtype!r}; choose one of {', '.join(DTYPES)}")
    _check_classes(values)
    check_token_ids(values, values.get("vocab_size"))
    return _join_rope(dict(values))


def check_elsewhere(values: Mapping[str, Any]) -> None:
    """Raise ValueError if a key of config.json points to another file or another form of the weights."""
    for key in ELSEWHERE:
        if values.get(key) is not None:
            raise ValueError(f"{key} is {values[key]!r}; MobileMoE's tensors and numbers lie nowhere else: remove it")


def is_same(a: Any, b: Any) -> bool:
    """Return whether two values of a JSON file are the same; true is not 1, and "8" is not 8, but 8.0 is 8."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(is_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def check_token_ids(values: Mapping[str, Any], vocab_size: Any) -> None:
    """Raise ValueError unless every token id of `values` is a whole number below `vocab_size`, or a list of them."""
    for key in TOKEN_IDS:
        value = values.get(key)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            inside = not isinstance(vocab_size, int) or (type(token) is int and 0 <= token < vocab_size)
            if type(token) is not int or not inside:
                raise ValueError(f"{key} is {value!r}; it must be 0 to {vocab_size} - 1 (vocab_size)")


def _agree(stated: Mapping[str, Any]) -> None:
    """Raise ValueError if the values, by the keys that state them, are not all the same."""
    first = next(iter(stated), "")
    for key, value in stated.items():
        if key != first and not is_same(value, stated[first]):
            raise ValueError(
                f"{first} is {stated[first]!r} and {key} is {value!r}; they state the same fact: correct one of them"
            )


def _name_dtype(dtype: Any) -> str:
    return dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")


def _check_classes(values: Mapping[str, Any]) -> None:
    """Compare the classes that config.json names with those of this architecture."""
    auto_map, architectures = values.get("auto_map") or {}, values.get("architectures") or []
    if not isinstance(auto_map, Mapping) or not isinstance(architectures, list):
        raise ValueError(f"auto_map is {auto_map!r} and architectures {architectures!r}; they are an object and a list")
    named = [(f"auto_map.{key}", auto_map[key]) for key in ("AutoModel", "AutoModelForCausalLM") if key in auto_map]
    for key, name in named + [("architectures", name) for name in architectures]:
        if str(name).rsplit(".", 1)[-1] not in ARCHITECTURES:
            raise ValueError(f"{key} names {name!r}; this code reads {' and '.join(ARCHITECTURES)}")


def _join_rope(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with `rope_theta` and `rope_scaling` alone, of every place that states them."""
    thetas = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    facts: dict[str, dict[str, Any]] = {name: {} for name in ("rope_type", *_SCALING_FACTORS)}
    scaling: Any = None
    for key in ("rope_scaling", "rope_parameters"):
        if key not in values or (key == "rope_parameters" and values[key] is None):
            continue
        form = values[key]
        if form is not None:
            if not isinstance(form, Mapping):
                raise ValueError(f"{key} is {form!r}; it must be an object of type 'llama3', or null")
            if form.get("rope_theta") is not None:
                thetas[f"{key}.rope_theta"] = form["rope_theta"]
            form = _read_scaling(key, form)
        for name, stated in facts.items():
            stated[key if form is None else f"{key}.{name}"] = form and form.get(name)
        scaling = form
        values["rope_scaling"] = form
    values.pop("rope_parameters", None)
    _agree(thetas)
    for stated in facts.values():
        _agree(stated)
    top = values.get("original_max_position_embeddings")
    if top is not None and isinstance(scaling, dict) and "original_max_position_embeddings" in scaling:
        inside = scaling["original_max_position_embeddings"]
        _agree({"original_max_position_embeddings": top, "rope_scaling.original_max_position_embeddings": inside})
    return values | ({"rope_theta": next(iter(thetas.values()))} if thetas else {})


def _read_scaling(key: str, form: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scaling that `rope_scaling` or `rope_parameters` states; None for the type 'default'."""
    kinds = {f"{key}.{name}": form[name] for name in ("rope_type", "type") if form.get(name) is not None}
    for name, kind in kinds.items():
        if kind not in ("default", "llama3"):
            raise ValueError(f"{name} is {kind!r}; MobileMoE has 'llama3', or rope_scaling null")
    _agree(kinds)
    factors = {name: form[name] for name in form if name not in ("rope_type", "type", "rope_theta")}
    if is_same(factors.get("partial_rotary_factor"), 1.0):
        del factors["partial_rotary_factor"]
    if unknown := sorted(factors.keys() - set(_SCALING_FACTORS)):
        raise ValueError(f"{key}.{unknown[0]} is {factors[unknown[0]]!r}; MobileMoE's RoPE has no such key: remove it")
    if "default" in kinds.values() and factors:
        raise ValueError(f"{key} is of type 'default' and has {', '.join(factors)}; it scales, or it does not")
    if "default" in kinds.values() or (not kinds and not factors and "rope_theta" in form):
        return None
    return {"rope_type": "llama3", **factors}
