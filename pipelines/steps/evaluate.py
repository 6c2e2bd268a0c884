"""The step `eval`: benchmarks and held-out loss of the model after every stage."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from core.atomic import atomic_write, partial_path, remove, write_json
from core.progress import Progress
from core.stages import BASE_STAGES
from eval.config import EvaluationConfig
from pipelines.steps.context import Context, Job

MODELS = {
    "pretrain": "eval/work/pretrain_bf16", "midtrain": "eval/work/midtrain_bf16", "sft": "artifacts/bf16",
    "sft_int4_rounded": "eval/work/sft_int4_rounded", "qat_int4": "artifacts/int4",
}  # fmt: skip
"""Key in eval/heldout.json, and folder below `eval/` -> Hugging Face folder below the run folder."""
EVAL_OUTPUTS = (*(f"eval/{name}" for name in MODELS), "eval/heldout.json", "eval/work/heldout")
"""Files and folders below the run folder."""


def evaluate_models(context: Context) -> None:
    """Measure benchmarks and held-out losses at once, and write eval/heldout.json and a folder a model.

    Benchmarks are cut into slices, which all of the cluster's workers share; a slice is kept when it is scored.
    """
    recipe, run = context.recipe, context.run
    folders = {name: run / model for name, model in MODELS.items()}
    arguments: tuple[Any, ...] = (
        folders, run / "data" / "heldout", recipe.evaluation, recipe.stages.sft.seq_len,
        run / "eval" / "work" / "heldout", context.progress("eval", "heldout"),
    )  # fmt: skip
    jobs = [Job("heldout", measure_heldout_on_worker, arguments)]
    with ExitStack() as stack:
        unfinished = {name: run / "eval" / name for name in MODELS if not (run / "eval" / name).exists()}
        for out in unfinished.values():
            stack.enter_context(atomic_write(out, keep_partial=True))
            for taken in (partial_path(out) / "slices").glob("*.taken"):
                taken.unlink()  # by a process of an earlier attempt
        cpus, gpus = recipe.cluster.cpus_per_task, recipe.cluster.gpus_per_worker
        workers = context.require_cluster().count_slots(cpus, gpus) if unfinished else 0
        for number in range(workers):
            arguments = (
                {name: (folders[name], partial_path(out)) for name, out in unfinished.items()}, run / "items",
                recipe.evaluation, number, workers, context.progress("eval", "benchmarks"),
            )  # fmt: skip
            jobs.append(Job(f"benchmarks.{number}", score_benchmarks_on_worker, arguments))
        losses, *finished = context.run_jobs("eval", jobs, cpus=cpus, gpus=gpus)
        assert not unfinished or any(finished), "the worker that ended last has joined every slice"
        for out in unfinished.values():
            remove(partial_path(out) / "slices")
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


def score_benchmarks_on_worker(
    models: dict[str, tuple[Path, Path]],
    items: Path,
    config: EvaluationConfig,
    number: int,
    workers: int,
    progress: Progress,
) -> bool:
    """Score the slices of all models' benchmarks that no other worker has taken.

    Args:
        models: name -> Hugging Face folder, and folder of its results.
        number: number of this worker, of `workers`. Each begins with another model, so that it loads few of them.

    Returns:
        Whether all results were there at the end.
    """
    from eval.benchmarks.harness import Evaluation

    evaluations = {
        name: Evaluation(model, items=items, out=out, config=config, base=name in BASE_STAGES)
        for name, (model, out) in models.items()
    }
    total = sum(evaluation.count_items() for evaluation in evaluations.values())
    names = list(evaluations)
    first = number * len(names) // workers
    for name in (*names[first:], *names[:first]):

        def show(benchmark: str, name: str = name) -> None:
            done = sum(evaluation.count_done() for evaluation in evaluations.values())
            progress(f"{name}: {benchmark}", done, total)

        evaluations[name].score(show, owner=str(number))
    return all(evaluation.is_finished() for evaluation in evaluations.values())
