"""This package drops or changes documents: repair, quality, language, duplicates, benchmark texts, splits."""
