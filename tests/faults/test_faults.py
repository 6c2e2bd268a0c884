"""Some faults of the suite, tried on real steps; `make chaos` tries all of them."""

import json
import os
import subprocess
import sys

import pytest

from tests.faults.fault_names import FAULTS_OF_CI, NEEDS_ROOT

pytestmark = pytest.mark.timeout(2400)  # the first of them waits for all; the machine may be busy


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """Records by the fault's name. One process imports everything once, and forks every run."""
    work = tmp_path_factory.mktemp("faults")
    names = [name for name in FAULTS_OF_CI if os.getuid() == 0 or name not in NEEDS_ROOT]
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.chaos", "--work", str(work), "--last", "pretrain"]
    ended = subprocess.run(
        [*command, "--only", *names], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MOBILEMOE_CACHE": str(work / "cache"), "PIP_NO_INDEX": "1"},
    )  # fmt: skip
    results = work / "results.jsonl"
    assert results.exists(), ended.stderr[-4000:]
    return [json.loads(line) for line in results.read_text().splitlines()]


@pytest.mark.parametrize("name", FAULTS_OF_CI)
def test_a_fault_ends_with_what_the_undisturbed_run_has(name, tried):
    """The same samples, parameters and files, nothing half written, and no process left."""
    if name in NEEDS_ROOT and os.getuid() != 0:
        pytest.skip("only root can mount a small disk")
    (record,) = [record for record in tried if record["name"] == name]
    assert record["kept"], record["seen"]
