"""lm-eval tasks over local items: each YAML file here names a stock task and states only the differences.

`stock` is a file (or a glob, for benchmarks of many tasks) below lm-eval's own tasks folder. Everything the file does
not mention (prompt, target, choices, metric, filters) is lm-eval's, so a score means what it means elsewhere. Keys of
the file win over the stock ones; `generation_kwargs` is merged key by key. `{subset}` in a data file stands for the
stock task's dataset_name. Data files are paths below the items folder: `<benchmark>/<split>.jsonl`.
"""

from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

from eval import compat
from eval.benchmarks.suites import Benchmark


def find_stock_files(key: str) -> list[Path]:
    """Return the stock task files that eval/benchmarks/tasks/<key>.yaml names, sorted by name."""
    pattern = _load_overrides(key)["stock"]
    return [path for path in sorted(compat.find_lm_eval_tasks().glob(pattern)) if not path.name.startswith("_")]


def load_task_configs(benchmark: Benchmark, items: Path) -> list[dict[str, Any]]:
    """Return a benchmark's lm-eval task configs (one, or one a subject), which read the files below `items`."""
    overrides = _load_overrides(benchmark.key)
    return [
        _merge_config(compat.load_task_yaml(path), overrides, items, benchmark.shots)
        for path in find_stock_files(benchmark.key)
    ]


def build_tasks(benchmark: Benchmark, items: Path) -> list[ConfigurableTask]:
    """Build a benchmark's lm-eval tasks and load their items."""
    return [ConfigurableTask(config=config) for config in load_task_configs(benchmark, items)]


def _load_overrides(key: str) -> dict[str, Any]:
    return compat.load_task_yaml(Path(__file__).parent / f"{key}.yaml")


def _merge_config(stock: dict[str, Any], overrides: dict[str, Any], items: Path, shots: int) -> dict[str, Any]:
    merged = {**stock, **overrides, "dataset_path": "json", "dataset_name": None, "num_fewshot": shots}
    for key in ("stock", "tag", "group"):
        merged.pop(key, None)
    if "generation_kwargs" in overrides:
        merged["generation_kwargs"] = {**stock["generation_kwargs"], **overrides["generation_kwargs"]}
    files = overrides["dataset_kwargs"]["data_files"]
    subset = stock.get("dataset_name")
    located = {split: str(items.resolve() / path.format(subset=subset)) for split, path in files.items()}
    return {**merged, "dataset_kwargs": {"data_files": located}}
