"""This package reports on the data step: counts, the manifest, the statistics page."""
