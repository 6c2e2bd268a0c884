"""Readers: one function for each form of source file, which yields its records."""
