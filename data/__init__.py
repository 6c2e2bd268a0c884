"""The data step: corpora to a tokenizer and MDS shards, with datatrove. `data.pipeline.prepare` runs it."""
