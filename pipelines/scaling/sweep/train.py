"""Train the runs of a sweep on Ray, as many side by side as fit, and record every point.

    OUT/points/RUN/1/    first branch: checkpoints, metrics, logs, spec.json, usage.json, point.json
    OUT/points/RUN/2/    second branch; it starts from the plateau's checkpoint of the first

A branch is a stage like any other, whose folder got the plateau's checkpoint before it started. `spec.json` says what a
folder trains, `point.json` is written when it is finished. So a sweep that was killed goes on with its unfinished
points, and a folder of another sweep is refused.
"""

import contextlib
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from core.atomic import partial_path, remove, remove_leftovers, write_json
from core.errors import RefusedInput
from pipelines.engine.stop_file import find_stop_file
from pipelines.recipe import Recipe
from pipelines.scaling.points import Point
from pipelines.scaling.sweep.grid import Branch, SweepRun
from pipelines.status import read_last_record
from pipelines.steps.build_steps import RUNTIME_STAGE_FIELDS
from pipelines.steps.train import drop_empty_domains
from titan_ext.model_stats import count_parameters
from titan_ext.training.stage_spec import StageSpec, find_final_checkpoint

if TYPE_CHECKING:
    from pipelines.ray.cluster import Cluster

POINTS_FOLDER = "points"
"""Folder below the sweep's folder."""


@dataclass(frozen=True)
class PointTask:
    """One point to train: the stage, and what identifies it."""

    name: str
    """RUN/NUMBER; its folder below `points/`."""
    run: SweepRun
    branch: Branch
    spec: StageSpec
    previous: "PointTask | None"
    """The point whose plateau this one goes on from; None starts from random weights."""

    @property
    def record(self) -> Path:
        """Return the file that exists when the point is finished."""
        return self.spec.out / "point.json"

    def identify(self, data: str) -> dict[str, Any]:
        """Return what decides the point's loss, JSON-ready.

        Args:
            data: identity of the data step.
        """
        stage = {key: value for key, value in asdict(self.branch.stage).items() if key not in RUNTIME_STAGE_FIELDS}
        previous = self.previous.branch.start if self.previous else None
        return {
            "data": data, "seed": self.spec.seed, "model": asdict(self.run.model), "stage": stage, "start": previous,
            "precision": self.spec.parallel.precision, "heldout_batches": self.branch.stage.heldout_batches,
        }  # fmt: skip


def list_tasks(recipe: Recipe, runs: Sequence[SweepRun], out: Path) -> list[list[PointTask]]:
    """Return the points of every run, in the order in which they train."""
    chains = []
    for run in runs:
        chain: list[PointTask] = []
        for number, branch in enumerate(run.branches, 1):
            name = f"{run.name}/{number}"
            spec = StageSpec(
                name=run.name, model=run.model, stage=drop_empty_domains(branch.stage), parallel=run.parallel,
                data=out / "data", out=out / POINTS_FOLDER / name, initial_checkpoint=None, seed=recipe.seed,
                shard_cache=recipe.cluster.shard_cache, stop_file=find_stop_file(out),
            )  # fmt: skip
            chain.append(PointTask(name, run, branch, spec, chain[-1] if chain else None))
        chains.append(chain)
    return chains


def check_folders(chains: Sequence[Sequence[PointTask]], data: str) -> None:
    """Check that the folders of points hold nothing of another sweep.

    Raises:
        RefusedInput: one does; names the point and the fields that differ.
    """
    for task in (task for chain in chains for task in chain):
        file = task.spec.out / "spec.json"
        if not file.exists():
            continue
        found, wanted = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(task.identify(data)))
        if found != wanted:
            differing = ", ".join(name for name in wanted if found.get(name) != wanted[name])
            raise RefusedInput(
                f"--out: {task.spec.out} holds a point of another sweep (other {differing}); give another --out, or "
                "the former sweep"
            )


def train_points(
    cluster: "Cluster",
    chains: Sequence[Sequence[PointTask]],
    data: str,
    *,
    at_once: int,
    log_line: Callable[[str], None],
    stop: threading.Event,
) -> list[str]:
    """Train every point that is not finished, `at_once` runs side by side.

    A point that fails ends its own run only. Once `stop` is set no point is started, and what then fails is no failure.

    Returns:
        A line for each point that failed.
    """
    total = sum(map(len, chains))
    with ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="sweep") as pool:
        futures: list[Future[str]] = [
            pool.submit(_train_chain, cluster, chain, data, total, log_line, stop) for chain in chains
        ]
        try:
            wait(futures)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [failure for future in futures if (failure := future.result())]


def _train_chain(
    cluster: "Cluster",
    chain: Sequence[PointTask],
    data: str,
    total: int,
    log_line: Callable[[str], None],
    stop: threading.Event,
) -> str:
    """Train the points of one run, and return the failure that ended it, or an empty text."""
    # Ray is imported here: what is finished needs no cluster.
    from pipelines.ray.cluster import WorkerFailed

    for task in chain:
        if task.record.exists():
            continue
        if stop.is_set():
            return ""
        try:
            prepare_folder(task, data)
            cluster.run_gang(train_point_on_worker, task.spec, name=task.name.replace("/", "."))
            if stop.is_set():
                return ""  # it may have stopped before its last step
            point = measure_point(task)
            write_json(task.record, asdict(point))
            if task.previous:
                drop_plateau(task.previous)
        except (WorkerFailed, OSError) as error:  # a full disk may fail here as well as on a worker
            if stop.is_set():
                return ""
            last = str(error).strip().splitlines()[-1]
            log_line(f"{task.name} failed: {last}")
            return f"{task.name}: {last}"
        root = task.spec.out.parents[1]
        done = sum(1 for _ in root.glob("*/*/point.json"))
        log_line(f"point {done} of {total}  {task.name}: {point.tokens:,.0f} tokens, held-out loss {point.loss:.4f}")
    return ""


def prepare_folder(task: PointTask, data: str) -> None:
    """Write what the folder trains, and put the plateau's checkpoint of the previous point into it.

    The checkpoint is hard-linked where the file system can, and copied elsewhere. It appears whole or not at all.
    """
    task.spec.out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(task.spec.out)
    write_json(task.spec.out / "spec.json", task.identify(data))
    if task.previous is None:
        return
    step = f"step-{task.previous.branch.start}"
    source, target = (point.spec.out / "checkpoint" / step for point in (task.previous, task))
    checkpoints = target.parent
    if checkpoints.exists() and any(checkpoints.iterdir()):
        return  # it has this checkpoint, or later ones of its own
    assert (source / ".metadata").is_file(), f"{source}: the plateau's checkpoint is kept until its next point is done"
    partial = task.spec.out / partial_path(Path("plateau")).name
    remove(partial)
    shutil.copytree(source, partial, copy_function=_link_or_copy)
    checkpoints.mkdir(exist_ok=True)
    os.replace(partial, target)


def _link_or_copy(source: str, target: str) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def drop_plateau(task: PointTask) -> None:
    """Remove the checkpoints of a point but its last one, once the next point has gone on from its plateau."""
    final = find_final_checkpoint(task.spec.out, task.branch.stage.steps)
    for folder in final.parent.iterdir():
        if folder != final:
            remove(folder)


def train_point_on_worker(spec: StageSpec) -> None:
    """Train one point on this rank; rank 0 then writes the peak memory to usage.json."""
    from titan_ext.training import train

    train.run_stage(spec)
    if os.environ["RANK"] == "0":
        write_json(spec.out / "usage.json", {"peak_memory": measure_peak_memory()})


def measure_peak_memory() -> int:
    """Return the largest memory of this process so far, in bytes: of its GPU, or resident on the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_point(task: PointTask) -> Point:
    """Return the measurements of a point that has trained to its end, from the files of its folder.

    `train_flops` are those of training it alone: 6 x active parameters x tokens.
    """
    out, run = task.spec.out, task.run
    heldout = read_last_record(out / "heldout.jsonl")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert heldout is not None and heldout["step"] == task.branch.stage.steps, (
        "the held-out loss is measured after the last step"
    )
    count = count_parameters(run.model)
    tokens_per_step = task.branch.tokens / task.branch.stage.steps
    usage = json.loads((out / "usage.json").read_text(encoding="utf-8"))
    return Point(
        active=count.active,
        tokens=task.branch.tokens,
        experts=run.experts,
        loss=heldout["loss"],
        total=count.total,
        granularity=run.granularity,
        shared_expert=run.shared,
        train_flops=6.0 * count.active * task.branch.tokens,
        step_seconds=tokens_per_step / median(line["tokens_per_second"] for line in metrics),
        peak_memory=usage["peak_memory"],
        learning_rate_factor=run.learning_rate_factor,
        name=run.name,
    )


def read_finished(chains: Sequence[Sequence[PointTask]]) -> list[Point]:
    """Return the points that are finished, run by run."""
    tasks = [task for chain in chains for task in chain if task.record.exists()]
    return [Point(**json.loads(task.record.read_text(encoding="utf-8"))) for task in tasks]
