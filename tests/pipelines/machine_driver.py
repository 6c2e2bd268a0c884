"""Start a cluster as `mobilemoe run` does, run one task and one gang on it, and print what the workers saw as JSON.

python -m tests.pipelines.machine_driver RUN
"""

import json
import os
import sys
from pathlib import Path

from core.environment import prepare_environment
from tests.pipelines import gang_functions as gang


def main(run: Path) -> None:
    """Run a task and a gang of one worker in the run folder."""
    prepare_environment()
    from pipelines.ray.cluster import Cluster, Task
    from pipelines.recipe import ClusterConfig

    with Cluster(ClusterConfig(max_failures=0, cpus_per_task=1), run, world_size=1) as cluster:
        (seen,) = cluster.run_tasks([Task(gang.describe_process, (), run / "logs/task.log", num_cpus=1)])
        cluster.run_gang(gang.write_process, run, name="gang")
    print(json.dumps({"task": seen, "gang": json.loads((run / "gang.json").read_text()), "cwd": os.getcwd()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
