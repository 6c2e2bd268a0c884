"""What a recipe says about data: corpora, tokenizer, filters and shards.

`Recipe.data` (pipelines/recipe.py) is one `DataConfig`; nothing else of a recipe reaches this room.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenizerConfig:
    """Either an existing Hugging Face tokenizer (`path`) or a byte-level BPE trained on the pre-training text."""

    path: str = ""
    """Folder or `tokenizer.json` of an existing tokenizer; empty trains one."""
    train_vocab_size: int = 4096
    """Entries of the trained tokenizer, special tokens included. Ignored where `path` is set."""


@dataclass(frozen=True)
class DataConfig:
    """The data step: read, filter, deduplicate, decontaminate, tokenize, write MDS shards."""

    corpora: tuple[str, ...]
    """Names in the catalogue `data.corpora.CATALOGUE`; each brings its domain and its stages."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    heldout_fraction: float = 0.02
    """Share of the documents of every domain kept out of training, by a hash of the text."""
    midtrain_fraction: float = 0.25
    """Share of the remaining text documents that go to mid-training; pre-training gets the others."""
    decontaminate_ngram: int = 13
    """A training document sharing a run of this many words with a benchmark item is dropped."""
    shard_bytes: int = 64 << 20
    """Uncompressed size limit of one MDS shard."""
    workers: int = 2
    """datatrove tasks that run at once."""
    seed: int = 0
