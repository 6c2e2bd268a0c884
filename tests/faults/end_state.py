"""What a disturbed run must have in common with the undisturbed one, and what it must have left nowhere."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from core.hashing import sha256_file
from core.stages import STAGE_FOLDERS
from tests.faults.tiny_recipe import STEPS
from tests.titan_ext.stage_data import find_differences
from titan_ext.training.stage_spec import find_final_checkpoint

SAME_OF_A_STEP = ("step", "tokens", "loss", "grad_norm", "router_z", "data_hash")
"""Fields of metrics.jsonl that no fault may change: which samples a step had, and what it made of them."""
SAME_BYTES = {
    "items": ("items",), "data": ("data/tokenizer", "data/shards", "data/heldout"),
    "export": ("artifacts/bf16", "artifacts/int4", "eval/work/sft_int4_rounded"), "package": ("artifacts/gguf",),
    "eval": ("eval/heldout.json",),
}  # fmt: skip
"""Step -> its files and folders that are the same byte for byte after every fault."""


def list_differences(run: Path, reference: Path, until: str, first: str = "") -> list[str]:
    """Return what differs between two runs as far as the step `until`, a phrase each; the run must have finished it.

    Args:
        first: step whose outputs are the first to be compared; empty: all are.
    """
    found = list(_compare_states(run, reference, until, first))
    if found:
        return found
    done = list(_read_steps(run))
    for step in done[done.index(first) if first else 0 : done.index(until) + 1]:
        for name in SAME_BYTES.get(step, ()):
            found += _compare_bytes(run / name, reference / name, name)
        if step in STEPS:
            found += _compare_stage(run / STAGE_FOLDERS[step], reference / STAGE_FOLDERS[step], step)
    return found + [f"{path.relative_to(run)} was left" for path in find_litter(run)]


def find_litter(run: Path) -> list[Path]:
    """Return the partial files of a run that is finished."""
    return [path for path in run.rglob("*") if path.name.endswith(".partial")]


def find_living(run: Path) -> list[psutil.Process]:
    """Return the processes whose command line or environment names the run folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join([*process.cmdline(), process.environ().get("MOBILEMOE_RUN", "")])
            if str(run) in words and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _read_steps(run: Path) -> dict[str, dict]:
    return json.loads((run / "manifest.json").read_text())["steps"]


def _compare_states(run: Path, reference: Path, until: str, first: str) -> Iterator[str]:
    own, wanted = _read_steps(run), _read_steps(reference)
    for step, entry in list(wanted.items())[list(wanted).index(first) if first else 0 :]:
        if own.get(step, {}).get("state") != "done":
            yield f"{step} is {own.get(step, {}).get('state')}"
        elif own[step]["identity"] != entry["identity"]:
            yield f"{step} has another identity"
        if step == until:
            return


def _compare_bytes(own: Path, wanted: Path, name: str) -> Iterator[str]:
    files = [{path.relative_to(folder): path for path in _list_files(folder)} for folder in (own, wanted)]
    if files[0].keys() != files[1].keys():
        yield f"{name} has other files: {sorted(map(str, files[0].keys() ^ files[1].keys()))[:4]}"
        return
    for path, file in files[0].items():
        if sha256_file(file) != sha256_file(files[1][path]):
            yield f"{name}/{path} has other bytes"


def _list_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _compare_stage(own: Path, wanted: Path, step: str) -> Iterator[str]:
    for name, fields in (("metrics.jsonl", SAME_OF_A_STEP), ("heldout.jsonl", ("step", "loss"))):
        lines = [
            [[line[field] for field in fields] for line in map(json.loads, (folder / name).read_text().splitlines())]
            for folder in (own, wanted)
        ]
        if lines[0] != lines[1]:
            yield f"{step}: {name} differs: {lines[0]} instead of {lines[1]}"[:400]
    final = [find_final_checkpoint(folder, STEPS[step]) for folder in (own, wanted)]
    if differing := find_differences(*final):
        yield f"{step}: {len(differing)} tensors differ, {differing[0]} the first"
