"""What requirements.lock says: the version of every distribution, and the hashes of its files (docs/supply.md)."""

import re
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
_PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s\\]+)(?P<hashes>(?:[ \\\n]+--hash=sha256:[0-9a-f]{64})*)", re.M)


def read_pins(text: str) -> dict[str, str]:
    """Return the distributions of a lock's text, normalised name (PEP 503) -> version."""
    return {canonicalize_name(pin["name"]): pin["version"] for pin in _PIN.finditer(text)}


def read_hashes(text: str) -> dict[str, list[str]]:
    """Return the SHA-256 hashes of a lock's text, normalised name -> hexadecimal digits."""
    return {
        canonicalize_name(pin["name"]): re.findall(r"sha256:([0-9a-f]{64})", pin["hashes"])
        for pin in _PIN.finditer(text)
    }
