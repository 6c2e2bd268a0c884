"""The harness scores a Hugging Face folder on benchmarks through lm-eval and writes one result file a benchmark.

Scores shift between harness versions and prompts. So every result carries what it depends on: versions of lm-eval and
transformers, the version of the task, a hash of every prompt and target as rendered, the hash of the model's files and
of the items. A finished benchmark is computed again only when one of these changes.
"""

import os

# lm-eval and datasets read these when they are imported. Everything the harness reads is on the disk.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import hashlib
import inspect
import io
import json
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
import zstandard
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

import eval.hf_mobilemoe  # noqa: F401  registers MobileMoE with the Auto classes
from core.atomic import write_bytes, write_json
from core.errors import RefusedInput, refuse_value_errors
from core.hashing import sha256_file
from core.progress import Progress
from eval import compat
from eval.benchmarks.prefix_lm import PrefixLM
from eval.benchmarks.suites import Benchmark, get_suite
from eval.benchmarks.tasks import build_tasks, load_task_configs
from eval.compute_dtype import choose_dtype
from eval.config import EvaluationConfig
from eval.export.tensor_files import check_config

VERSIONS = {name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")}
"""Versions that a result depends on."""
SEED = 1234
"""Seed of the few-shot sampler: every model gets the same examples."""


def evaluate(
    model_dir: Path, *, items: Path, out: Path, config: EvaluationConfig, progress: Progress
) -> dict[str, dict]:
    """Score a Hugging Face folder (config.json, safetensors, tokenizer) on the benchmarks of a suite.

    Args:
        items: folder that `eval.benchmarks.items.prepare` wrote. Benchmarks without items there are left out.
        out: gets `<benchmark>.json` and `<benchmark>.samples.jsonl.zst`, each as its benchmark completes; a result
            whose fingerprint (model files, items, limit, dtype, task configuration, versions) holds is not computed
            again.
        progress: called with the benchmark's key as the phase.

    Returns:
        benchmark key -> result with value (fraction), stderr, items, shots, metric, chance, truncated, notes, ...

    Raises:
        RefusedInput: the folder holds no model, the items are missing, or the suite or the limit is none.
    """
    suite = get_suite(config.suite)
    _check_input(model_dir, items, config)
    prepared = json.loads((items / "items.json").read_text())["rows"]
    benchmarks = [benchmark for benchmark in suite if benchmark.key in prepared]
    datasets.disable_progress_bars()
    out.mkdir(parents=True, exist_ok=True)
    model_sha256 = hash_files(path for path in model_dir.iterdir() if path.is_file())
    items_sha256 = hash_files([items / "items.json"])
    dtype = choose_dtype(model_dir)
    results: dict[str, dict] = {}
    lm = None
    for done, benchmark in enumerate(benchmarks):
        progress(benchmark.key, done, len(benchmarks))
        identity = {
            "model_sha256": model_sha256,
            "items_sha256": items_sha256,
            "limit": config.limit,
            "dtype": dtype,
            "versions": VERSIONS,
            # An absolute folder that is the same everywhere: neither the place of the items nor the working directory
            # is a part of the identity.
            "task_sha256": _hash_value([benchmark.describe(), load_task_configs(benchmark, Path("/items"))]),
        }
        path = out / f"{benchmark.key}.json"
        if path.exists() and identity.items() <= (known := json.loads(path.read_text())).items():
            results[benchmark.key] = known
            continue
        lm = lm or load_model(model_dir, config.batch_tokens)
        result, samples = run_benchmark(lm, benchmark, items, config.limit)
        results[benchmark.key] = result | identity
        write_bytes(out / f"{benchmark.key}.samples.jsonl.zst", _compress_samples(samples))
        write_json(path, results[benchmark.key])
    progress("evaluate", len(benchmarks), len(benchmarks))
    return results


def _check_input(model_dir: Path, items: Path, config: EvaluationConfig) -> None:
    if not (model_dir / "config.json").is_file():
        raise RefusedInput(f"evaluate: {model_dir} has no config.json; give a Hugging Face model folder")
    if not (items / "items.json").is_file():
        raise RefusedInput(
            f"evaluate: {items} has no items.json; run the data step (eval.benchmarks.items.prepare) first"
        )
    if config.limit is not None and config.limit < 1:
        raise RefusedInput(f"evaluation.limit: {config.limit} items a task; give at least 1, or None for all")


def load_model(model_dir: Path, batch_tokens: int) -> PrefixLM:
    """Load model and tokenizer of a Hugging Face folder onto the GPU, or the CPU of a machine without one.

    It computes in the dtype of `eval.compute_dtype.choose_dtype`.

    No code from the folder is run: MobileMoE's classes are this project's own.

    Raises:
        RefusedInput: the folder's configuration or tensors are not those of a model that transformers reads.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_config(model_dir)
    with refuse_value_errors():
        dtype = choose_dtype(model_dir)
        return PrefixLM(
            pretrained=str(model_dir), backend="causal", device=device, dtype=dtype, batch_tokens=batch_tokens
        )


def run_benchmark(lm: HFLM, benchmark: Benchmark, items: Path, limit: int | None) -> tuple[dict, list[dict]]:
    """Score a model on one benchmark and return its result (without fingerprint) and its per-item samples.

    The value of a benchmark of several tasks (MMLU, BBH) is the mean over all items: lm-eval's group score weighted by
    size. Its standard error is that of a mean of all items.
    """
    start = time.perf_counter()
    tasks = build_tasks(benchmark, items)
    allocated = allocate_items(limit, [len(task.eval_docs) for task in tasks])
    counts = {task.task_name: count for task, count in zip(tasks, allocated, strict=True) if count}
    tasks = [task for task in tasks if task.task_name in counts]
    max_gen_toks = _limit_generation(tasks, lm.max_length)
    for task in tasks:
        task.set_fewshot_seed(seed=SEED)
    evaluated = compat.evaluate_tasks(lm, tasks, {name: range(count) for name, count in counts.items()})
    metric, metric_filter = benchmark.metric.split(",")
    samples = [
        {"task": name} | sample
        for name in counts
        for sample in evaluated["samples"][name]
        if sample["filter"] == metric_filter
    ]
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
        "other_metrics": _average_metrics(evaluated["results"], counts),
        "task_version": tasks[0].VERSION,
        "prompts_sha256": _hash_value([[sample["arguments"], sample["target"]] for sample in samples]),
        "notes": notes,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return result, samples


def allocate_items(limit: int | None, sizes: list[int]) -> list[int]:
    """Return the number of items to take from each task of a benchmark: `limit` altogether, as evenly as sizes allow.

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


def _limit_generation(tasks: list[ConfigurableTask], max_length: int) -> int | None:
    """Bound generated tokens to half the context, so that a prompt remains, and return the bound in force."""
    bound = None
    for task in tasks:
        if task.OUTPUT_TYPE == "generate_until":
            bound = min(task.config.generation_kwargs["max_gen_toks"], max_length // 2)
            task.config.generation_kwargs["max_gen_toks"] = bound
    return bound


def _is_truncated(lm: HFLM, arguments: list[tuple]) -> bool:
    """Return whether lm-eval cuts the left end of any of an item's prompts off, to fit the model's context."""
    for context, rest in arguments:
        if isinstance(rest, dict):
            if len(lm.tok_encode(context)) > lm.max_length - rest["max_gen_toks"]:
                return True
        else:
            context_tokens, continuation_tokens = compat.encode_pair(lm, context, rest)
            # One more than the context: the last token is a target only.
            if len(context_tokens) + len(continuation_tokens) > lm.max_length + 1:
                return True
    return False


def _average_metrics(results: dict[str, dict], counts: dict[str, int]) -> dict[str, float]:
    """Return every number that lm-eval gives for a benchmark, over its tasks weighted by their items."""
    total = sum(counts.values())
    names = [n for n, v in results[next(iter(counts))].items() if "," in n and isinstance(v, float | int)]
    return {n: sum(results[task][n] * count for task, count in counts.items()) / total for n in names}


def read_samples(path: Path) -> list[dict]:
    """Read the per-item log of a benchmark, as `evaluate` wrote it."""
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _compress_samples(samples: list[dict]) -> bytes:
    """Return the per-item log: one JSON object a line (task, document, prompts, answers, metrics), zstd."""
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor(level=6).stream_writer(buffer, closefd=False) as stream:
        for sample in samples:
            line = json.dumps(sample, ensure_ascii=False, default=compat.make_serializable)
            stream.write(line.encode() + b"\n")
    return buffer.getvalue()


def hash_files(files: Iterable[Path]) -> str:
    """Return one SHA-256 over the names and contents of files, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _hash_value(value: object) -> str:
    """Return the SHA-256 of a JSON-like value; a function in it counts as its source."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=inspect.getsource).encode()).hexdigest()
