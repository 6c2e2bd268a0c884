"""lm-eval tasks over local items: each YAML file here names a stock task and states only the differences.

`stock` is a file (or a glob, for benchmarks of many tasks) below lm-eval's own tasks folder. Everything the file does
not mention (prompt, target, choices, metric, filters) is lm-eval's, so a score means what it means elsewhere. Keys of
the file win over the stock ones; `generation_kwargs` is merged key by key. Data files are paths below the items folder:
`<benchmark>/<split>.jsonl`; `{subset}` in one stands for the stock task's dataset_name, `{benchmark}` for the
benchmark's key. With `stock_functions: false` the stock file's Python is not imported, and the file replaces every key
that names it. A file without `stock` is a task of our own. Keys below `base` win where a base model is asked.
"""

import json
import random
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from eval import compat
from eval.benchmarks.suites import Benchmark

SEED = 1234
"""Seed of the examples that are drawn at random: every model gets the same ones."""


class LocalTask(ConfigurableTask):
    """An lm-eval task whose documents are read from files, by their paths as they are.

    lm-eval gives the paths to `datasets.load_dataset`, which reads them as patterns: below a folder named `x [v1]` it
    finds no file. It would also keep a copy of every file in a cache in the user's home.

    Examples that are drawn at random depend on the item alone. lm-eval's depend on how many items come before it, so
    part of a benchmark would not have the prompts of the whole.
    """

    @cached_property
    def eval_docs(self) -> datasets.Dataset:
        """The items that are asked. lm-eval reads them several times a call, and processes all of them every time.

        A task that shuffles something in an item (GPQA its choices) draws from the seed alone, so that every process
        and every model gets the same.
        """
        state = random.getstate()
        random.seed(SEED)
        try:
            return super().eval_docs
        finally:
            random.setstate(state)

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **options: Any) -> str | list[str]:
        """Return the prompt of an item, with its examples. lm-eval calls this."""
        digest = sha256(f"{SEED} {json.dumps(doc, sort_keys=True, default=str)}".encode())
        self.set_fewshot_seed(int.from_bytes(digest.digest()[:8]))
        return super().fewshot_context(doc, num_fewshot, **options)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Read the task's `data_files`, one file of JSON lines for each split. lm-eval calls this."""
        assert dataset_kwargs is not None, "load_task_configs names the files"
        self.dataset = {split: _read_items(Path(path)) for split, path in dataset_kwargs["data_files"].items()}


def _read_items(path: Path) -> datasets.Dataset:
    with path.open(encoding="utf-8") as lines:
        return datasets.Dataset.from_list([json.loads(line) for line in lines])


def find_stock_files(name: str) -> list[Path]:
    """Return the stock task files that eval/benchmarks/tasks/<name>.yaml names, sorted by name; none for our own."""
    pattern = _load_overrides(name).get("stock")
    if pattern is None:
        return []
    return [path for path in sorted(compat.find_lm_eval_tasks().glob(pattern)) if not path.name.startswith("_")]


def load_task_configs(benchmark: Benchmark, items: Path, *, base: bool = False) -> list[dict[str, Any]]:
    """Return a benchmark's lm-eval task configs (one, or one a subject), which read the files below `items`."""
    name = benchmark.task_file or benchmark.key
    overrides = _load_overrides(name)
    for_base = overrides.pop("base", {})
    overrides |= for_base if base else {}
    functions = overrides.pop("stock_functions", True)
    stock = [compat.load_task_yaml(path, functions=functions) for path in find_stock_files(name)]
    return [_merge_config(config, overrides, items, benchmark) for config in stock or [{"task": benchmark.key}]]


def build_tasks(benchmark: Benchmark, items: Path, *, base: bool = False) -> list[LocalTask]:
    """Build a benchmark's lm-eval tasks and load their items."""
    return [LocalTask(config=config) for config in load_task_configs(benchmark, items, base=base)]


def _load_overrides(name: str) -> dict[str, Any]:
    return compat.load_task_yaml(Path(__file__).parent / f"{name}.yaml")


def _merge_config(
    stock: dict[str, Any], overrides: dict[str, Any], items: Path, benchmark: Benchmark
) -> dict[str, Any]:
    merged = {**stock, **overrides, "dataset_path": "json", "dataset_name": None, "num_fewshot": benchmark.shots}
    for key in ("stock", "tag", "group"):
        merged.pop(key, None)
    if "generation_kwargs" in stock and "generation_kwargs" in overrides:
        merged["generation_kwargs"] = {**stock["generation_kwargs"], **overrides["generation_kwargs"]}
    files = overrides["dataset_kwargs"]["data_files"]
    subset = stock.get("dataset_name")
    located = {
        split: str(items.resolve() / path.format(subset=subset, benchmark=benchmark.key))
        for split, path in files.items()
    }
    return {**merged, "dataset_kwargs": {"data_files": located}}
