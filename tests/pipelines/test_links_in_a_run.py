"""A run folder that came from elsewhere: a link where a run appends, cuts or locks a file does not lead to another."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.atomic import write_text
from core.errors import RefusedInput
from core.json_lines import cut_last_lines
from data.folder_lock import lock_folder
from pipelines.engine.run_lock import lock_run
from pipelines.engine.runner import _append_traceback
from pipelines.ray.worker_log import redirect_output
from titan_ext.training.metrics import StageMetrics
from titan_ext.training.train import _log_to_file


@pytest.fixture(autouse=True)
def victim(tmp_path) -> Iterator[Path]:
    """A file of the user's, which nothing may change."""
    path = tmp_path / "keys"
    path.write_bytes(b'{"step": 1}\n')
    yield path
    assert path.read_bytes() == b'{"step": 1}\n'


def lock(hold: Callable, folder: Path) -> None:
    with hold(folder):
        pass


def append_metrics(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_ext.training.metrics.dist.get_rank", lambda: 0)
        metrics = StageMetrics.__new__(StageMetrics)
        metrics._folder = path.parent
        metrics._append(path.name, {"step": 2})


WRITERS: dict[str, Callable[[Path], None]] = {
    ".lock of a run": lambda path: lock(lock_run, path.parent),
    ".lock of a data folder": lambda path: lock(lock_folder, path.parent),
    "traceback.log": _append_traceback,
    "worker.log": lambda path: lock(redirect_output, path),
    "rank_0.log": _log_to_file,
    "metrics.jsonl": append_metrics,
    "cut.jsonl": lambda path: cut_last_lines(path, lambda record: True),
}


@pytest.mark.parametrize("kind", ["link", "hard link"])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_arrives_in_the_file_that_a_link_leads_to(name, kind, tmp_path, victim, monkeypatch):
    monkeypatch.setattr("titan_ext.training.train.init_logger", lambda: None)  # it would replace pytest's handlers
    path = tmp_path / "run" / name.partition(" ")[0]
    path.parent.mkdir()
    (path.symlink_to if kind == "link" else path.hardlink_to)(victim)
    with pytest.raises(RefusedInput, match="remove it and call again") as caught:
        WRITERS[name](path)
    assert str(path) in str(caught.value)


def test_a_link_at_the_name_of_a_partial_file_is_replaced(tmp_path, victim, monkeypatch):
    """Its name can be guessed: it has the numbers of process and thread."""
    monkeypatch.setattr("core.atomic.os.getpid", lambda: 1)
    monkeypatch.setattr("core.atomic.threading.get_ident", lambda: 2)
    (tmp_path / ".manifest.json.1.2.partial").symlink_to(victim)
    (tmp_path / "manifest.json").symlink_to(victim)
    write_text(tmp_path / "manifest.json", "new")
    assert (tmp_path / "manifest.json").read_text() == "new" and not (tmp_path / "manifest.json").is_symlink()
