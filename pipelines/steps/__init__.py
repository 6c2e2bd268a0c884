"""The twelve steps of a run. Each file holds one: the part that the driver runs, and the functions for Ray's workers.

The functions for workers import torch and the rooms' heavy modules inside, so that the driver never loads them.
"""

from core.stages import STAGES

STEPS = ("fetch", "items", "data", *STAGES, "export", "eval", "package", "profile", "report")
"""Names of the steps in the order they run; the values of --until and --from."""
