"""What the project takes from others: pinned files with hashes, licences, advisories, newer versions."""
