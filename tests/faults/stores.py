"""A run that reads its data from an S3 server which goes away, and comes back."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3

from tests.faults.places import read_state, wait_until
from tests.faults.trial import Broken, Fault, Trial

BUCKET = "bucket"


class Server:
    """moto's S3 server in a process of its own, which forgets everything when it is killed."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._folder = folder
        os.environ |= {
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{self._port}", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip

    def start(self) -> None:
        """Start the server, and put the folder's files below s3://bucket/data."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    break
            time.sleep(0.1)
        client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
        client.create_bucket(Bucket=BUCKET)
        for path in self._folder.rglob("*"):
            if path.is_file():
                key = f"data/{path.relative_to(self._folder).as_posix()}"
                client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())

    def kill(self) -> None:
        """Kill the server."""
        self._process.kill()
        self._process.wait()


def stop_store(trial: Trial) -> str:
    """Train on shards of a store that is gone when the first one is fetched."""
    data = trial.run.parent / "data-of-another"
    (trial.run / "data").rename(data)
    server = Server(data)
    trial.options += ["--data", f"s3://{BUCKET}/data", "--cluster.shard-cache.folder", str(trial.run.parent / "cache")]
    server.start()
    try:
        driver = trial.start()
        wait_until(lambda: read_state(trial) == "running", driver)
        server.kill()
        trial.note_fault()
        code, state = trial.wait(driver), read_state(trial)
        if code != 1 or state != "failed":
            raise Broken(f"exit {code}, state {state}: {trial.read_log_end()}")
        server.start()
        return f"exit {code}, state {state}; {trial.finish()}"
    finally:
        server.kill()


STORE_FAULTS = [
    Fault(
        "the S3 server that the shards are read from is killed, and started again", "pretrain",
        "the step fails by name; the same command goes on, with the same result", stop_store,
    )
]  # fmt: skip
