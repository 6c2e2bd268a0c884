"""lm-eval tasks over local items: each file here names a stock task and says only what differs.

`stock` is a file (or a glob, for benchmarks of many tasks) below lm-eval's own tasks folder. Everything the file does
not mention (prompt, target, choices, metric, filters) is lm-eval's, so a score means what it means elsewhere. Keys of
the file win over the stock ones; `generation_kwargs` is merged key by key. `{subset}` in a data file stands for the
stock task's dataset_name.
"""

from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from eval.benchmarks.suites import Benchmark

STOCK = Path(lm_eval.__file__).parent / "tasks"


def stock_files(key: str) -> list[Path]:
    """The stock task files behind eval/benchmarks/tasks/<key>.yaml, sorted by name."""
    pattern = load_yaml(Path(__file__).parent / f"{key}.yaml")["stock"]
    return [path for path in sorted(STOCK.glob(pattern)) if not path.name.startswith("_")]


def _config(stock: dict[str, Any], ours: dict[str, Any], items: Path, shots: int) -> dict[str, Any]:
    merged = {**stock, **ours, "dataset_path": "json", "dataset_name": None, "num_fewshot": shots}
    for key in ("stock", "tag", "group"):
        merged.pop(key, None)
    if "generation_kwargs" in ours:
        merged["generation_kwargs"] = {**stock["generation_kwargs"], **ours["generation_kwargs"]}
    files = ours["dataset_kwargs"]["data_files"]
    subset = stock.get("dataset_name")
    located = {split: str(items.resolve() / path.format(subset=subset)) for split, path in files.items()}
    return {**merged, "dataset_kwargs": {"data_files": located}}


def task_configs(benchmark: Benchmark, items: Path) -> list[dict[str, Any]]:
    """lm-eval task configs of a benchmark (one, or one a subject), reading the files below `items`."""
    ours = load_yaml(Path(__file__).parent / f"{benchmark.key}.yaml")
    return [_config(load_yaml(path), ours, items, benchmark.shots) for path in stock_files(benchmark.key)]


def build_tasks(benchmark: Benchmark, items: Path) -> list[ConfigurableTask]:
    """The tasks themselves, with their items loaded."""
    return [ConfigurableTask(config=config) for config in task_configs(benchmark, items)]
