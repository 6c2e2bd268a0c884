"""The ground floor: what more than one room needs. Imports the standard library alone."""
