"""Names of the faults that CI tries; it imports nothing, as the test that names them should start fast."""

FAULTS_OF_CI = (
    "SIGKILL of the driver, before a benchmark's items are renamed",
    "SIGKILL of the driver, before the manifest with the end of items",
    "no flock, and a lease of before the last start of the machine",
    "read-only output",
    "SIGKILL of the worker, before a checkpoint's .metadata is renamed",
    "SIGKILL while another kill is recovered from, twice",
    "__0_0.distcp of the newest checkpoint: flip",
)
"""Those that every test of the program tries."""
NEEDS_ROOT = ("read-only output",)
"""Those that mount a small disk."""
