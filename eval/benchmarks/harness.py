"""The harness scores a Hugging Face folder on benchmarks through lm-eval and writes one result file a benchmark.

Scores shift between harness versions and prompts. So every result carries what it depends on: versions of lm-eval and
transformers, the version of the task, a hash of every prompt and target as rendered, the hash of the model's files and
of the items. A finished benchmark, or a finished slice of one, is computed again only when one of these changes.
"""

import os

# lm-eval and datasets read these when they are imported. Everything the harness reads is on the disk.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch

import eval.hf_mobilemoe  # noqa: F401  registers MobileMoE with the Auto classes
from core.atomic import write_bytes, write_json
from core.errors import RefusedInput, refuse_value_errors
from core.hashing import sha256_file
from core.progress import Progress
from eval.benchmarks import requirements
from eval.benchmarks.int8_activations import round_activations
from eval.benchmarks.prefix_lm import PrefixLM
from eval.benchmarks.scoring import BenchmarkTasks, hash_value, summarize
from eval.benchmarks.slices import SliceFolder, compress_samples, cut_benchmark
from eval.benchmarks.suites import LARGER, Benchmark, get_suite
from eval.benchmarks.tasks import load_task_configs
from eval.compute_dtype import choose_dtype
from eval.config import EvaluationConfig
from eval.export.tensor_files import check_config

VERSIONS = {name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")}
"""Versions that a result depends on."""


def evaluate(
    model_dir: Path, *, items: Path, out: Path, config: EvaluationConfig, progress: Progress, base: bool = False
) -> dict[str, dict]:
    """Score a Hugging Face folder (config.json, safetensors, tokenizer) on the benchmarks of a suite, in this process.

    Args:
        items: folder that `eval.benchmarks.items.prepare` wrote. Benchmarks without items there are left out.
        out: gets `<benchmark>.json` and `<benchmark>.samples.jsonl.zst`, each as its benchmark completes; a result
            whose fingerprint (model files, items, limit, dtype, task configuration, versions) holds is not computed
            again.
        progress: called with the benchmark's key as the phase, and numbers of items.
        base: whether it is a base model, which has seen no chat template: it gets plain prompts where the suite's are
            rendered by one.

    Returns:
        benchmark key -> result with value (fraction), stderr, items, values (of every item, in order), shots, metric,
        chance, truncated, notes, ...

    Raises:
        RefusedInput: the folder holds no model, the items are missing, or the suite or the limit is none.
    """
    evaluation = Evaluation(model_dir, items=items, out=out, config=config, base=base)
    total = evaluation.count_items()
    evaluation.score(lambda key: progress(key, evaluation.count_done(), total))
    return evaluation.finish()


class Evaluation:
    """The benchmarks of a suite on one model. Several processes may score the slices of one evaluation at once."""

    def __init__(self, model_dir: Path, *, items: Path, out: Path, config: EvaluationConfig, base: bool = False):
        """Check the input; the model is loaded when the first slice is scored. Arguments are those of `evaluate`."""
        self._benchmarks, counts = choose_benchmarks(model_dir, items, config, base=base)
        self._model_dir, self._items, self._out, self._config, self._base = model_dir, items, out, config, base
        self._parts = {key: cut_benchmark(key, count) for key, count in counts.items()}
        self._slices = SliceFolder(out / "slices")
        datasets.disable_progress_bars()

    def count_items(self) -> int:
        """Return the number of items of all benchmarks."""
        return sum(len(part) for parts in self._parts.values() for part in parts)

    def count_done(self) -> int:
        """Return how many of them are scored, by any process."""
        return sum(
            len(part)
            for benchmark in self._benchmarks
            for part in self._parts[benchmark.key]
            if self._read_result(benchmark) or self._slices.read(part, self._identify(benchmark))
        )

    def score(self, show: Callable[[str], None], owner: str | None = None) -> None:
        """Score what is neither scored nor taken by another process, and join the benchmarks that are complete.

        Benchmarks whose answers are generated come first: their slices take longest, and the last ones decide how long
        some processes wait for the others.

        Args:
            show: called with the benchmark's key before and after each slice.
            owner: name of this process among those that score at once; None if it is the only one.
        """
        lm = None
        for benchmark in sorted(self._benchmarks, key=lambda benchmark: benchmark.chance > 0):
            if self._read_result(benchmark):
                continue
            identity = self._identify(benchmark)
            for part in self._parts[benchmark.key]:
                if self._slices.read(part, identity) or (owner and not self._slices.take(part, owner)):
                    continue
                show(benchmark.key)
                lm = lm or load_model(self._model_dir, self._config.batch_tokens, self._config.activations)
                facts, samples = self._build(benchmark).score(lm, part)
                facts |= {"context": lm.max_length}
                self._slices.write(part, facts | identity, samples)
                show(benchmark.key)
            self._join(benchmark)

    def is_finished(self) -> bool:
        """Return whether every benchmark has its result."""
        return all(self._read_result(benchmark) for benchmark in self._benchmarks)

    def finish(self) -> dict[str, dict]:
        """Return all results, in the order of the suite, and remove their slices. All processes have ended."""
        results = {benchmark.key: self._read_result(benchmark) for benchmark in self._benchmarks}
        assert all(results.values()), f"every slice was scored, but not all have a result: {results}"
        self._slices.remove(results)
        return {key: result for key, result in results.items() if result}

    def _join(self, benchmark: Benchmark) -> None:
        """Write the result of a benchmark if all of its slices are scored; two processes would write the same."""
        identity, parts = self._identify(benchmark), self._parts[benchmark.key]
        facts = [found for part in parts if (found := self._slices.read(part, identity))]
        if len(facts) < len(parts):
            return
        samples = self._slices.read_samples(parts)
        task = self._build(benchmark).tasks[0]
        result = summarize(benchmark, facts, samples, task.VERSION, context=facts[0]["context"])
        write_bytes(self._out / f"{benchmark.key}.samples.jsonl.zst", compress_samples(samples))
        write_json(self._out / f"{benchmark.key}.json", result | identity)

    def _build(self, benchmark: Benchmark) -> BenchmarkTasks:
        return build_benchmark(benchmark, self._items, self._config.limit, self._base)

    def _read_result(self, benchmark: Benchmark) -> dict[str, Any] | None:
        path = self._out / f"{benchmark.key}.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if self._identify(benchmark).items() <= found.items() else None

    @cached_property
    def _common_identity(self) -> dict[str, Any]:
        return {
            "model_sha256": hash_files(path for path in self._model_dir.iterdir() if path.is_file()),
            "items_sha256": hash_files([self._items / "items.json"]),
            "limit": self._config.limit,
            "dtype": choose_dtype(self._model_dir),
            "activations": self._config.activations,
            "versions": VERSIONS,
        }

    @cache  # noqa: B019  an evaluation lives as long as its process
    def _identify(self, benchmark: Benchmark) -> dict[str, Any]:
        """Return what a benchmark's result depends on."""
        # An absolute folder that is the same everywhere: neither the place of the items nor the working directory is a
        # part of the identity.
        configs = load_task_configs(benchmark, Path("/items"), base=self._base)
        chat = {"chat": not self._base} if benchmark.chat else {}
        return self._common_identity | chat | {"task_sha256": hash_value([benchmark.describe(), configs])}


def choose_benchmarks(
    model_dir: Path, items: Path, config: EvaluationConfig, *, base: bool
) -> tuple[list[Benchmark], dict[str, int]]:
    """Return the benchmarks of a suite that have items, and how many of them each is asked, by its key.

    Raises:
        RefusedInput: as `evaluate`.
    """
    suite = get_suite(config.suite, config.benchmarks)
    if not (model_dir / "config.json").is_file():
        raise RefusedInput(f"evaluate: {model_dir} has no config.json; give a Hugging Face model folder")
    if not (items / "items.json").is_file():
        raise RefusedInput(
            f"evaluate: {items} has no items.json; run the data step (eval.benchmarks.items.prepare) first"
        )
    if config.limit is not None and config.limit < 1:
        raise RefusedInput(f"evaluation.limit: {config.limit} items a task; give at least 1, or None for all")
    prepared = json.loads((items / "items.json").read_text(encoding="utf-8"))
    rows = prepared["rows"]
    chosen = [
        LARGER[benchmark.key] if benchmark.key in prepared["larger"] else benchmark
        for benchmark in suite
        if benchmark.key in rows
    ]
    absent = [key for key in config.benchmarks if key not in rows]
    if (absent or not chosen) and not config.allow_missing_items:
        named = ", ".join(absent or (benchmark.key for benchmark in suite))
        raise RefusedInput(
            f"evaluation.benchmarks: there are no items of {named}; give --items-folder for those that no registry "
            "has, or choose others"
        )
    requirements.check_requirements(chosen, model_dir, config, base=base)
    return chosen, {b.key: min(rows[b.key], config.limit or rows[b.key]) for b in chosen}


def load_model(model_dir: Path, batch_tokens: int, activations: str = "float") -> PrefixLM:
    """Load model and tokenizer of a Hugging Face folder onto the GPU, or the CPU of a machine without one.

    It computes in the dtype of `eval.compute_dtype.choose_dtype`, with activations as `EvaluationConfig.activations`.

    No code from the folder is run: MobileMoE's classes are this project's own.

    Raises:
        RefusedInput: the folder's configuration or tensors are not those of a model that transformers reads, or INT8
            activations are asked of another model than MobileMoE.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_config(model_dir)
    with refuse_value_errors():
        dtype = choose_dtype(model_dir)
        lm = PrefixLM(
            pretrained=str(model_dir), backend="causal", device=device, dtype=dtype, batch_tokens=batch_tokens
        )
    if activations == "int8":
        round_activations(lm.model)
    return lm


@cache
def build_benchmark(benchmark: Benchmark, items: Path, limit: int | None, base: bool) -> BenchmarkTasks:
    """Build a benchmark's tasks, once for all models that a process evaluates: MMLU's are 57."""
    return BenchmarkTasks(benchmark, items, limit, base=base)


def hash_files(files: Iterable[Path]) -> str:
    """Return one SHA-256 over the names and contents of files, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()
