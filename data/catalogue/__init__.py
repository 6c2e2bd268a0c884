"""The corpora that a recipe may name: `corpora` lists them and says how to add one."""
