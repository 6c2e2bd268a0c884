"""`mobilemoe info`: what a model of given dimensions weighs and costs, beside the published table."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from eval.export.sizes import bf16_bytes, int4_bytes
from titan_ext.accounting import count_parameters, inference_flops_per_token, kv_cache_bytes, training_flops_per_token
from titan_ext.config import FLAVORS, ModelDims

PUBLISHED: dict[str, dict[str, float]] = {
    "S": {"active": 272e6, "total": 1.3e9, "int4_bytes": 0.68e9},
    "M": {"active": 528e6, "total": 2.8e9, "int4_bytes": 1.48e9},
    "L": {"active": 922e6, "total": 5.3e9, "int4_bytes": 2.75e9},
}
"""arXiv 2605.27358, table of architectures, to the digits printed there."""


def describe(dims: ModelDims, *, context: int, seq_len: int) -> dict[str, Any]:
    """Dimensions, parameters, bytes and FLOPs; for a published flavor also its published figures.

    Args:
        context: positions of the KV cache and of the attention in inference.
        seq_len: tokens of a training sequence.

    Raises:
        ValueError: a group of 32 does not divide a dimension, or a length is below 1.
    """
    if context < 1 or seq_len < 2:
        raise ValueError(f"--context {context}, --seq-len {seq_len}: give at least 1 and 2")
    count = count_parameters(dims)
    result = {
        "dimensions": asdict(dims),
        "parameters": asdict(count) | {"total": count.total, "active": count.active},
        "bytes": {
            "bf16": bf16_bytes(dims),
            "int4": int4_bytes(dims),
            "int4_expert_groups_out": int4_bytes(dims, expert_group_axis="out"),
            "kv_cache_bf16": kv_cache_bytes(dims, context),
            "kv_cache_int8": kv_cache_bytes(dims, context, 1),
        },
        "flops_per_token": {
            "inference": inference_flops_per_token(dims, context),
            "training": training_flops_per_token(dims, seq_len),
            "training_6n": 6 * count.active,
        },
        "context": context,
        "seq_len": seq_len,
    }
    flavor = next((name for name in PUBLISHED if FLAVORS[name] == dims), None)
    return result | {"published": PUBLISHED[flavor] if flavor else None}


def table(name: str, described: dict[str, Any]) -> Table:
    """The description for people; the last column is the published figure."""
    parameters, sizes, flops = (described[key] for key in ("parameters", "bytes", "flops_per_token"))
    published = described["published"] or {}
    out = Table(title=f"MobileMoE {name}")
    for column, justify in (("", "left"), ("value", "right"), ("published", "right")):
        out.add_column(column, justify=justify)
    dimensions = dict(described["dimensions"])
    scaling = dimensions.pop("rope_scaling")
    for key, value in (dimensions | {f"rope_scaling {key}": value for key, value in scaling.items()}).items():
        out.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:g}", "")
    out.add_section()
    for kind in ("embedding", "attention", "router", "routed_experts", "shared_experts", "norms"):
        out.add_row(f"parameters: {kind}", f"{parameters[kind]:,}", "")
    for kind in ("total", "active"):
        out.add_row(f"parameters: {kind}", f"{parameters[kind]:,}", _rounded(published.get(kind)))
    out.add_section()
    out.add_row("bf16 weights, bytes", f"{sizes['bf16']:,}", "")
    out.add_row("INT4 weights, bytes", f"{sizes['int4']:,}", _rounded(published.get("int4_bytes")))
    for kind in ("bf16", "int8"):
        out.add_row(f"KV cache {kind} at {described['context']:,}, bytes", f"{sizes[f'kv_cache_{kind}']:,}", "")
    out.add_section()
    out.add_row(f"inference FLOPs a token at {described['context']:,}", f"{flops['inference']:.4g}", "")
    out.add_row(f"training FLOPs a token at {described['seq_len']:,}", f"{flops['training']:.4g}", "")
    out.add_row("the paper's 6 N_act", f"{flops['training_6n']:.4g}", "")
    return out


def _rounded(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:g} G" if value >= 5.5e8 else f"{value / 1e6:g} M"
