"""Find the cache: the folder for files that can be made again, such as registry packages and compiled code."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: $MOBILEMOE_CACHE, or ~/.cache/mobilemoe if that is not set. It may not exist yet."""
    return Path(os.environ.get("MOBILEMOE_CACHE", "~/.cache/mobilemoe")).expanduser()
