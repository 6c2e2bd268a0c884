"""For all tests: they may share two busy cores with others, so nothing measures time or counts on a second thread."""

import os

import torch
from hypothesis import settings

from core.cache import keep_compiled_code_apart

keep_compiled_code_apart()

# Matrices this small are slower on several threads, much slower on a busy machine, and training them differs.
torch.set_num_threads(1)

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Ray runs its workers at niceness 15: beside other tests that compute, a training of minutes would take an hour.
os.environ.setdefault("RAY_worker_niceness", "0")
