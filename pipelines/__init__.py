"""The `mobilemoe` command: recipes, the steps of a run, which of them are up to date, and their work on Ray."""
