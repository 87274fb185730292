"""Models run on rows in batches, into records."""
