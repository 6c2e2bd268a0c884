"""Run the small preparation and die by SIGKILL when a phase is reported done: what a node crash leaves behind."""

import os
import signal
import sys
from pathlib import Path

from data import corpora
from data.pipeline import prepare
from tests.data import planted


def main(source: str, benchmark_texts: str, out: str, last_phase: str) -> None:
    corpora.CATALOGUE.update(planted.planted_corpora(Path(source)))

    def report(phase: str, done: int, total: int) -> None:
        if phase == last_phase and done >= 1:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(planted.CONFIG, packages={}, benchmark_texts=Path(benchmark_texts), out=Path(out), report=report)


if __name__ == "__main__":
    main(*sys.argv[1:])
