"""Ray: the cluster of a run, tasks and gangs of training workers on it, and cleanup after a killed driver."""
