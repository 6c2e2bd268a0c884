"""Ray: the cluster of a run, tasks and gangs of training workers on it, and the end of what a killed driver leaves."""
