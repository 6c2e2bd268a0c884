"""A quick suite of benchmarks while a stage trains: on its own resources, from the checkpoints that training writes.

Training neither waits for it nor shares a worker with it. Where the cluster has no resources beside those of the
training, the checkpoints that are still there are scored when the stage has ended.
"""

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.atomic import remove
from core.inside import refuse_links
from core.json_lines import cut_last_lines, read_json_lines
from core.progress import ignore_progress
from core.stages import STAGE_FOLDERS
from eval.config import EvaluationConfig
from pipelines.recipe import Recipe
from pipelines.steps.context import Context, Job
from titan_ext.training.stage_spec import list_finished_checkpoints

POLL_SECONDS = 2.0
"""Time between two looks for new checkpoints."""
RESULTS = "benchmarks.jsonl"
"""File below the stage's folder: one record a scored step."""


@contextmanager
def score_beside(context: Context, name: str) -> Iterator[None]:
    """Score due checkpoints of a stage while the block trains it, and those that are left when it ends."""
    stage = context.recipe.stages.get(name)
    if not stage.benchmark_interval:
        yield
        return
    suite, trained = QuickSuite(context, name), threading.Event()
    thread = threading.Thread(target=suite.watch, args=(trained,), name=f"{name} benchmarks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        trained.set()
    thread.join()


class QuickSuite:
    """The checkpoints of one stage that are due, and the results of those that are scored."""

    def __init__(self, context: Context, name: str):
        self._context, self._name = context, name
        self._folder = context.run / STAGE_FOLDERS[name]
        self._interval = context.recipe.stages.get(name).benchmark_interval
        self._given_up: set[int] = set()
        """Steps that could not be scored; the next start of the stage tries them again."""

    def watch(self, trained: threading.Event) -> None:
        """Score due checkpoints as they appear, until `trained` is set and none is left."""
        path = self._folder / RESULTS
        if path.exists():
            cut_last_lines(path, lambda record: False)  # a line that a killed process left torn
        while True:
            is_last = trained.is_set()
            due = self.list_due()
            if due:
                self._score(due[0])
            elif is_last:
                return
            else:
                trained.wait(POLL_SECONDS)

    def list_due(self) -> list[int]:
        """Return the steps of finished checkpoints that are to be scored and are not, the first one first."""
        scored = {record["step"] for record in read_json_lines(self._folder / RESULTS)}
        steps = list_finished_checkpoints(self._folder)
        return [step for step in steps if step % self._interval == 0 and step not in scored | self._given_up]

    def _score(self, step: int) -> None:
        """Score one checkpoint on a worker. If that fails, it is said, and training goes on."""
        from pipelines.ray.cluster import WorkerFailed  # imports Ray

        recipe, run = self._context.recipe, self._context.run
        kept = self._folder / "scored" / f"step-{step}"
        remove(kept)
        try:
            # Links, so that training may delete the checkpoint meanwhile.
            shutil.copytree(self._folder / "checkpoint" / f"step-{step}", kept, copy_function=_link)
        except OSError as error:  # of one file, or of several: shutil.Error
            self._give_up(step, f"its checkpoint is gone, or cannot be linked: {error}; keep more (checkpoints_kept)")
            remove(kept)
            return
        curves = self._folder / "tb" / "benchmarks"
        arguments = (kept, recipe, self._name, run / "data" / "tokenizer", run / "items", curves, step)
        job = Job("benchmarks", score_checkpoint_on_worker, arguments)
        cluster = recipe.cluster
        try:
            (scores,) = self._context.run_jobs(
                self._name, [job], cpus=cluster.cpus_per_task, gpus=cluster.gpus_per_worker
            )
            with open(self._folder / RESULTS, "a", encoding="utf-8", opener=refuse_links) as file:
                file.write(json.dumps({"step": step, "benchmarks": scores}) + "\n")
        except WorkerFailed as error:
            self._give_up(step, str(error))
        finally:
            remove(kept)

    def _give_up(self, step: int, reason: str) -> None:
        self._given_up.add(step)
        self._context.log_line(f"{self._name}: no benchmarks of step {step}, training goes on: {reason}")


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def score_checkpoint_on_worker(
    checkpoint: Path, recipe: Recipe, name: str, tokenizer: Path, items: Path, curves: Path, step: int
) -> dict[str, dict[str, Any]]:
    """Export a checkpoint into a folder of its own, score it, and add the scores to TensorBoard.

    Args:
        name: stage; one that trains quantized is scored in INT4.
        curves: folder of TensorBoard's files.

    Returns:
        benchmark -> value (fraction), stderr and items.
    """
    from torch.utils.tensorboard import SummaryWriter

    from eval.benchmarks.harness import evaluate
    from eval.export.formats import FORMATS, ExportOptions
    from eval.export.source import open_run_checkpoint

    config = EvaluationConfig(
        benchmarks=recipe.evaluation.quick_benchmarks, limit=recipe.evaluation.quick_limit,
        batch_tokens=recipe.evaluation.batch_tokens, allow_missing_items=recipe.evaluation.allow_missing_items,
    )  # fmt: skip
    form = "int4" if recipe.stages.get(name).quantize else "bf16"
    with tempfile.TemporaryDirectory(prefix="mobilemoe-benchmarks-") as scratch:
        model = Path(scratch) / "model"
        source = open_run_checkpoint(
            checkpoint, recipe.model, tokenizer, recipe.quantization, recipe.parallel.precision
        )
        FORMATS[form].write(source, model, ExportOptions(export=recipe.export))
        results = evaluate(model, items=items, out=Path(scratch) / "out", config=config, progress=ignore_progress)
    with SummaryWriter(log_dir=str(curves)) as writer:
        for key, result in results.items():
            writer.add_scalar(f"benchmarks/{key}", result["value"], step)
    return {key: {k: result[k] for k in ("value", "stderr", "items", "chance")} for key, result in results.items()}
