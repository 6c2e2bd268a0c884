"""The data part of a recipe: corpora, tokenizer, filters and shards.

`Recipe.data` (pipelines/recipe.py) is one `DataConfig`; data/ reads no other part of a recipe.
"""

from dataclasses import dataclass, field

from data.catalogue.corpus import TEXT_DOMAINS

FILTERS = (
    "gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality", "encyclopedia_repetition",
    "encyclopedia_quality", "documentation_quality",
)  # fmt: skip
"""Labels of the quality filters (data/filters/quality.py), each for one style of writing."""
VERSION = 7
"""Code version of the data step. Raise it when the same inputs would now give other shards."""
NEAR_DUPLICATES_WITHIN = ("all", "corpus")


@dataclass(frozen=True)
class TokenizerConfig:
    """Either an existing Hugging Face tokenizer (`path`) or a byte-level BPE trained on the pre-training text."""

    path: str = ""
    """Folder or `tokenizer.json` of an existing tokenizer; empty trains one."""
    train_vocab_size: int = 4096
    """Number of entries of the trained tokenizer, special tokens included. Ignored where `path` is set."""
    single_digits: bool = False
    """Whether every digit is a word of its own to the trained tokenizer, as in Llama 2 and Qwen; Llama 3 takes up to
    three together. A small model learns to calculate from single ones. Ignored where `path` is set."""
    template_date: str = ""
    """Date (2024-07-26) that the chat template of `path` prints where it would print today's; empty for the others."""


@dataclass(frozen=True)
class DataConfig:
    """The data step: read, filter, deduplicate, decontaminate, tokenize, write MDS shards."""

    corpora: tuple[str, ...]
    """Names in the catalogue `data.catalogue.corpora.CATALOGUE`, which states each corpus's domain and stages."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    commercial_only: bool = False
    """Whether to refuse corpora whose licence or terms of access forbid commercial use."""
    languages: tuple[str, ...] = ("en",)
    """Languages of web and encyclopedia text to keep (ISO 639-1); empty keeps all. The filters are for English."""
    filters: tuple[str, ...] = FILTERS
    """Quality filters to apply, by label."""
    redact_pii: bool = True
    """Whether to replace e-mail and public IP addresses in prose, encyclopedia and documentation."""
    near_duplicates_within: str = "all"
    """Group in which near duplicates are searched for: `all` text corpora together, or each `corpus` alone. One task a
    group holds all its documents that have a duplicate, 180 bytes each."""
    heldout_fraction: float = 0.02
    """Share of the documents of every corpus that is held out of training, chosen by a hash of the text."""
    max_heldout_tokens: int = 10_000_000
    """Largest number of tokens of a corpus to hold out, by the catalogue's count: a smaller share than
    `heldout_fraction` is held out of a corpus of which that would be more. Those of unknown size keep their share."""
    midtrain_fraction: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TEXT_DOMAINS, 0.25))
    """Text domain -> share of the remaining documents, of corpora that feed both text stages, that goes to
    mid-training; pre-training gets the others."""
    max_epochs: dict[str, float] = field(
        default_factory=lambda: {"pretrain": 4.0, "midtrain": 4.0, "sft": 8.0, "qat": 8.0}
    )
    """Stage -> how often it may repeat a domain, by the catalogue's count of tokens; a run that repeats one more often
    is refused. Four repetitions of text are almost as good as new text (arXiv 2305.16264)."""
    decontaminate_ngram: int = 13
    """Length n in words: a training document that shares a run of n words with a benchmark item is dropped, and one
    that contains an item of fewer words completely."""
    max_conversation_tokens: int = 8192
    """Largest number of tokens of a conversation. A longer one ends after its last answer that fits; where not even the
    first answer fits, the conversation is rejected."""
    shard_bytes: int = 64 << 20
    """Largest uncompressed size of one MDS shard: 64 MiB are 16.8M tokens, some 30 MB as an object in a store."""
    max_malformed_share: float = 0.01
    """Largest share of a corpus's rows that may be malformed. The step stops above it, because then the corpus is
    probably not what its entry in the catalogue says. Up to 10 rows never stop it, unless the share is 0."""
    workers: int = 2
    """Number of datatrove tasks that run at once."""


RUNTIME_FIELDS = ("max_epochs", "max_malformed_share", "workers")
"""Fields that change no output of the step, so that a change of them makes nothing stale."""
