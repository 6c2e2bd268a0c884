"""Programs of others that read our artifacts. `make runtimes` installs them beside the environment and not into it.

NAME.txt pins the packages of a runtime; compute_in_NAME.py runs in its process and imports nothing of this project.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent
RUNTIMES = Path(__file__).parents[2] / ".runtimes"


def require_runtime(*names: str) -> dict[str, str]:
    """Return the environment of a process that uses the packages of runtimes; skip the test where one is missing."""
    for name in names:
        if not (RUNTIMES / name / ".installed").is_file():
            pytest.skip(f"{name} is not installed: `make runtimes` puts it into .runtimes/{name}")
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(RUNTIMES / name) for name in names)}


def run_card(folder: Path, environment: dict[str, str], tmp_path: Path) -> str:
    """Run the Python commands of a folder's model card, and the one that checks its files, as a user pastes them.

    Returns:
        What the Python commands print.
    """
    card = (folder / "README.md").read_text()
    (check,) = re.findall(r"`(sha256sum .*?)`", card)
    subprocess.run(check.split(), cwd=folder, check=True)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert blocks, "the card has commands"
    environment = environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", "\n".join(blocks)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout
