"""The data loader: shards, domains, packed sequences, batches."""
