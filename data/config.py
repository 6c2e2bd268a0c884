"""What a recipe says about data: corpora, tokenizer, filters and shards.

`Recipe.data` (pipelines/recipe.py) is one `DataConfig`; nothing else of a recipe reaches this room.
"""

from dataclasses import dataclass, field

FILTERS = (
    "gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality", "encyclopedia_repetition",
    "encyclopedia_quality", "documentation_quality",
)  # fmt: skip
"""Labels of the quality filters (data/filters/quality.py), each for one style of writing."""
NEAR_DUPLICATES_WITHIN = ("all", "corpus", "shard")


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
    """Names in the catalogue `data.catalogue.corpora.CATALOGUE`; each brings its domain and its stages."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    commercial_only: bool = False
    """Refuse corpora whose licence or terms of access forbid commercial use."""
    languages: tuple[str, ...] = ("en",)
    """Languages kept of web and encyclopedia text (ISO 639-1); empty keeps all. The other rules know English only."""
    filters: tuple[str, ...] = FILTERS
    """Quality filters to apply, by label."""
    redact_pii: bool = True
    """Replace e-mail and public IP addresses in prose, encyclopedia and documentation."""
    near_duplicates_within: str = "all"
    """Where near duplicates are sought: `all` text corpora together, each `corpus` alone, or each `shard` of a corpus
    alone. One task a group holds what repeats in it, 180 bytes a document: trillions of tokens want `shard`."""
    heldout_fraction: float = 0.02
    """Share of the documents of every domain kept out of training, by a hash of the text."""
    midtrain_fraction: float = 0.25
    """Share of the remaining text documents that go to mid-training; pre-training gets the others."""
    decontaminate_ngram: int = 13
    """A training document sharing a run of this many words with a benchmark item, or a short one whole, is dropped."""
    max_conversation_tokens: int = 8192
    """A longer conversation ends after its last answer that fits; one whose first answer does not is set aside."""
    shard_bytes: int = 64 << 20
    """Uncompressed size limit of one MDS shard: 16.8M tokens, some 30 MB as an object in a store."""
    workers: int = 2
    """datatrove tasks that run at once."""
