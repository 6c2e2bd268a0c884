"""Every rank runs, the failed ones are named with what they work on, and what was done stays done."""

import logging
import os
import signal
from pathlib import Path

import pytest
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from core.errors import DamagedData
from data.execution import MAX_SHOWN_FAILURES, MAX_TRIES, StepRunner
from data.readers.corpus_reader import RankReader

LABELS = ["corpus.00000", "corpus.00001", "corpus.00002", "other.00000"]


class UnpicklableError(Exception):
    """An error that cannot be sent to another process: its constructor takes two arguments, and pickle gives one."""

    def __init__(self, code: int, text: str):
        super().__init__(f"{text} ({code})")


class Touch(PipelineStep):
    """Appends a line to a file of its rank; rank 1 fails until a file says otherwise, and others as `failing` says."""

    def __init__(self, folder: Path, killed: bool = False, failing: tuple[int, ...] = ()):
        super().__init__()
        self.folder = str(folder)
        self.killed = killed
        self.failing = failing

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        with (Path(self.folder) / str(rank)).open("a") as file:
            file.write("ran\n")
        if (Path(self.folder) / "repaired").exists():
            return
        if rank in self.failing:
            raise UnpicklableError(7, "the far store did not answer")
        if rank == 1:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("disk is full")


def test_an_input_is_emptied_when_its_task_is_completed_and_not_before(tmp_path):
    runner = StepRunner("local", 2, tmp_path / "logs", lambda *_: None)
    files = [tmp_path / "input" / f"{rank:05d}.jsonl.zst" for rank in range(4)]
    files[0].parent.mkdir()
    for file in files[:3]:  # the last rank had no document
        file.write_text("documents")
    with pytest.raises(RuntimeError, match="disk is full"):
        runner.run("touch", [Touch(tmp_path)], LABELS, consumed=files[0].parent)
    assert [file.exists() and file.read_text() for file in files] == ["", "documents", "", False]
    files[2].write_text("documents")  # as if killed between the marker and the emptying
    (tmp_path / "repaired").touch()
    runner.run("touch", [Touch(tmp_path)], LABELS, consumed=files[0].parent)
    assert [file.exists() and file.read_text() for file in files] == ["", "", "", False]


def test_an_emptied_input_is_not_taken_for_no_documents(tmp_path):
    (tmp_path / "00000.jsonl.zst").touch()
    with pytest.raises(DamagedData, match=r"00000\.jsonl\.zst is empty: a later step has read it"):
        list(RankReader(tmp_path).run(None, 0, 2))
    assert list(RankReader(tmp_path).run(None, 1, 2)) == []


def check_failure_and_resume(kind: str, folder: Path, killed: bool = False) -> None:
    """All ranks but one complete, and the second run repeats that one alone."""
    reports = []
    runner = StepRunner(kind, 2, folder / "logs", lambda *args: reports.append(args))
    with pytest.raises(RuntimeError, match=r"data step 'touch': ranks \[1\] of 4 did not complete") as caught:
        runner.run("touch", [Touch(folder, killed)], LABELS)
    assert "rank 1 (corpus.00001): " in str(caught.value)
    assert str(folder / "logs/touch/logs/task_00001.log") in str(caught.value)
    if not killed:
        assert "OSError: disk is full" in str(caught.value)
    (folder / "repaired").touch()
    runner.run("touch", [Touch(folder, killed)], LABELS)
    ran = [(folder / str(rank)).read_text().count("ran") for rank in range(4)]
    assert ran == [1, 2 if not killed else MAX_TRIES + 1, 1, 1]
    assert reports[-1] == ("touch", 4, 4)


def test_failed_rank_is_raised_and_run_again_locally(tmp_path):
    check_failure_and_resume("local", tmp_path)


def test_a_rank_that_kills_its_worker_fails_alone_and_is_run_again(tmp_path):
    check_failure_and_resume("local", tmp_path, killed=True)


@pytest.mark.parametrize("killed", [False, True])
def test_failed_rank_is_raised_and_run_again_on_ray(tmp_path, killed):
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        check_failure_and_resume("ray", tmp_path, killed)
    finally:
        ray.shutdown()


def test_every_failure_is_logged_at_once_and_the_message_states_the_first_ones(tmp_path, caplog):
    failing = tuple(range(2, 15))
    labels = [f"corpus.{rank:05d}" for rank in range(16)]
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError) as caught:
        StepRunner("local", 2, tmp_path / "logs", lambda *_: None).run(
            "touch", [Touch(tmp_path, False, failing)], labels
        )
    message = str(caught.value)
    assert message.count("UnpicklableError: the far store did not answer (7)") == MAX_SHOWN_FAILURES - 1
    assert f"and {len(failing) + 1 - MAX_SHOWN_FAILURES} more" in message
    assert sum("the far store did not answer" in record.getMessage() for record in caplog.records) == len(failing)
    assert sorted(int(path.name) for path in tmp_path.glob("logs/touch/completions/*")) == [0, 15]
