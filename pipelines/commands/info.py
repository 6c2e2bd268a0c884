"""`mobilemoe info`: what a model of given dimensions weighs and costs, beside the published table."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from core.errors import RefusedInput
from eval.export.sizes import bf16_bytes, int4_bytes
from titan_ext.config import FLAVORS, ModelDims
from titan_ext.model_stats import count_parameters, inference_flops_per_token, kv_cache_bytes, training_flops_per_token

PUBLISHED: dict[str, dict[str, float]] = {
    "S": {"active": 272e6, "total": 1.3e9, "int4_bytes": 0.68e9},
    "M": {"active": 528e6, "total": 2.8e9, "int4_bytes": 1.48e9},
    "L": {"active": 922e6, "total": 5.3e9, "int4_bytes": 2.75e9},
}
"""arXiv 2605.27358, table of architectures, to the digits printed there."""

TOLERANCES = {"total": 0.03, "active": 0.01, "int4_bytes": 0.10}
"""How far from the published figure ours may lie, as a share of it: two and three printed digits, and `INT4_NOTE`."""

INT4_NOTE = (
    "INT4: 5 to 9% above the paper's table, whose figures are 4 bits a weight without scales and the embedding counted "
    "twice; the released layout has a float16 scale for 32 weights."
)


def describe(dims: ModelDims, *, context: int, seq_len: int) -> dict[str, Any]:
    """Dimensions, parameters, bytes and FLOPs; for a published flavor also its published figures, and whether ours fit.

    Args:
        context: positions of the KV cache and of the attention in inference.
        seq_len: tokens of a training sequence.

    Raises:
        RefusedInput: a length is below 1 (2 in training) or beyond the model's.
    """
    for option, length, least in (("--context", context, 1), ("--seq-len", seq_len, 2)):
        if not least <= length <= dims.max_seq_len:
            raise RefusedInput(f"{option} {length}: give {least} to {dims.max_seq_len}, or raise --max-seq-len")
    count = count_parameters(dims)
    result = {
        "dimensions": asdict(dims),
        "parameters": asdict(count) | {"total": count.total, "active": count.active},
        "bytes": {
            "bf16": bf16_bytes(dims),
            "int4": int4_bytes(dims),
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
    if flavor is None:
        return result | {"published": None}
    found = {"total": count.total, "active": count.active, "int4_bytes": result["bytes"]["int4"]}
    checks = {key: _check(found[key], value, TOLERANCES[key]) for key, value in PUBLISHED[flavor].items()}
    return result | {"published": PUBLISHED[flavor], "against_published": checks, "note": INT4_NOTE}


def _check(found: float, published: float, tolerance: float) -> dict[str, Any]:
    ratio = found / published
    return {"ratio": round(ratio, 4), "tolerance": tolerance, "within": abs(ratio - 1) <= tolerance}


def table(name: str, described: dict[str, Any]) -> Table:
    """The description for people; the last columns are the published figure and ours as a multiple of it."""
    parameters, sizes, flops = (described[key] for key in ("parameters", "bytes", "flops_per_token"))
    published = described["published"] or {}
    out = Table(title=f"MobileMoE {name}", caption=described.get("note"))
    columns = (("", "left"), ("value", "right"), ("published", "right"), ("ratio", "right"))
    for column, justify in columns if published else columns[:2]:
        out.add_column(column, justify=justify)

    def beside(key: str) -> tuple[str, ...]:
        return (_rounded(published[key]), _verdict(described["against_published"][key])) if published else ()

    dimensions = dict(described["dimensions"])
    scaling = dimensions.pop("rope_scaling")
    for key, value in (dimensions | {f"rope_scaling {key}": value for key, value in scaling.items()}).items():
        out.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:g}")
    out.add_section()
    for kind in ("embedding", "attention", "router", "routed_experts", "shared_experts", "norms"):
        out.add_row(f"parameters: {kind}", f"{parameters[kind]:,}")
    for kind in ("total", "active"):
        out.add_row(f"parameters: {kind}", f"{parameters[kind]:,}", *beside(kind))
    out.add_section()
    out.add_row("bf16 weights, bytes", f"{sizes['bf16']:,}")
    out.add_row("INT4 weights, bytes", f"{sizes['int4']:,}", *beside("int4_bytes"))
    for kind in ("bf16", "int8"):
        out.add_row(f"KV cache {kind} at {described['context']:,}, bytes", f"{sizes[f'kv_cache_{kind}']:,}")
    out.add_section()
    out.add_row(f"inference FLOPs a token at {described['context']:,}", f"{flops['inference']:.4g}")
    out.add_row(f"training FLOPs a token at {described['seq_len']:,}", f"{flops['training']:.4g}")
    out.add_row("the paper's 6 N_act", f"{flops['training_6n']:.4g}")
    return out


def _rounded(value: float) -> str:
    return f"{value / 1e9:g} G" if value >= 5.5e8 else f"{value / 1e6:g} M"


def _verdict(check: dict[str, Any]) -> str:
    verdict = "within" if check["within"] else "beyond"
    return f"{check['ratio']:.3f}, {verdict} {check['tolerance']:.0%}"
