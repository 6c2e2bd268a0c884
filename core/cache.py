"""Where this program keeps what it can make again: registry packages, compiled code."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return $MOBILEMOE_CACHE, or ~/.cache/mobilemoe."""
    return Path(os.environ.get("MOBILEMOE_CACHE", "~/.cache/mobilemoe")).expanduser()
