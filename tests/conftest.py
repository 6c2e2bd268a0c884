"""For all tests: they may share two busy cores with others, so nothing measures time or counts on a second thread.

Their temporary folders lie below a folder whose name a library could read as a pattern, an address, a formula, markup
or a part of a command. So every test that writes files holds that a path is only a path.
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from core.cache import keep_compiled_code_apart

keep_compiled_code_apart()

# Matrices this small are slower on several threads, much slower on a busy machine, and training them differs.
torch.set_num_threads(1)

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

AWKWARD_NAME = "x [v1] #1 %20 a,b=c $m_a$ é {y} '*"
"""Name of a folder above every `tmp_path`. It has no colon: PATH and PYTHONPATH cannot hold one."""
awkward_folder = Path(tempfile.gettempdir()) / f"mobilemoe-tests-{os.getuid()}" / AWKWARD_NAME
awkward_folder.mkdir(parents=True, exist_ok=True)
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(awkward_folder))  # pytest reads it for the first temporary folder

# Ray runs its workers at niceness 15: beside other tests that compute, a training of minutes would take an hour.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session", autouse=True)
def all_temporary_paths_are_whole():
    """Refuse what was written beside the awkward folder: somewhere its name was cut, and tests would share the file."""
    yield
    beside = sorted(path.name for path in awkward_folder.parent.iterdir() if path.name != AWKWARD_NAME)
    assert beside == [], f"a path was cut: find out where, and delete {beside} in {awkward_folder.parent}"
