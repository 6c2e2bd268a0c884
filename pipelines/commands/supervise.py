"""Run work in a thread that a Ctrl-C or SIGTERM can stop at any moment, while this thread shows the progress."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.display import LIVE_INTERVAL_SECONDS, Display
from pipelines.engine.stop_file import find_stop_file

if TYPE_CHECKING:
    from pipelines.ray.cluster import Cluster

CHECKPOINT_PATIENCE_SECONDS = 50
"""Time that training gets to write a checkpoint after an interrupt, before its workers are stopped."""
INTERRUPT_PATIENCE_SECONDS = 20
"""Time that the running work gets to end after that. slurm/mobilemoe.sbatch allows the sum of both."""
LOOK_SECONDS = 0.2


def take_signals() -> None:
    """Treat SIGTERM, which a batch system sends before it kills, as a Ctrl-C.

    Call it again after Ray has started: `ray.init` puts its own handler in place.
    """
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def supervise(work: Callable[[], None], display: Display, cluster: "Cluster", stop: threading.Event) -> None:
    """Run `work` in a thread while this thread shows the progress.

    Python delivers signals to the main thread only, between two of its instructions. Here it never waits long, so an
    interrupt is taken at any moment, also while `work` waits for Ray.

    Args:
        stop: set at an interrupt, before training is asked to stop and the cluster closes, so that what then fails
            counts as interrupted.

    Raises:
        KeyboardInterrupt: interrupted; the workers are stopped.
        BaseException: what `work` raised.
    """
    failure: list[BaseException] = []

    def catch_failure() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    # A daemon: work that does not end after an interrupt must not keep the process alive.
    find_stop_file(cluster.run).unlink(missing_ok=True)  # of a driver that was killed while it waited
    thread = threading.Thread(target=catch_failure, name="steps", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LIVE_INTERVAL_SECONDS)
            display.refresh()
    except KeyboardInterrupt:
        stop.set()
        await_checkpoint(display, cluster)
        display.log_line("interrupted: stopping the workers; the same command continues")
        cluster.close()
        thread.join(INTERRUPT_PATIENCE_SECONDS)
        raise
    if failure:
        raise failure[0]


def await_checkpoint(display: Display, cluster: "Cluster") -> None:
    """Ask training to write a checkpoint and to end, and wait until it has, or until a second interrupt."""
    if not cluster.is_training:
        return
    seconds = CHECKPOINT_PATIENCE_SECONDS
    display.log_line(f"interrupted: training writes a checkpoint, at most {seconds} s; interrupt again to stop at once")
    file, deadline = find_stop_file(cluster.run), time.monotonic() + seconds
    file.touch()
    with contextlib.suppress(KeyboardInterrupt):
        while cluster.is_training and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
    file.unlink(missing_ok=True)
