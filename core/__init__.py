"""Core holds what more than one room needs: sample schema, stage names, atomic files, hashes, errors, progress.

It imports the standard library alone (tests/test_import_rules.py), so every room and every worker can import it fast.
"""
