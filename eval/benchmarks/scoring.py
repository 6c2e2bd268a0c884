"""Scoring: items of one benchmark through lm-eval, and what a result says of all of them."""

import hashlib
import inspect
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.models.huggingface import HFLM

from eval import compat
from eval.benchmarks.slices import Slice, locate_items
from eval.benchmarks.suites import Benchmark
from eval.benchmarks.tasks import LocalTask, build_tasks

MAX_GEN_TOKS = 256
"""lm-eval's bound on generated tokens where a task states none."""


class BenchmarkTasks:
    """The lm-eval tasks of one benchmark, over the items that a limit leaves."""

    def __init__(self, benchmark: Benchmark, items: Path, limit: int | None, *, base: bool = False):
        """Build the tasks and load their items.

        Args:
            items: folder that `eval.benchmarks.items.prepare` wrote.
            limit: number of items of the whole benchmark; None takes all.
            base: whether a base model is asked, which gets no chat template.
        """
        self.benchmark = benchmark
        self._chat = benchmark.chat and not base
        tasks = build_tasks(benchmark, items, base=base)
        counts = allocate_items(limit, [len(task.eval_docs) for task in tasks])
        self.tasks: list[LocalTask] = [task for task, count in zip(tasks, counts, strict=True) if count]
        self.counts = [count for count in counts if count]
        self._longest = {
            task.task_name: task.config.generation_kwargs.get("max_gen_toks", MAX_GEN_TOKS)
            for task in self.tasks
            if task.OUTPUT_TYPE == "generate_until"
        }

    def score(self, lm: HFLM, part: Slice) -> tuple[dict[str, Any], list[dict]]:
        """Score the items of a slice.

        Returns:
            Facts: `truncated` (number of prompts), `max_gen_toks`, `other_metrics` (sums over the items), `seconds`.
            The samples: lm-eval's record of every item, with its `task`.
        """
        start = time.perf_counter()
        located = locate_items(self.counts, part.start, part.stop)
        tasks = [self.tasks[number] for number in located]
        bound = self._limit_generation(tasks, lm.max_length)
        numbers = {task.task_name: located[i] for task, i in zip(tasks, located, strict=True)}
        evaluated = compat.evaluate_tasks(lm, tasks, numbers, chat=self._chat)
        metric_filter = self.benchmark.metric.split(",")[1]
        samples = [
            {"task": name} | sample
            for name in numbers
            for sample in evaluated["samples"][name]
            if sample["filter"] == metric_filter
        ]
        facts = {
            "truncated": sum(_is_truncated(lm, sample["arguments"]) for sample in samples),
            "max_gen_toks": bound,
            "other_metrics": _sum_metrics(evaluated["results"], {name: len(n) for name, n in numbers.items()}),
            "seconds": round(time.perf_counter() - start, 1),
        }
        return facts, samples

    def _limit_generation(self, tasks: list[LocalTask], max_length: int) -> int | None:
        """Bound generated tokens to half the context, so that a prompt remains, and return the bound in force."""
        bound = None
        for task in tasks:
            if task.task_name in self._longest:
                bound = min(self._longest[task.task_name], max_length // 2)
                task.config.generation_kwargs["max_gen_toks"] = bound
        return bound


def summarize(
    benchmark: Benchmark, slices: Sequence[dict], samples: list[dict], version: Any, context: int
) -> dict[str, Any]:
    """Return the result of a benchmark from the facts of its slices and the samples of all its items.

    The value of a benchmark of several tasks (MMLU, BBH) is the mean over all items: lm-eval's group score weighted by
    size. Its standard error is that of a mean of all items.

    Args:
        version: lm-eval's version of the task.
        context: number of tokens of the model's context.
    """
    values = [float(sample[benchmark.metric.split(",")[0]]) for sample in samples]
    truncated = sum(part["truncated"] for part in slices)
    notes = [benchmark.note] if benchmark.note else []
    if truncated:
        notes.append(f"{truncated} of {len(samples)} prompts cut on the left to fit {context} tokens.")
    names = slices[0]["other_metrics"]
    return {
        "benchmark": benchmark.key,
        "title": benchmark.title,
        "category": benchmark.category,
        "metric": benchmark.metric,
        "shots": benchmark.shots,
        "value": mean(values),
        "stderr": mean_stderr(values) if len(values) > 1 else None,
        "items": len(values),
        "values": values,
        "chance": benchmark.chance,
        "truncated": truncated,
        "max_gen_toks": slices[0]["max_gen_toks"],
        "other_metrics": {name: sum(part["other_metrics"][name] for part in slices) / len(values) for name in names},
        "task_version": version,
        "prompts_sha256": hash_value([[sample["arguments"], sample["target"]] for sample in samples]),
        "note": benchmark.note,
        "notes": notes,
        "seconds": round(sum(part["seconds"] for part in slices), 1),
    }


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


def _sum_metrics(results: dict[str, dict], counts: dict[str, int]) -> dict[str, float]:
    """Return every mean that lm-eval gives for the tasks, times their numbers of items, added up."""
    names = [
        name
        for name, value in results[next(iter(counts))].items()
        if "," in name and "_stderr," not in name and isinstance(value, float | int)
    ]
    return {name: sum(results[task][name] * count for task, count in counts.items()) for name in names}


def hash_value(value: object) -> str:
    """Return the SHA-256 of a JSON-like value; a function in it counts as its source."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_describe_function).encode()).hexdigest()


def _describe_function(function: Any) -> Any:
    if isinstance(function, partial):
        return [inspect.getsource(function.func), function.args, function.keywords]
    return inspect.getsource(function)
