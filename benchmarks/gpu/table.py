"""Writes the results of benchmarks/gpu/run.py as Markdown tables, for docs/gpu.md.

python -m benchmarks.gpu.table FOLDER/result.json
"""

import json
import sys
from pathlib import Path
from typing import Any

DATA_SHEET = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Part of a card's name -> dense bfloat16 FLOPs a second of its data sheet; the first that fits counts."""
FLOAT32_BOUNDS = (1e-5, 1e-3)
"""Largest relative errors of loss and gradients in float32."""
BFLOAT16_FACTOR = 2.0
"""Errors in bfloat16 may be this many times those of the CPU in bfloat16."""
SMALLEST_BOUND = 1e-3
"""Bound of errors in bfloat16 where those of the CPU happen to be smaller; a bfloat16 number has 8 bits."""
PROFILE_ROWS = 25
TB, GB = 1e12, 1e9


def format_tables(result: dict[str, Any]) -> str:
    """Return all tables of a result, and the reasons of what is missing."""
    sections = [
        describe(result), format_throughput(result), format_correctness(result), format_ceilings(result),
        format_profile(result), format_missing(result),
    ]  # fmt: skip
    return "\n\n".join(filter(None, sections)) + "\n"


def find(result: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    """Return what the checks of a part found, by the check's name. Unfinished checks may have found something too."""
    return {
        name: record["found"]
        for name, record in result["checks"].items()
        if record["part"] == part and record.get("found")
    }


def describe(result: dict[str, Any]) -> str:
    """Return a line that names the device, its memory and the versions of packages."""
    machine = result["machine"]
    memory = f", {machine['memory_bytes'] / GB:.0f} GB" if machine["memory_bytes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    size = " Toy sizes: the figures say nothing about speed." if result["toy"] else ""
    return f"{machine['device']}{memory}; CUDA {machine['cuda']}, Python {machine['python']}, {versions}.{size}"


def format_throughput(result: dict[str, Any]) -> str:
    """Return tokens a second, MFU of both peaks, and memory beside its estimate."""
    rows = []
    measured_peak = find(result, "ceilings").get("ceilings", {}).get("matmul_flops")
    sheet_peak = next((peak for name, peak in DATA_SHEET.items() if name in result["machine"]["device"]), None)
    for name, found in find(result, "throughput").items():
        if "tokens_a_second" not in found:
            continue
        flops = found["tokens_a_second"] * found["flops_a_token"]
        peak = found["peak_bytes"]
        rows.append(
            (
                name, f"{found['tokens_a_second']:,.0f}", share(flops, measured_peak), share(flops, sheet_peak),
                f"{peak / GB:.1f}" if peak else "-", f"{found['estimated_bytes'] / GB:.1f}",
                f"{peak / found['estimated_bytes']:.2f}" if peak else "-",
                f"{found['first_step_seconds']:.0f}", str(found["steps"]),
            )
        )  # fmt: skip
    head = (
        "training", "tokens/s", "MFU of the measured peak", "of the data sheet's", "peak memory, GB", "estimate, GB",
        "peak / estimate", "first step, s", "steps timed",
    )  # fmt: skip
    return make_table(head, rows)


def share(value: float, whole: float | None) -> str:
    """Return a share in percent, or a dash where the whole is not known."""
    return f"{value / whole:.1%}" if whole else "-"


def format_correctness(result: dict[str, Any]) -> str:
    """Return the errors against float64 with their bounds, and the bits of QAT that differ."""
    found = find(result, "correctness")
    cpu = found.get("training, on the CPU", {})
    rows = []
    for name, case in found.get("training, on this device", {}).items():
        if "traceback" in case:
            rows.append((name, "-", "-", "-", "-", "-", "failed"))
            continue
        bounds = find_bounds(name, cpu.get(name))
        stated = " and ".join(f"{bound:.1e}" for bound in bounds or ()) or "-"
        errors = case["loss_error"], case["gradient_error"]
        good = bounds and errors[0] <= bounds[0] and errors[1] <= bounds[1] and case["repeatable"]
        rows.append(
            (
                name, f"{errors[0]:.1e}", f"{errors[1]:.1e}", stated,
                f"{case['tokens_routed_otherwise']:.0f} of {case['choices']:,}", "yes" if case["repeatable"] else "no",
                "yes" if good else "unknown" if bounds is None else "no",
            )
        )  # fmt: skip
    head = (
        "against float64", "error of the loss", "largest error of a gradient", "bounds", "choices of other experts",
        "second pass has the same bits", "good",
    )  # fmt: skip
    bits = [(name, f"{case['values']:,}", f"{case['different']:,}") for name, case in found.get("QAT bits", {}).items()]
    tables = (make_table(head, rows), make_table(("QAT's weights against the exporter's", "values", "different"), bits))
    return "\n\n".join(filter(None, tables))


def find_bounds(name: str, on_cpu: dict[str, Any] | None) -> tuple[float, float] | None:
    """Return the bounds of a case's errors of loss and gradients; None where the CPU's errors are not known."""
    if name.startswith("float32"):
        return FLOAT32_BOUNDS
    if on_cpu is None or "traceback" in on_cpu:
        return None
    errors = (on_cpu["loss_error"], on_cpu["gradient_error"])
    loss, gradient = (max(BFLOAT16_FACTOR * error, SMALLEST_BOUND) for error in errors)
    return loss, gradient


def format_ceilings(result: dict[str, Any]) -> str:
    """Return the most that the device reaches, in TFLOP/s and TB/s."""
    found = find(result, "ceilings").get("ceilings", {})
    units = {"_flops": "TFLOP/s", "_bytes": "TB/s"}
    rows = [
        (name[:-6].replace("_", " "), f"{value / TB:.3g} {units[name[-6:]]}")
        for name, value in found.items()
        if name[-6:] in units
    ]
    return make_table(("ceiling", "measured"), rows)


def format_profile(result: dict[str, Any]) -> str:
    """Return the longest kernels of a step."""
    for name, found in find(result, "profile").items():
        total = found["kernel_seconds"] * 1e3
        rows = [
            (f"`{shorten(kernel['name'])}`", f"{kernel['milliseconds']:.2f}", share(kernel["milliseconds"], total),
             str(kernel["calls"]))
            for kernel in found["kernels"][:PROFILE_ROWS]
        ]  # fmt: skip
        rest = total - sum(kernel["milliseconds"] for kernel in found["kernels"][:PROFILE_ROWS])
        rows.append(("all others", f"{rest:.2f}", share(rest, total), ""))
        busy = share(found["kernel_seconds"], found["step_seconds"])
        head = (f"{name}: kernels are {busy} of {found['step_seconds'] * 1e3:.0f} ms", "ms", "share", "calls")
        return make_table(head, rows)
    return ""


def shorten(name: str) -> str:
    """Return a kernel's name without what breaks a table, at most 90 characters of it."""
    name = name.replace("|", "/").replace("`", "'")
    return name if len(name) <= 90 else f"{name[:87]}..."


def format_missing(result: dict[str, Any]) -> str:
    """Return a line with the reason for each check that did not end well; result.json has the traceback."""
    lines = []
    for name, record in result["checks"].items():
        if record["status"] != "done":
            reason = record.get("reason") or record["found"]["skipped"]
            lines.append(f"- {name}: {record['status']}. {reason.splitlines()[0]}")
    return "\n".join(lines)


def make_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table whose columns after the first are aligned to the right; empty without rows."""
    if not rows:
        return ""
    lines = [head, ("---", *("--:",) * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(format_tables(json.loads(Path(sys.argv[1]).read_text())))
