"""Benchmarks of a Hugging Face folder through lm-eval, one result file a benchmark.

Scores shift between harness versions and prompts. So every result carries what it depends on: versions of lm-eval and
transformers, the version of the task, a hash of every prompt and target as rendered, the hash of the model's files and
of the items. A finished benchmark is computed again only when one of these changes.
"""

import os

from core.errors import RefusedInput

# lm-eval and datasets read these when they are imported. Everything the harness reads is on the disk.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import hashlib
import inspect
import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import datasets
import lm_eval
import torch
import zstandard
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

import eval.hf_mobilemoe  # noqa: F401  registers MobileMoE with the Auto classes
from eval.benchmarks.suites import Benchmark, suite
from eval.benchmarks.tasks import build_tasks, task_configs
from eval.config import EvaluationConfig

VERSIONS = {name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")}
SEED = 1234
"""Of the few-shot sampler: the same examples for every model."""


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over names and contents, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _hash(value: object) -> str:
    """sha256 of a JSON-like value; a function in it counts as its source."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=inspect.getsource).encode()).hexdigest()


def load_model(model_dir: Path, batch_size: int) -> HFLM:
    """The model and tokenizer of a HF folder on the GPU, or on the CPU where there is none.

    No code out of the folder is run: MobileMoE's classes are this project's own.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFLM(pretrained=str(model_dir), backend="causal", device=device, dtype="auto", batch_size=batch_size)


def spread(limit: int | None, sizes: list[int]) -> list[int]:
    """How many items each task of a benchmark gives, `limit` altogether, as evenly as their sizes allow.

    lm-eval's own limit counts per subject: 20 would mean 1,140 items of MMLU.
    """
    if limit is None or limit >= sum(sizes):
        return sizes
    counts = [0] * len(sizes)
    # Tasks in an order in which any first k of them are spread over the whole list.
    order = sorted(range(len(sizes)), key=lambda i: (i * limit) % len(sizes))
    while limit:
        for i in [i for i in order if counts[i] < sizes[i]][:limit]:
            counts[i] += 1
            limit -= 1
    return counts


def _fit_generation(tasks: list[ConfigurableTask], max_length: int) -> int | None:
    """Bound generated tokens to half the context, so that a prompt remains; returns the bound in force."""
    bound = None
    for task in tasks:
        if task.OUTPUT_TYPE == "generate_until":
            bound = min(task.config.generation_kwargs["max_gen_toks"], max_length // 2)
            task.config.generation_kwargs["max_gen_toks"] = bound
    return bound


def _is_truncated(lm: HFLM, arguments: list[tuple]) -> bool:
    """Whether lm-eval cuts the left end of any of an item's prompts off, to fit the model's context."""
    for context, rest in arguments:
        if isinstance(rest, dict):
            if len(lm.tok_encode(context)) > lm.max_length - rest["max_gen_toks"]:
                return True
        else:
            context_tokens, continuation_tokens = lm._encode_pair(context, rest)
            if len(context_tokens) + len(continuation_tokens) > lm.max_length + 1:
                return True
    return False


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _samples_file(samples: list[dict]) -> bytes:
    """Per-item log: one JSON object a line (task, document, prompts, answers, metrics), zstd."""
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor(level=6).stream_writer(buffer, closefd=False) as stream:
        for sample in samples:
            line = json.dumps(sample, ensure_ascii=False, default=handle_non_serializable)
            stream.write(line.encode() + b"\n")
    return buffer.getvalue()


def read_samples(path: Path) -> list[dict]:
    """The per-item log of a benchmark, as `evaluate` wrote it."""
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def run_benchmark(lm: HFLM, benchmark: Benchmark, items: Path, limit: int | None) -> tuple[dict, list[dict]]:
    """One benchmark: its result (without fingerprint) and its per-item samples.

    Of a benchmark of several tasks (MMLU, BBH) the value is the mean over all items, i.e. lm-eval's group score
    weighted by size; the standard error is that of a mean of all items.
    """
    start = time.perf_counter()
    tasks = build_tasks(benchmark, items)
    counts = spread(limit, [len(task.eval_docs) for task in tasks])
    chosen = {task.task_name: count for task, count in zip(tasks, counts, strict=True) if count}
    tasks = [task for task in tasks if task.task_name in chosen]
    max_gen_toks = _fit_generation(tasks, lm.max_length)
    for task in tasks:
        task.set_fewshot_seed(seed=SEED)
    # Not simple_evaluate, which would describe the machine for every benchmark: pip, compilers, drivers, for seconds.
    results = lm_eval.evaluate(
        lm,
        task_dict=TaskManager(include_defaults=False).load(tasks),
        samples={name: list(range(count)) for name, count in chosen.items()},
        bootstrap_iters=0,
    )
    metric, metric_filter = benchmark.metric.split(",")
    samples = [{"task": name} | s for name in chosen for s in results["samples"][name] if s["filter"] == metric_filter]
    values = [float(sample[metric]) for sample in samples]
    truncated = sum(_is_truncated(lm, sample["arguments"]) for sample in samples)
    notes = [benchmark.note] if benchmark.note else []
    if truncated:
        notes.append(f"{truncated} of {len(samples)} prompts cut on the left to fit {lm.max_length} tokens.")
    result = {
        "benchmark": benchmark.key,
        "title": benchmark.title,
        "category": benchmark.category,
        "metric": benchmark.metric,
        "shots": benchmark.shots,
        "value": mean(values),
        "stderr": mean_stderr(values) if len(values) > 1 else None,
        "items": len(values),
        "chance": benchmark.chance,
        "truncated": truncated,
        "max_gen_toks": max_gen_toks,
        "other_metrics": _other_metrics(results, chosen),
        "task_version": tasks[0].VERSION,
        "prompts_sha256": _hash([[s["arguments"], s["target"]] for s in samples]),
        "notes": notes,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return result, samples


def _other_metrics(results: dict, chosen: dict[str, int]) -> dict[str, float]:
    """Every number lm-eval gives for the benchmark, over its tasks weighted by their items."""
    total = sum(chosen.values())
    names = [n for n, v in results["results"][next(iter(chosen))].items() if "," in n and isinstance(v, float | int)]
    return {n: sum(results["results"][task][n] * count for task, count in chosen.items()) / total for n in names}


def evaluate(
    model_dir: Path,
    *,
    items: Path,
    out: Path,
    config: EvaluationConfig,
    report: Callable[[str, int, int], None],
) -> dict:
    """Run a suite on a HF folder (config.json, safetensors, tokenizer).

    Args:
        items: what `eval.benchmarks.items.prepare` wrote.
        out: gets `<benchmark>.json` and `<benchmark>.samples.jsonl.zst`, each as its benchmark completes; a result
            whose fingerprint (model files, items, limit, task configuration, versions) holds is not computed again.
        report: progress, as (benchmark, done, total).

    Returns {benchmark key: result} of the benchmarks that have items (see `eval.benchmarks.items.prepare`); a result has value,
    stderr, items, shots, metric, chance, truncated, notes, ...
    Raises RefusedInput if the folder is no model, the items are missing or the suite is unknown.
    """
    wanted = suite(config.suite)
    if not (model_dir / "config.json").is_file():
        raise RefusedInput(f"evaluate: {model_dir} has no config.json; give a Hugging Face model folder")
    if not (items / "items.json").is_file():
        raise RefusedInput(
            f"evaluate: {items} has no items.json; run the data step (eval.benchmarks.items.prepare) first"
        )
    if config.limit is not None and config.limit < 1:
        raise RefusedInput(f"evaluation.limit: {config.limit} items a task; give at least 1, or None for all")
    there = json.loads((items / "items.json").read_text())["rows"]
    benchmarks = [benchmark for benchmark in wanted if benchmark.key in there]
    datasets.disable_progress_bars()
    out.mkdir(parents=True, exist_ok=True)
    model_sha256 = hash_files(path for path in model_dir.iterdir() if path.is_file())
    items_sha256 = hash_files([items / "items.json"])
    results: dict[str, dict] = {}
    lm = None
    for done, benchmark in enumerate(benchmarks):
        report(benchmark.key, done, len(benchmarks))
        identity = {
            "model_sha256": model_sha256,
            "items_sha256": items_sha256,
            "limit": config.limit,
            "versions": VERSIONS,
            "task_sha256": _hash([asdict(benchmark), task_configs(benchmark, Path("items"))]),
        }
        path = out / f"{benchmark.key}.json"
        if path.exists() and identity.items() <= (known := json.loads(path.read_text())).items():
            results[benchmark.key] = known
            continue
        lm = lm or load_model(model_dir, config.batch_size)
        result, samples = run_benchmark(lm, benchmark, items, config.limit)
        results[benchmark.key] = result | identity
        _write_whole(out / f"{benchmark.key}.samples.jsonl.zst", _samples_file(samples))
        _write_whole(path, json.dumps(results[benchmark.key], indent=2).encode() + b"\n")
    report("evaluate", len(benchmarks), len(benchmarks))
    return results
