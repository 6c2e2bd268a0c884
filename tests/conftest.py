"""For all tests: they may share two busy cores with others, so nothing measures time or counts on a second thread."""

import torch
from hypothesis import settings

# Matrices this small are slower on several threads, much slower on a busy machine, and training them differs.
torch.set_num_threads(1)

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
