"""The report of a run: `run_report` writes it, `collect` gathers its numbers, `figures` draws its pictures."""
