"""Try all faults one after the other, and write a table while they are tried: `make chaos`.

    python -m tests.faults.chaos --work FOLDER [--only PATTERN ...] [--minutes M]

The folder keeps the undisturbed run and results.jsonl, so that the same command goes on where it was stopped, and tries
again what was not kept. Delete results.jsonl to try all again.
"""

import argparse
import fnmatch
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from core.atomic import remove
from tests.faults import ray_faults
from tests.faults.fault_list import all_faults
from tests.faults.injection import Injection
from tests.faults.places import HALF
from tests.faults.trial import Fault, Trial, try_fault

STEPS = ("items", "data", "pretrain", "midtrain", "sft", "qat", "export", "eval", "package", "report")
RESULTS = "results.jsonl"
TABLE = "table.md"
UNDISTURBED, TRIED = Path("undisturbed/run"), Path("tried/run")
"""Run folders below that of all runs. They have one name, since a GGUF file states that of its run."""


def main(words: list[str] | None = None) -> int:
    """Try the faults that have no result yet; return the number of promises that were not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--only", nargs="*", default=["*"], help="shell patterns of the faults' names")
    parser.add_argument("--last", default=STEPS[-1], choices=STEPS, help="last step of the undisturbed run")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="disturb a whole run on Ray N times as well")
    parser.add_argument("--first", default=STEPS[0], choices=STEPS, help="first step of that run")
    parser.add_argument("--seed", type=int, default=0, help="seed of their times and kinds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no fault after so many minutes")
    arguments = parser.parse_args(words)
    deadline = time.monotonic() + 60 * arguments.minutes
    work = arguments.work.absolute()
    use_own_temporary_folder(work)
    make_reference(work, arguments.last)
    made = STEPS[: STEPS.index(arguments.last) + 1]
    wanted = [
        fault
        for fault in all_faults()
        if fault.step in made and any(fnmatch.fnmatchcase(fault.name, p) for p in arguments.only)
    ]
    random.Random(0).shuffle(wanted)  # so that a short time sees every kind
    wanted.sort(key=lambda fault: fault.step == "data")  # which takes longest
    results = read_results(work)
    for fault in wanted:
        if results.get(fault.name, {}).get("kept") or time.monotonic() > deadline:
            continue
        print(f"{time.strftime('%H:%M:%S')} {fault.step}: {fault.name}", flush=True)
        record = try_fault(fault, work / TRIED, work / "snapshots" / (fault.begins or fault.step), work / UNDISTURBED)
        if not record["kept"]:
            keep_broken(work, fault)
        add_result(work, record, results)
    if arguments.random:
        begin_random(work, arguments.first, arguments.last, arguments.random, arguments.seed, results)
    broken = [name for name, record in results.items() if not record["kept"]]
    print(f"{len(results)} faults tried, {len(broken)} promises not kept")
    return len(broken)


def begin_random(work: Path, first: str, last: str, count: int, seed: int, results: dict[str, dict[str, Any]]) -> None:
    """Disturb a whole run on Ray, unless this was done."""
    if any(name.startswith(f"random {seed}:") for name in results):
        return
    run = work / f"random-{seed}" / UNDISTURBED.name
    shutil.rmtree(run, ignore_errors=True)
    copy(work / "snapshots" / first, run)
    for record in ray_faults.disturb(run, work / UNDISTURBED, last, count, seed):
        add_result(work, record, results)


def use_own_temporary_folder(work: Path) -> None:
    """Let all processes have their temporary files below the folder of the runs."""
    shutil.rmtree(work / "tmp", ignore_errors=True)
    (work / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(work / "tmp"), None


def make_reference(work: Path, last: str) -> None:
    """Make the undisturbed run, and a snapshot before each of its steps, and one in the middle of pre-training.

    A second undisturbed run of the training must be the same bit for bit: else no fault could be judged.
    """
    snapshots, reference = work / "snapshots", work / UNDISTURBED
    snapshots.mkdir(parents=True, exist_ok=True)
    for step in STEPS[: STEPS.index(last) + 1]:
        if (snapshots / f"{step}.made").exists():
            continue
        reference.mkdir(parents=True, exist_ok=True)
        copy(reference, snapshots / step)
        began = time.time()
        trial = Trial(reference, step)
        driver = trial.start()
        driver.join()
        assert driver.exitcode == 0, trial.read_log_end()
        (snapshots / f"{step}.made").write_text(f"{time.time() - began:.1f}\n")
        if step == "pretrain":
            half = Trial(snapshots / HALF, step)
            copy(snapshots / step, half.run)
            assert half.inject(Injection("pretrain.rank0", ".metadata", "kill-driver", after=True, number=5)) != 0


def copy(source: Path, target: Path) -> None:
    """Replace a folder by a copy of another one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def keep_broken(work: Path, fault: Fault) -> None:
    """Keep the run of a promise that was not kept, for whoever looks for the reason."""
    name = "".join(letter if letter.isalnum() else "-" for letter in fault.name)
    (work / "broken").mkdir(exist_ok=True)
    for suffix in ("", ".log"):
        tried, kept = (work / TRIED).with_name(f"run{suffix}"), work / "broken" / f"{name}{suffix}"
        if tried.exists():
            remove(kept)
            os.replace(tried, kept)


def add_result(work: Path, record: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    """Show a record, keep it, and write the table with it."""
    kept = "kept" if record["kept"] else "BROKEN"
    print(f"{time.strftime('%H:%M:%S')} {kept}, {record['seconds']} s: {record['name']}: {record['seen']}", flush=True)
    with (work / RESULTS).open("a") as file:
        file.write(json.dumps(record) + "\n")
    results[record["name"]] = record
    write_table(work, results)


def read_results(work: Path) -> dict[str, dict[str, Any]]:
    """Return the records of the faults that were tried, by name; of one that was tried again, the last one."""
    path = work / RESULTS
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def write_table(work: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write what was seen as a table in Markdown, the faults of one promise together."""
    lines = ["| promise | fault | step | seen | seconds |", "|---|---|---|---|---|"]
    for record in sorted(results.values(), key=lambda record: (record["promise"], record["step"])):
        seen = record["seen"].replace("|", "/") if record["kept"] else f"**not kept**: {record['seen']}"
        seconds = "" if record["seconds"] is None else f"{record['seconds']:.0f}"
        lines.append(f"| {record['promise']} | {record['name']} | {record['step']} | {seen} | {seconds} |")
    (work / TABLE).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
