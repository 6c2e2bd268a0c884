"""The small preparation, run once a session."""

import pytest

from data.pipeline import prepare
from tests.data import planted


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> planted.Preparation:
    folder = tmp_path_factory.mktemp("prepare")
    source, benchmark_texts = planted.write_inputs(folder)
    out = folder / "out"
    reports = []
    with pytest.MonkeyPatch.context() as patch:
        planted.plant(patch, source)
        manifest = prepare(
            planted.CONFIG,
            packages={},
            benchmark_texts=benchmark_texts,
            out=out,
            progress=lambda *args: reports.append(args),
        )
    return planted.Preparation(planted.CONFIG, benchmark_texts, source, out, manifest, reports)
