"""The step `eval`: benchmarks of the two artifacts, held-out loss of five models."""

import json
from pathlib import Path
from typing import Any

from core.atomic import atomic_write, write_json
from core.progress import Progress
from eval.config import EvaluationConfig
from pipelines.steps.context import Context, Job

EVAL_OUTPUTS = ("eval/sft_bf16", "eval/int4", "eval/heldout.json", "eval/work/heldout")
"""Files and folders below the run folder."""
HELDOUT_MODELS = {
    "pretrain": "eval/work/pretrain_bf16", "midtrain": "eval/work/midtrain_bf16", "sft": "artifacts/bf16",
    "sft_int4_rounded": "eval/work/sft_int4_rounded", "qat_int4": "artifacts/int4",
}  # fmt: skip
"""Key in eval/heldout.json -> Hugging Face folder below the run folder."""
BENCHMARK_MODELS = {"sft_bf16": "artifacts/bf16", "int4": "artifacts/int4"}
"""Folder below `eval/` -> Hugging Face folder below the run folder."""


def evaluate_models(context: Context) -> None:
    """Measure benchmarks and held-out losses, all models at once, and write eval/heldout.json."""
    recipe, run = context.recipe, context.run
    arguments: tuple[Any, ...]
    jobs = []
    for name, model in HELDOUT_MODELS.items():
        out, job = run / "eval" / "work" / "heldout" / f"{name}.json", f"heldout_{name}"
        arguments = (
            run / model, run / "data" / "heldout", recipe.evaluation, recipe.stages.sft.seq_len, out,
            context.progress("eval", job),
        )  # fmt: skip
        jobs.append(Job(job, measure_heldout_on_worker, arguments))
    for name, model in BENCHMARK_MODELS.items():
        arguments = (run / model, run / "items", run / "eval" / name, recipe.evaluation, context.progress("eval", name))
        jobs.append(Job(name, run_benchmarks_on_worker, arguments))
    results = context.run_jobs("eval", jobs, cpus=recipe.cluster.cpus_per_task, gpus=recipe.cluster.gpus_per_worker)
    write_json(run / "eval" / "heldout.json", dict(zip(HELDOUT_MODELS, results, strict=False)))


def measure_heldout_on_worker(
    model: Path, heldout: Path, config: EvaluationConfig, context: int, out: Path, progress: Progress
) -> dict[str, Any]:
    """Measure the held-out loss over text and over conversations, in nats a token.

    The result is kept in `out`, so that an interrupted step does not measure it again.

    Args:
        context: tokens of a window.
    """
    from eval.benchmarks.heldout import heldout_loss

    def measure(shards: str) -> dict[str, Any]:
        return heldout_loss(
            model, heldout / shards, max_tokens=config.heldout_tokens, context=context, batch_size=config.batch_size,
            progress=progress,
        )  # fmt: skip

    if not out.exists():
        write_json(out, {"text": measure("pretrain"), "sft": measure("sft")})
    return json.loads(out.read_text())


def run_benchmarks_on_worker(model: Path, items: Path, out: Path, config: EvaluationConfig, progress: Progress) -> None:
    """Run the suite's benchmarks; results of single benchmarks survive an interruption in the partial folder."""
    from eval.benchmarks.harness import evaluate

    if not out.exists():
        with atomic_write(out, keep_partial=True) as partial:
            evaluate(model, items=items, out=partial, config=config, progress=progress)
