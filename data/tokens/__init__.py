"""Documents and conversations to token ids: tokenizer, chat template and loss mask, MDS shards."""
