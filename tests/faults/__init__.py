"""Faults injected on purpose, one by one, into real runs of a tiny recipe; `python -m tests.faults.chaos` tries all."""
