"""This module measures speed and memory of an artifact on this machine, on real prompts: `mobilemoe profile`.

An artifact is a folder: an ExecuTorch program (model.pte), or a Hugging Face folder, INT4 or BF16. Every pair of domain
and context is measured in a process of its own (eval/device/profile_worker.py); the figures are medians over its
repetitions.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from core.atomic import write_json
from core.errors import RefusedInput
from core.progress import Progress, ignore_progress
from eval.compute_dtype import choose_float_dtype
from eval.config import N_ANSWER
from eval.device import prompts
from eval.export.tensor_files import read_config
from eval.hf_mobilemoe.checkpoint_mobilemoe import tensor_shapes
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.folder_mobilemoe import read_json

CONTEXTS = (512, 1024, 2048, 4096)
"""Numbers of tokens of prompt and answer that are measured by default."""
MOST_REPETITIONS = 1000
TIMEOUT_SECONDS = 1800
"""Time limit of one measuring process."""


def profile(
    artifact: Path,
    out: Path,
    *,
    texts: Mapping[str, str] | None = None,
    contexts: Iterable[int] | None = None,
    repetitions: int = 3,
    threads: int | None = None,
    progress: Progress = ignore_progress,
) -> dict[str, Any]:
    """Measure an artifact and write `profile.json`, `speed.png` and `memory.png` into `out`.

    Args:
        artifact: folder of an ExecuTorch program or a Hugging Face model, or the .pte file.
        texts: domain -> prompt text; None takes the three of `eval.device.prompts`.
        contexts: numbers of tokens of prompt and answer together; None takes those of `CONTEXTS` that fit the artifact.
        repetitions: number of runs in each process; their median is reported.
        threads: number of threads of the runtime; None takes the runtime's own choice.

    Returns:
        The content of profile.json: the artifact, the machine, and `measurements`, one for each domain and context.

    Raises:
        RefusedInput: the folder is not an artifact, a context is too short for an answer or longer than the
            artifact's, there is no prompt, or a number is out of its range.
        RuntimeError: a measuring process failed.
    """
    artifact = artifact.parent if artifact.suffix == ".pte" else artifact
    check_numbers(repetitions, threads)
    about = describe(artifact)
    chosen = choose_contexts(contexts, about["context"])
    texts = prompts.load_texts() if texts is None else texts
    ids = prompts.tokenize(artifact, texts, about["vocab_size"], max(chosen))
    todo = [(domain, context) for context in chosen for domain in ids]
    measurements = []
    for i, (domain, context) in enumerate(todo):
        progress(f"{domain}, {context} tokens", i, len(todo))
        spec = {"artifact": str(artifact), "tokens": ids[domain][:context], "n_answer": N_ANSWER,
                "repetitions": repetitions, "threads": threads}  # fmt: skip
        measurements.append({"domain": domain, "context": context} | _figures(_measure(spec), context, about))
    result = {
        "artifact": about, "machine": {"cpu": _cpu_name(), "python": platform.python_version(), "threads": threads},
        "repetitions": repetitions, "measurements": measurements,
    }  # fmt: skip
    write_json(out / "profile.json", result)
    _draw(result, out)
    return result


def check_numbers(repetitions: int, threads: int | None) -> None:
    """Check how often and on how many threads is measured; raise RefusedInput for a number out of its range."""
    if not 1 <= repetitions <= MOST_REPETITIONS:
        raise RefusedInput(f"--repetitions {repetitions}: give 1 to {MOST_REPETITIONS}")
    processors = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= processors:
        raise RefusedInput(f"--threads {threads}: give 1 to {processors}, the processors of this machine")


def choose_contexts(contexts: Iterable[int] | None, room: int) -> list[int]:
    """Return the contexts to measure, ascending, each once.

    Args:
        contexts: numbers of tokens; None takes those of `CONTEXTS` that fit.
        room: tokens of the artifact's context.

    Raises:
        RefusedInput: there is none, or one is too short for an answer or longer than `room`.
    """
    chosen = [c for c in CONTEXTS if c <= room] or [room] if contexts is None else sorted(set(contexts))
    if not chosen:
        raise RefusedInput(f"--contexts: give numbers of tokens, more than {N_ANSWER} and at most {room}")
    for context in chosen:
        if not N_ANSWER < context <= room:
            raise RefusedInput(
                f"--contexts {context}: the artifact takes more than {N_ANSWER} and at most {room} tokens"
            )
    return chosen


def describe(artifact: Path) -> dict[str, Any]:
    """Return format, context and bytes of an artifact's folder, from its files; the model is not loaded."""
    if (artifact / "model.pte").is_file():
        if not (artifact / "program.json").is_file():
            raise RefusedInput(f"{artifact} has no program.json; give the whole folder that `mobilemoe export` wrote")
        settings = json.loads((artifact / "program.json").read_text(encoding="utf-8"))
        constants = settings["constant_methods"]
        return {
            "folder": artifact.name, "format": f"ExecuTorch, {settings['expert_op'] or 'dense'}",
            "file_bytes": (artifact / "model.pte").stat().st_size, "context": constants["get_max_context_len"],
            "vocab_size": constants["get_vocab_size"], "n_layers": constants["get_n_layers"], **settings["weights"],
        }  # fmt: skip
    config = read_config(artifact)
    if read_json(artifact / "config.json")["model_type"] != config.model_type:
        raise RefusedInput(f"{artifact} is run by transformers' own code, which is not measured; give the bf16 folder")
    dtype = choose_float_dtype(artifact)
    name = str(dtype).removeprefix("torch.")
    kind = "floats" if config.quantization is None else "INT4, dequantized"
    return {
        "folder": artifact.name, "format": f"{kind}, computed in {name}",
        "file_bytes": sum(p.stat().st_size for p in artifact.glob("*.safetensors")),
        "context": config.max_position_embeddings, "vocab_size": config.vocab_size,
        "n_layers": config.num_hidden_layers, **count_float_bytes(config, dtype.itemsize),
    }  # fmt: skip


def count_float_bytes(config: MobileMoEConfig, itemsize: int) -> dict[str, int]:
    """Return the bytes of an unquantized model that a forward pass reads, with the keys of `count_weight_bytes`.

    The embedding counts as the output projection: all of it is read for every token's logits.

    Args:
        itemsize: bytes of a value.
    """
    shapes = tensor_shapes(config)
    experts = sum(prod(shape) for name, shape in shapes.items() if ".experts." in name)
    rest = sum(prod(shape) for shape in shapes.values()) - experts
    n_experts = config.num_local_experts * config.num_hidden_layers
    return {
        "dense_bytes": itemsize * rest,
        "expert_bytes": itemsize * experts // n_experts,
        "experts_a_token": config.num_experts_per_tok,
    }


def _measure(spec: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "eval.device.profile_worker"]
    # Over the pipe: a prompt of 32,768 tokens is longer than an argument of a process may be.
    done = subprocess.run(
        command, input=json.dumps(spec), capture_output=True, encoding="utf-8", errors="backslashreplace",
        timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"measuring {spec['artifact']} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _figures(raw: dict[str, Any], context: int, about: dict[str, Any]) -> dict[str, Any]:
    n_prompt = context - N_ANSWER
    prefill, decode = median(raw["prefill_seconds"]), median(raw["decode_seconds"])
    read = raw["experts_read"]
    by_answer = about["experts_a_token"] * about["n_layers"] if read is None else read["answer"] / N_ANSWER
    return {
        "load_seconds": raw["load_seconds"],
        "ttft_seconds": prefill,
        "prefill_tokens_per_second": n_prompt / prefill,
        "decode_tokens_per_second": N_ANSWER / decode,
        "peak_rss_bytes": raw["peak_bytes"],
        "floor_rss_bytes": raw["floor_bytes"],
        "weight_bytes_a_decoded_token": round(about["dense_bytes"] + by_answer * about["expert_bytes"]),
        "weight_bytes_of_the_prompt": read and about["dense_bytes"] + read["prompt"] * about["expert_bytes"],
    }


def format_table(result: dict[str, Any]) -> Table:
    """Return the measurements as a table for the terminal."""
    about = result["artifact"]
    out = Table(title=f"{about['folder']} ({about['format']}, {about['file_bytes'] / 1e6:,.1f} MB)")
    columns = (
        "prompt",
        "context",
        "load s",
        "TTFT s",
        "prefill tok/s",
        "decode tok/s",
        "peak MB",
        "above floor",
        "MB/token",
    )
    for column in columns:
        out.add_column(column, justify="left" if column == "prompt" else "right")
    for m in result["measurements"]:
        out.add_row(
            m["domain"], str(m["context"]), f"{m['load_seconds']:.2f}", f"{m['ttft_seconds']:.3f}",
            f"{m['prefill_tokens_per_second']:,.0f}", f"{m['decode_tokens_per_second']:,.1f}",
            f"{m['peak_rss_bytes'] / 1e6:,.0f}", f"{(m['peak_rss_bytes'] - m['floor_rss_bytes']) / 1e6:,.0f}",
            f"{m['weight_bytes_a_decoded_token'] / 1e6:,.1f}",
        )  # fmt: skip
    return out


def _draw(result: dict[str, Any], out: Path) -> None:
    panels = {
        "speed.png": (
            ("prefill_tokens_per_second", "prefill, tokens/s"),
            ("decode_tokens_per_second", "decode, tokens/s"),
        ),
        "memory.png": (("peak_rss_bytes", "peak resident, bytes"), ("ttft_seconds", "time to first token, s")),
    }
    domains = list(dict.fromkeys(m["domain"] for m in result["measurements"]))
    for name, keys in panels.items():
        # matplotlib would read a `$` in a folder's or a domain's name as the begin of a formula.
        with plt.rc_context({"text.parse_math": False}):
            _draw_panels(result, domains, keys, out / name)


def _draw_panels(result: dict[str, Any], domains: list[str], keys: tuple[tuple[str, str], ...], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, (key, label) in zip(axes, keys, strict=True):
        for domain in domains:
            points = [(m["context"], m[key]) for m in result["measurements"] if m["domain"] == domain]
            axis.plot(*zip(*points, strict=True), marker="o", label=domain)
        axis.set(xlabel="prompt and answer, tokens", ylabel=label, ylim=(0, None))
    # With its lines named, it shows labels that begin with an underscore too.
    axes[0].legend(axes[0].get_lines(), domains)
    figure.suptitle(f"{result['artifact']['folder']}, {result['artifact']['format']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
