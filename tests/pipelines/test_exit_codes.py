"""Exit codes: 2 for a refusal before anything has started, and for nothing else; 1 with a traceback; 130."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from core.errors import DamagedData, RefusedInput
from pipelines.cli import DONE, FAILED, INTERRUPTED, REFUSED, main
from pipelines.commands import COMMANDS
from pipelines.commands.command import Command
from pipelines.engine.manifest import Manifest
from pipelines.engine.run_lock import lock_run
from pipelines.engine.step import Step


@pytest.mark.parametrize(
    ("error", "code", "words", "has_traceback"),
    [
        (RefusedInput("--out x: exists"), REFUSED, "refused: --out x: exists", False),
        (DamagedData("a.bin has another hash"), FAILED, "failed: a.bin has another hash", False),
        (ValueError("out of a library"), FAILED, "ValueError: out of a library", True),
        (OSError("disk full"), FAILED, "OSError: disk full", True),
        (AssertionError("our own mistake"), FAILED, "AssertionError: our own mistake", True),
        (KeyboardInterrupt(), INTERRUPTED, "the same command continues", False),
    ],
)
def test_exception_of_a_command_decides_its_exit_code(error, code, words, has_traceback, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setitem(COMMANDS, "recipes", Command(COMMANDS["recipes"].arguments, fail))
    assert main(["recipes"]) == code
    message = capsys.readouterr()
    assert words in message.err and ("Traceback" in message.err) == has_traceback and message.out == ""


def test_damaged_manifest_is_no_refusal(tmp_path, capsys):
    """json raises a ValueError for it, which once counted as refused input."""
    (tmp_path / "manifest.json").write_text('{"steps"')
    assert main(["status", str(tmp_path)]) == FAILED
    assert "JSONDecodeError" in capsys.readouterr().err


@pytest.fixture
def run_one_step(tmp_path, monkeypatch):
    """`mobilemoe run smoke` with one step of the test's own and no Ray; returns the exit code and the run folder."""

    def run(work):
        step = Step("fetch", 1, (), {}, (), work)
        monkeypatch.setattr("pipelines.steps.build_steps.build_steps", lambda context, package: [step])
        cluster = SimpleNamespace(
            dashboard="none", run=tmp_path / "run", check_size=lambda **parts: None, close=lambda: None
        )
        monkeypatch.setattr("pipelines.ray.cluster.Cluster", lambda *arguments: nullcontext(cluster))
        handler = signal.getsignal(signal.SIGTERM)
        try:
            return main(["run", "smoke", "--out", str(tmp_path / "run"), "--json"]), tmp_path / "run"
        finally:
            signal.signal(signal.SIGTERM, handler)

    return run


@pytest.mark.parametrize("error", [RefusedInput("no such domain"), ValueError("out of a library"), KeyError("x")])
def test_whatever_a_step_raises_is_a_failed_step(error, run_one_step, capsys):
    def work():
        raise error

    code, run = run_one_step(work)
    assert code == FAILED
    message = capsys.readouterr().err
    assert f"step fetch failed: {error}" in message and f"logs: {run / 'logs'}" in message
    assert "Traceback" not in message
    log = (run / "logs" / "fetch.driver.log").read_text()
    assert "Traceback" in log and "raise error" in log and str(error) in log
    entry = Manifest(run).step("fetch")
    assert (entry["state"], entry["error"]) == ("failed", f"{type(error).__name__}: {error}")


def test_failed_step_is_resumed_with_0(run_one_step, capsys):
    code, run = run_one_step(lambda: None)
    assert code == DONE
    assert json.loads(capsys.readouterr().out)["run"] == str(run)
    assert not (run / "logs").exists()


def test_error_outside_of_the_steps_shows_its_traceback(run_one_step, monkeypatch, capsys):
    def fail(self, *arguments):
        raise OSError("disk full")

    monkeypatch.setattr(Manifest, "start", fail)
    code, _ = run_one_step(lambda: None)
    assert code == FAILED
    message = capsys.readouterr().err
    assert "Traceback" in message and "OSError: disk full" in message


def test_interrupted_process_ends_with_130(tmp_path, smoke):
    """A real process, in the middle of a command: `status --watch` of a run whose driver is this process."""
    Manifest(tmp_path).describe(smoke)
    with lock_run(tmp_path):
        command = [sys.executable, "-u", "-m", "pipelines.cli", "status", str(tmp_path), "--watch"]
        # rich shows a live table on a terminal only, and takes this pipe for one with FORCE_COLOR.
        watcher = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"FORCE_COLOR": "1", "COLUMNS": "120"},
            # Tests that a shell started in the background ignore SIGINT, and so would their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        for line in watcher.stdout:
            if "pretrain" in line:  # the table is shown, so the command is under way
                break
        watcher.send_signal(signal.SIGINT)
        _, message = watcher.communicate(timeout=30)
    assert watcher.returncode == INTERRUPTED, message
    assert "the same command continues" in message


def test_refused_process_ends_with_2_and_creates_nothing(tmp_path):
    command = [sys.executable, "-m", "pipelines.cli", "run", "smoke", "--model.top-k", "17", "--out", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == REFUSED and "refused: " in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []
