"""Benchmarks, held-out loss, the report, the exported formats, and programs for a phone."""
