"""The `mobilemoe` command: recipes, the steps of a run, which of them are up to date, and their work on Ray."""

import os
import sys


def search_working_directory_last() -> None:
    """Move the working directory to the end of the module path, unless it holds these packages.

    `python -m` and an empty part of PYTHONPATH put it to the front. A `data.py` or `eval.py` of the user would be
    imported there in place of ours. It is done here because this module is imported before any other of ours.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed, so nothing is found there
        return
    last = [entry for entry in sys.path if os.path.abspath(entry) == here and here != root]
    sys.path[:] = [entry for entry in sys.path if entry not in last] + last


search_working_directory_last()
