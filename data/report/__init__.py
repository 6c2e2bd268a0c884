"""What the data step did: counts, the manifest, the statistics page."""
