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
    """Measure benchmarks and held-out losses at once, and write eval/heldout.json."""
    recipe, run = context.recipe, context.run
    arguments: tuple[Any, ...] = (
        {name: run / model for name, model in HELDOUT_MODELS.items()}, run / "data" / "heldout", recipe.evaluation,
        recipe.stages.sft.seq_len, run / "eval" / "work" / "heldout", context.progress("eval", "heldout"),
    )  # fmt: skip
    jobs = [Job("heldout", measure_heldout_on_worker, arguments)]
    for name, model in BENCHMARK_MODELS.items():
        arguments = (run / model, run / "items", run / "eval" / name, recipe.evaluation, context.progress("eval", name))
        jobs.append(Job(name, run_benchmarks_on_worker, arguments))
    losses, *_ = context.run_jobs("eval", jobs, cpus=recipe.cluster.cpus_per_task, gpus=recipe.cluster.gpus_per_worker)
    write_json(run / "eval" / "heldout.json", losses)


def measure_heldout_on_worker(
    models: dict[str, Path], heldout: Path, config: EvaluationConfig, context: int, out: Path, progress: Progress
) -> dict[str, Any]:
    """Measure every model's held-out loss over text and over conversations, in nats a token.

    One process measures all models, because loading the libraries takes longer than a small model. Each result is kept
    in `out`, so that an interrupted step does not measure it again.

    Args:
        models: name -> Hugging Face folder.
        context: tokens of a window.

    Returns:
        name -> {"text": ..., "sft": ...}, each from `eval.benchmarks.heldout.heldout_loss`.
    """
    from eval.benchmarks.heldout import heldout_loss

    results = {}
    for name, model in models.items():
        file = out / f"{name}.json"

        def show(phase: str, done: int, total: int, name: str = name) -> None:
            progress(f"{name}: {phase}", done, total)

        if not file.exists():
            measured = {
                kind: heldout_loss(
                    model, heldout / shards, max_tokens=config.heldout_tokens, context=context,
                    batch_tokens=config.batch_tokens, progress=show,
                )
                for kind, shards in (("text", "pretrain"), ("sft", "sft"))
            }  # fmt: skip
            write_json(file, measured)
        results[name] = json.loads(file.read_text())
    return results


def run_benchmarks_on_worker(model: Path, items: Path, out: Path, config: EvaluationConfig, progress: Progress) -> None:
    """Run the suite's benchmarks; results of single benchmarks survive an interruption in the partial folder."""
    from eval.benchmarks.harness import evaluate

    if not out.exists():
        with atomic_write(out, keep_partial=True) as partial:
            evaluate(model, items=items, out=partial, config=config, progress=progress)
