"""Checkpoints to artifact folders: `formats` is the table of formats, `source` opens any checkpoint."""
