"""The step engine: which steps of a run are up to date, which have to run, and the record of both on the disk."""
