"""Keys that are planted in the environment of a run, and searched for in everything that it leaves and shows."""

from collections.abc import Iterable
from pathlib import Path

PLANTED = {
    "HF_TOKEN": "hf_PlantedHubToken0123456789",
    "AWS_SECRET_ACCESS_KEY": "PlantedCloudKey/0123456789+abc",
    "AWS_SESSION_TOKEN": "PlantedSession0123456789",
    "WANDB_API_KEY": "planted0wandb0123456789",
    "MOBILEMOE_API_KEY": "PlantedServerKey0123456789",
}
"""Variable -> key."""


def find_planted(content: bytes, where: str) -> list[str]:
    """Return `WHERE: VARIABLE` for each planted key in the content."""
    return [f"{where}: {name}" for name, key in PLANTED.items() if key.encode() in content]


def find_planted_in_files(folder: Path) -> list[str]:
    """Search every file below a folder, and the names of files."""
    found = [item for path in folder.rglob("*") for item in find_planted(str(path).encode(), "name of a file")]
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found += find_planted(path.read_bytes(), str(path))
    return found


def find_planted_in_commands(pids: Iterable[int]) -> list[str]:
    """Search the command lines of processes, which every user of the machine can read."""
    found = []
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # it has ended since
            continue
        found += find_planted(command, f"process {pid}")
    return found
