"""`Context`: what every step needs besides its own inputs, and how a step hands work to the cluster."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.engine.progress_file import ProgressFile
from pipelines.recipe import Recipe
from pipelines.shared_data import SharedData

if TYPE_CHECKING:
    from pipelines.ray.cluster import Cluster


@dataclass(frozen=True)
class Job:
    """One call of a function on a worker of the cluster."""

    name: str
    """Name of its log file and of its progress file; the step's own name if the step has one job only."""
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Context:
    """A recipe, the run folder it is run in, and the cluster that does the work."""

    recipe: Recipe
    run: Path
    cluster: "Cluster | None"
    """None where no step has to run, so that no Ray is started for nothing."""
    log_line: Callable[[str], None]
    """Function that shows one line to the user."""
    shared: SharedData | None = None
    """Data set that the run takes over instead of making its own."""

    def require_cluster(self) -> "Cluster":
        """Return the cluster of a step that runs."""
        assert self.cluster is not None, "steps run only where a cluster was started"
        return self.cluster

    def progress(self, step: str, job: str = "") -> ProgressFile:
        """Return the progress file of a step, or of one of the jobs it runs at once."""
        return ProgressFile(self.run / "progress" / step / f"{job or step}.json")

    def run_job(self, step: str, function: Callable[..., Any], arguments: tuple[Any, ...], *, cpus: int) -> Any:
        """Run the one job of a step on the cluster and return its result.

        Raises:
            WorkerFailed: the job raised, or its worker died more often than `cluster.max_failures`.
        """
        return self.run_jobs(step, [Job(step, function, arguments)], cpus=cpus)[0]

    def run_jobs(self, step: str, jobs: list[Job], *, cpus: int, gpus: int = 0) -> list[Any]:
        """Run jobs of a step at once, each with `cpus` and `gpus`, and return their results in order.

        Raises:
            WorkerFailed: the first failure, as `run_job`.
        """
        # Ray is imported here and not above: what is up to date needs no cluster, and so no second of import.
        from pipelines.ray.cluster import Task

        logs = self.run / "logs"
        tasks = [
            Task(
                job.function,
                job.arguments,
                logs / f"{job.name if job.name == step else f'{step}.{job.name}'}.log",
                num_cpus=cpus,
                num_gpus=gpus,
            )
            for job in jobs
        ]
        return self.require_cluster().run_tasks(tasks)
