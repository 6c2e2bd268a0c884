"""The files of a checkpoint: hashed before it counts, and checked before it is used.

Every rank hashes the file that it has written and flushed to the disk, and writes the hash beside it. When all have,
rank 0 collects the hashes in SHA256SUMS, flushes it, and only then renames `.metadata` into place, which makes the
checkpoint count. Before a checkpoint is loaded, the ranks share the work of hashing its files again.

A checkpoint of an older version has no SHA256SUMS: its files are checked for the sizes that its metadata state.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.tools.logging import logger

from core.atomic import find_free_path, sync_folder, write_text
from core.checksums import CHECKSUMS, parse_checksums
from core.errors import DamagedData, RefusedInput
from core.hashing import sha256_file
from titan_ext.compat import CheckpointFileSystem, CheckpointWriter
from titan_ext.training.stage_spec import METADATA, list_finished_checkpoints

HASH_SUFFIX = ".sha256"
"""Ending of the file in which a rank leaves the hash of the file it has written."""


class HashedWriter(CheckpointWriter):
    """DCP's writer, whose checkpoints have a SHA256SUMS over all their files before they count."""

    def __init__(self, path: str):
        super().__init__(path)
        self.fs = self._files = _HashedFileSystem()

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's file as DCP does, and leave its hash beside it."""
        written = super().write_data(plan, planner)
        for name in _list_names([written.value()]):
            write_text(Path(self.path, name + HASH_SUFFIX), f"{sha256_file(Path(self.path, name))}  {name}\n")
        return written

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """Collect the hashes of all ranks, and let DCP write the metadata. DCP calls this on rank 0, at the end."""
        self._files.names = _list_names(results)
        super().finish(metadata, results)


def _list_names(results: Iterable[list[Any]]) -> list[str]:
    """Return the names of the files that hold the results of some ranks, in order."""
    return sorted({result.storage_data.relative_path for part in results for result in part})


class _HashedFileSystem(CheckpointFileSystem):
    """The files of DCP's writer. The rename of the metadata is the last one, and waits for SHA256SUMS."""

    names: Sequence[str] = ()
    """Names of the files of all ranks."""

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Write SHA256SUMS, and rename the metadata, each flushed to the disk before the next."""
        new = Path(new_path)
        hashes = [new.with_name(name + HASH_SUFFIX) for name in self.names]
        lines = [file.read_text(encoding="utf-8") for file in hashes] + [f"{sha256_file(Path(path))}  {new.name}\n"]
        write_text(new.with_name(CHECKSUMS), "".join(lines))
        for file in hashes:
            file.unlink()
        sync_folder(new.parent)
        super().rename(path, new_path)
        sync_folder(new.parent)


def find_damage(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Return what is wrong with the files of a finished checkpoint; None where nothing is.

    Args:
        rank: this process checks every `world_size`-th file, from this one on.
    """
    if not (folder / CHECKSUMS).is_file():
        return _find_wrong_size(folder) if rank == 0 else None
    try:
        hashes = parse_checksums((folder / CHECKSUMS).read_text(encoding="utf-8"), str(folder))
    except (OSError, ValueError) as error:  # damaged itself; raised, it would leave the other ranks waiting
        return str(error)
    for name in list(hashes)[rank::world_size]:
        path = folder / name
        try:
            if sha256_file(path) != hashes[name]:
                return f"{path} does not have the SHA-256 that {CHECKSUMS} states"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def _find_wrong_size(folder: Path) -> str | None:
    if not (folder / METADATA).is_file():
        return None  # a folder of safetensors, which its own reader checks
    try:
        stored = FileSystemReader(folder).read_metadata().storage_data
    except Exception as error:  # whatever unpickling a damaged file raises
        return f"{folder / METADATA} cannot be read ({type(error).__name__}: {error})"
    needed: dict[str, int] = {}
    for place in (stored or {}).values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, size in needed.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < size:
            return f"{path} is missing, or shorter than the {size:,} bytes that the metadata state"
    return None


def find_damage_together(folder: Path, group: dist.ProcessGroup | None) -> str | None:
    """Return on every rank what `find_damage` finds, where each rank checks its share of the files."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_damage(folder, dist.get_rank(), dist.get_world_size()), group=group)
    return next(filter(None, found), None)


def set_damaged_aside(folder: Path, steps: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Find the newest checkpoint that is whole, and move the newer ones aside, as damaged-STEP. All ranks call this.

    Args:
        folder: the stage's folder of checkpoints.
        steps: the steps of its finished checkpoints, the first one first, the same on every rank.

    Raises:
        DamagedData: there are checkpoints, and none is whole. Nothing was moved.
    """
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        problem = find_damage_together(folder / f"step-{step}", group)
        if problem is None:
            break
        damaged[step] = problem
    if steps and len(damaged) == len(steps):
        raise DamagedData(
            f"{folder}: every checkpoint is damaged: {'; '.join(damaged.values())}. Restore one of them, or move the "
            "folder away to train the stage from its beginning"
        )
    if dist.get_rank() == 0:
        for step, problem in damaged.items():
            aside = find_free_path(folder / f"damaged-{step}")
            (folder / f"step-{step}").rename(aside)
            logger.warning(f"the checkpoint of step {step} is damaged: {problem}. It is now {aside}, and is not used")
    dist.barrier(group=group)


def require_whole(folder: Path, group: dist.ProcessGroup | None) -> None:
    """Check the checkpoint that a stage starts from. All ranks call this.

    Raises:
        DamagedData: a file is missing or has changed.
    """
    if problem := find_damage_together(folder, group):
        raise DamagedData(
            f"{folder}, which the stage starts from, is damaged: {problem}. Restore the file, or compute what made the "
            "checkpoint anew (--from)"
        )


def check_loader_order(out: Path) -> None:
    """Check that the newest checkpoint of the stage, if there is one, has the loader's state of the present order.

    Raises:
        RefusedInput: it is of an older version of the program, whose lanes drew their documents in another order.
    """
    steps = list_finished_checkpoints(out)
    if not steps:
        return
    folder = out / "checkpoint" / f"step-{steps[-1]}"
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    if any(name.startswith("dataloader.lane_") for name in entries):
        raise RefusedInput(
            f"{folder}: an older version of the program has written it, whose order of documents was another one, so "
            "the next unseen document is unknown; finish the stage with that version, or begin the stage anew (--from)"
        )
