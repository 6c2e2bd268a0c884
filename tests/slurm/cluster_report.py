"""A real Ray program in place of `mobilemoe`, for the test of the job script.

report CODE             print what the cluster is made of as JSON and exit with CODE
train FILE STEPS        count up in FILE, as training would, to STEPS; 130 when told to stop
run FOLDER ...          as one job of a chain: add its arguments and the cluster's size to FOLDER/jobs.jsonl; exit with
                        the code in FOLDER/PART.code, which is removed; 75 waits to be stopped and exits with 130
refuse_when_stopped FILE   create FILE, wait to be told to stop, and exit with 2
"""

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import ray


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def node_address() -> str:
    time.sleep(0.5)
    return ray.util.get_node_ip_address()


def http_status(url: str, headers: dict[str, str]) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def report(exit_code: str) -> int:
    """Run a task on every CPU of the cluster and print where they ran, and who may see the dashboard."""
    context = ray.init(address="auto", log_to_driver=False)
    resources = ray.cluster_resources()
    nodes_url = f"http://{context.dashboard_url}/nodes?view=summary"
    cluster = {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "cpus": resources["CPU"],
        "gpus": resources.get("GPU", 0),
        "ran_on": sorted(ray.get([node_address.remote() for _ in range(int(resources["CPU"]))])),
        "address": os.environ["RAY_ADDRESS"],
        "dashboard_without_token": http_status(nodes_url, {}),
        "dashboard_with_token": http_status(nodes_url, {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}),
    }
    print("REPORT", json.dumps(cluster), flush=True)
    return int(exit_code)


def train(progress: str, steps: str) -> int:
    """Resume from the file and add a step every half second."""
    path = Path(progress)
    ray.init(address="auto", log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # after ray.init, which sets a handler of its own
    done = int(path.read_text()) if path.exists() else 0
    print("RESUMED", done, flush=True)
    while done < int(steps):
        ray.get(node_address.remote())
        done += 1
        path.with_suffix(".new").write_text(str(done))
        path.with_suffix(".new").rename(path)
    return 0


def run_part(folder: str) -> int:
    """Record that one part of a run was here, with the nodes and GPUs that it had."""
    ray.init(address="auto", log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    options = sys.argv[3:]
    part = options[options.index("--until") + 1] if "--until" in options else "finish"
    nodes, gpus = len(ray.nodes()), ray.cluster_resources().get("GPU", 0)
    with (Path(folder) / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"options": options, "nodes": nodes, "gpus": gpus}) + "\n")
    code_file = Path(folder) / f"{part}.code"
    if not code_file.exists():
        return 0
    code = int(code_file.read_text())
    code_file.unlink()
    if code == 75:
        signal.pause()
    return code


def refuse_when_stopped(started: str) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    Path(started).touch()
    signal.pause()
    return 0


if __name__ == "__main__":
    # `mobilemoe` options that concern the script only, such as --out, come after what the program takes.
    programs = {"report": report, "train": train, "run": run_part, "refuse_when_stopped": refuse_when_stopped}
    program = programs[sys.argv[1]]
    sys.exit(program(*sys.argv[2 : 2 + program.__code__.co_argcount]))
