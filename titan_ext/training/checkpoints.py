"""Checkpoints of a stage: written beside the training, by minutes or steps, some of them for good, and before a stop.

torchtitan's manager copies the state to the host's memory and writes it in a thread (its mode `async`), on GPUs and on
the CPU alike. Training waits for the copy only, of a quarter of a gigabyte a rank in the published sizes. The mode with
pinned memory would hide the copy as well, but it writes in another process, which plans for itself.

A checkpoint counts once its `.metadata` is there, which rank 0 writes when every rank's files are on the disk and
hashed (`titan_ext.training.checkpoint_files`).
"""

import shutil
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torchtitan.components.checkpointer import AsyncMode, CheckpointManager
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from titan_ext.training.checkpoint_files import HashedWriter, check_loader_order, require_whole, set_damaged_aside
from titan_ext.training.stage_spec import METADATA, list_finished_checkpoints
from titan_ext.training.stop_request import StopRequest

PERMANENT = "permanent"
"""Empty file in the folder of a checkpoint that is never deleted."""
CLOSE_PATIENCE_SECONDS = 60.0
"""Time that a checkpoint which is being written gets when the stage ends by an error."""
HUGGING_FACE_INDEX = "model.safetensors.index.json"


class StageCheckpoints(CheckpointManager):
    """torchtitan's CheckpointManager that saves by time, keeps some checkpoints for good, and saves before a stop.

    Attributes:
        is_stopping: whether the ranks have agreed to stop after the checkpoint of this step.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        minutes: float = 0.0
        """Minutes between two checkpoints; 0 saves by steps only."""
        permanent_interval: int = 0
        """Number of steps between two checkpoints that are never deleted; 0 keeps none."""
        stop_file: str = ""
        """File whose appearance asks the stage to write a checkpoint and to end; empty: SIGTERM alone does."""

    save_future: Future | None

    def __init__(self, config: Config, **parts: Any):
        self.is_stopping = False
        self._is_due = False
        self._stop = StopRequest(Path(config.stop_file) if config.stop_file else None)
        self._seconds = 60 * config.minutes
        self._permanent_interval = config.permanent_interval
        self._last_save, self._newest = time.monotonic(), 0
        self._ballot: dist.Work | None = None
        self._votes = torch.zeros(2)
        self._has_saved_since_vote = False
        super().__init__(config, **parts)
        # A group of its own: a checkpoint that is being written uses torchtitan's gloo group from another thread.
        self._voters = cast("dist.ProcessGroup", dist.new_group(backend="gloo")) if self.enable else None

    def agree(self) -> None:
        """Decide, on every rank alike, whether this step ends with a checkpoint and the stage with it.

        Called once a step. It reads the votes that the ranks cast a step ago, and casts those of this step: two
        numbers, exchanged over gloo while the step computes, so neither the device nor the host waits for them. Rank
        0's clock counts, and a request to stop that any rank has got.
        """
        if not self.enable:
            return
        if self._ballot is not None:
            self._ballot.wait()
            is_late, is_asked = (vote > 0 for vote in self._votes.tolist())
            self._is_due, self.is_stopping = is_late and not self._has_saved_since_vote, is_asked
        is_late = self._seconds > 0 and time.monotonic() - self._last_save >= self._seconds
        self._votes = torch.tensor([float(is_late and dist.get_rank() == 0), float(self._stop.is_made())])
        self._has_saved_since_vote = False
        self._ballot = dist.all_reduce(self._votes, op=dist.ReduceOp.MAX, group=self._voters, async_op=True)

    def saves(self, step: int, last_step: bool = False) -> bool:
        """Return whether a checkpoint is saved after this step; ask after `agree`."""
        return self.enable and self._should_save(step, last_step or self.is_stopping)

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Save as torchtitan does, plan only once who writes what, and hash the files before the checkpoint counts.

        The plan of all ranks is made on rank 0 and kept in memory; a rank whose part has not changed sends nothing.
        """
        if to_hf or async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
            return super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        save = dcp.async_save if async_mode == AsyncMode.ASYNC else dcp.save
        planner = DefaultSavePlanner(enable_plan_caching=True)
        writer = HashedWriter(checkpoint_id)
        result = save(
            state_dict, checkpoint_id=checkpoint_id, storage_writer=writer, process_group=self.pg, planner=planner
        )
        if enable_garbage_collection:
            utils.GarbageCollection.collect("GC collection invoked by checkpointer.")
        return result if isinstance(result, Future) else None

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        is_wanted = last_step or self._is_due or self._is_permanent(curr_step)
        return super()._should_save(curr_step, is_wanted)

    def _is_permanent(self, step: int) -> bool:
        return self._permanent_interval > 0 and step % self._permanent_interval == 0

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        """Save if this step is due. A stage that stops waits for its checkpoint, as after the last step."""
        if not self._should_save(curr_step, last_step or self.is_stopping):
            return False
        self._last_save, self._newest, self._has_saved_since_vote = time.monotonic(), curr_step, True
        if self._is_permanent(curr_step) and dist.get_rank() == 0:
            folder = Path(self._create_checkpoint_id(curr_step))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PERMANENT).touch()
        saved = super()._save(curr_step, last_step or self.is_stopping)
        if self.is_stopping:
            logger.info(f"asked to stop: the checkpoint of step {curr_step} is written")
        return saved

    def _load(self, step: int = -1) -> bool:
        """Load as torchtitan does, and listen to SIGTERM from now on.

        What a killed stage did not finish is removed, and a damaged checkpoint is put aside for the one before.

        Raises:
            DamagedData: no checkpoint is whole, or the one that the stage starts from is not.
            RefusedInput: see `check_loader_order`.
        """
        self._stop.listen()
        folder = Path(self.folder)
        if dist.get_rank() == 0:
            remove_unfinished(folder)
        steps = [list_finished_checkpoints(folder.parent)]
        dist.broadcast_object_list(steps, src=0, group=self.pg)
        set_damaged_aside(folder, steps[0], self.pg)
        check_loader_order(folder.parent)  # which reads metadata, and so comes after
        if not steps[0] and self.initial_load_path:
            require_whole(Path(self.initial_load_path), self.pg)
        return super()._load(step)

    def _purge_stale_checkpoints(self) -> None:
        """Delete the finished checkpoints that are neither permanent nor among the latest `keep_latest_k`.

        The one that is being written counts as one of these.
        """
        if not self._should_purge():
            return
        finished = list_finished_checkpoints(Path(self.folder).parent)
        latest = sorted({*finished, self._newest})[-self.keep_latest_k :]
        for step in finished:
            path = Path(self._create_checkpoint_id(step))
            if step not in latest and not (path / PERMANENT).exists():
                (path / METADATA).unlink()  # first, so that a half deleted one counts no more
                self.purge_queue.put(str(path))

    def _close(self) -> None:
        """Wait for a checkpoint that is being written, and end the threads.

        A rank that died leaves the others' unfinished: they say so, and go on from the one before.
        """
        self._stop.close()
        if self.save_future is not None:
            try:
                self.save_future.result(timeout=CLOSE_PATIENCE_SECONDS)
            except Exception as error:  # whatever gloo or the file system raises
                logger.warning(f"the checkpoint that was being written is not finished: {error!r}")
            self.save_future = None
        super()._close()


def remove_unfinished(folder: Path) -> None:
    """Remove the folders of checkpoints that a killed stage did not finish."""
    for path in folder.glob("step-*"):
        if not (path / METADATA).exists() and not (path / HUGGING_FACE_INDEX).exists():
            logger.info(f"{path} was not finished, and is removed")
            shutil.rmtree(path)
