"""Finding the run that a file belongs to."""

from pathlib import Path

MANIFEST = "manifest.json"


def find_run(path: Path) -> Path | None:
    """Return the nearest folder above a path that has a manifest.json, as a run has one; None without any."""
    return next((folder for folder in path.absolute().parents if (folder / MANIFEST).is_file()), None)
