"""`mobilemoe info`: sizes and costs of a model of given dimensions, beside the published table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro
from rich.table import Table

from core.errors import RefusedInput
from pipelines.commands.command import UsageShown, emit_result, parse_arguments, require_known
from titan_ext.config import FLAVORS, ModelDims

PUBLISHED: dict[str, dict[str, float]] = {
    "S": {"active": 272e6, "total": 1.3e9, "int4_bytes": 0.68e9},
    "M": {"active": 528e6, "total": 2.8e9, "int4_bytes": 1.48e9},
    "L": {"active": 922e6, "total": 5.3e9, "int4_bytes": 2.75e9},
}
"""arXiv 2605.27358, table of architectures, to the digits printed there."""

TOLERANCES = {"total": 0.03, "active": 0.01, "int4_bytes": 0.10}
"""Largest distance between our figure and the published one, as a share of the latter. The paper prints two digits of
the total, three of the active parameters; for the bytes see `INT4_NOTE`."""
DEFAULT_LENGTH = 2048
"""Tokens of context and of a training sequence, where the model has room for them."""


INT4_NOTE = (
    "INT4: 5 to 9% above the paper's table, whose figures are 4 bits a weight without scales and the embedding counted "
    "twice; the released layout has a float16 scale for 32 weights."
)


@dataclass(frozen=True)
class Info:
    """Sizes and costs of a flavor (S, M, L, tiny), or of any dimensions, beside the published ones."""

    model: Annotated[ModelDims, tyro.conf.arg(name="")]
    context: int | None = None
    """Positions of the KV cache, and of the attention in inference; 2048, or what the model has, if not given."""
    seq_len: int | None = None
    """Tokens of a training sequence; 2048, or what the model has, if not given."""
    json: bool = False
    """One JSON object on stdout."""
    flavor: tyro.conf.Suppress[str] = ""
    """Flavor whose dimensions the options changed, for the table's title; `parse` fills it."""


def parse(words: Sequence[str]) -> Info:
    """Parse FLAVOR, if there is one, and the options that change it.

    Raises:
        RefusedInput: there is no such flavor.
        UsageShown: nothing is given.
        SystemExit: a wrong option, or --help after FLAVOR.
    """
    if not words or words[0] in ("-h", "--help"):
        raise UsageShown(
            "usage: mobilemoe info [FLAVOR] [--context N] [--seq-len N] [--json] [dimensions]\n\n"
            f"FLAVOR: {', '.join(FLAVORS)}; mobilemoe info FLAVOR --help lists every dimension.\n"
            "Without FLAVOR the dimensions that differ from flavor to flavor must all be given",
            asked=bool(words),
        )
    if words[0].startswith("-"):
        return parse_arguments(Info, words, "info")
    given, *rest = words
    name = next((flavor for flavor in FLAVORS if flavor.lower() == given.lower()), given)
    require_known("flavor", name, FLAVORS)
    return parse_arguments(Info, rest, f"info {name}", Info(model=FLAVORS[name], flavor=name))


def show_info(arguments: Info) -> None:
    """Print sizes and costs of the model.

    Raises:
        RefusedInput: no model has these dimensions, or a length does not fit them.
    """
    from pipelines.validation.validate_recipe import check_model

    model = arguments.model
    check_model(model)
    default = min(DEFAULT_LENGTH, model.max_seq_len)
    described = describe_model(
        model,
        context=default if arguments.context is None else arguments.context,
        seq_len=default if arguments.seq_len is None else arguments.seq_len,
    )
    name = arguments.flavor or "of these dimensions"
    if arguments.flavor and model != FLAVORS[arguments.flavor]:
        name += ", changed"
    emit_result(arguments.json, described, lambda: format_table(name, described))


def describe_model(dims: ModelDims, *, context: int, seq_len: int) -> dict[str, Any]:
    """Return dimensions, parameters, bytes and FLOPs; for a published flavor also its published figures beside ours.

    Args:
        context: positions of the KV cache and of the attention in inference.
        seq_len: tokens of a training sequence.

    Raises:
        RefusedInput: a length is below 1 (2 in training) or beyond the model's.
    """
    from eval.export.sizes import bf16_bytes, int4_bytes
    from titan_ext.model_stats import (
        count_parameters,
        inference_flops_per_token,
        kv_cache_bytes,
        training_flops_per_token,
    )

    for option, length, least in (("--context", context, 1), ("--seq-len", seq_len, 2)):
        if not least <= length <= dims.max_seq_len:
            raise RefusedInput(f"{option} {length}: give {least} to {dims.max_seq_len}, or raise --max-seq-len")
    count = count_parameters(dims)
    result: dict[str, Any] = {
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
    checks = {key: _compare(found[key], value, TOLERANCES[key]) for key, value in PUBLISHED[flavor].items()}
    return result | {"published": PUBLISHED[flavor], "against_published": checks, "note": INT4_NOTE}


def _compare(found: float, published: float, tolerance: float) -> dict[str, Any]:
    ratio = found / published
    return {"ratio": round(ratio, 4), "tolerance": tolerance, "within": abs(ratio - 1) <= tolerance}


def format_table(name: str, described: dict[str, Any]) -> Table:
    """Return the description as a table; the last columns are the published figure, and ours as a multiple of it."""
    parameters, sizes, flops = (described[key] for key in ("parameters", "bytes", "flops_per_token"))
    published = described["published"] or {}
    table = Table(title=f"MobileMoE {name}", caption=described.get("note"))
    columns = ("", "value", "published", "ratio") if published else ("", "value")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")

    def published_columns(key: str) -> tuple[str, ...]:
        if not published:
            return ()
        return _format_published(published[key]), _format_verdict(described["against_published"][key])

    dimensions = dict(described["dimensions"])
    scaling = dimensions.pop("rope_scaling")
    for key, value in (dimensions | {f"rope_scaling {key}": value for key, value in scaling.items()}).items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else f"{value:g}")
    table.add_section()
    for kind in ("embedding", "attention", "router", "routed_experts", "shared_experts", "norms"):
        table.add_row(f"parameters: {kind}", f"{parameters[kind]:,}")
    for kind in ("total", "active"):
        table.add_row(f"parameters: {kind}", f"{parameters[kind]:,}", *published_columns(kind))
    table.add_section()
    table.add_row("bf16 weights, bytes", f"{sizes['bf16']:,}")
    table.add_row("INT4 weights, bytes", f"{sizes['int4']:,}", *published_columns("int4_bytes"))
    for kind in ("bf16", "int8"):
        table.add_row(f"KV cache {kind} at {described['context']:,}, bytes", f"{sizes[f'kv_cache_{kind}']:,}")
    table.add_section()
    table.add_row(f"inference FLOPs a token at {described['context']:,}", f"{flops['inference']:.4g}")
    table.add_row(f"training FLOPs a token at {described['seq_len']:,}", f"{flops['training']:.4g}")
    table.add_row("the paper's 6 N_act", f"{flops['training_6n']:.4g}")
    return table


def _format_published(value: float) -> str:
    return f"{value / 1e9:g} G" if value >= 5.5e8 else f"{value / 1e6:g} M"


def _format_verdict(check: dict[str, Any]) -> str:
    verdict = "within" if check["within"] else "beyond"
    return f"{check['ratio']:.3f}, {verdict} {check['tolerance']:.0%}"
