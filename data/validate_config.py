"""Validation of a DataConfig before anything starts, and the estimate of the disk it needs."""

from core.errors import RefusedInput
from core.special_tokens import MIN_VOCAB_SIZE
from core.stages import STAGES
from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import TEXT_DOMAINS, Corpus
from data.config import FILTERS, NEAR_DUPLICATES_WITHIN, DataConfig
from data.tokens.tokenizer_files import locate_tokenizer

MAX_SHARD_BYTES = 2**32 - 1
"""Largest shard: MDS stores offsets in 32 bits."""
MIN_SHARD_BYTES = 1 << 16
MIN_NGRAM = 5
MIN_CONVERSATION_TOKENS = 64
WORK_COPIES = 2
"""Disk at the worst moment in sizes of the uncompressed text: compressed, the output of three steps and the shards."""


def _require(holds: bool, field: str, value: object, rule: str, way_out: str) -> None:
    if not holds:
        raise RefusedInput(f"data.{field} = {value!r}: {rule}; {way_out}")


def validate_config(config: DataConfig) -> None:
    """Check every field of a config.

    Raises:
        RefusedInput: a field cannot be used; states the field, its value, the rule and the way out.
    """
    names = ", ".join(sorted(CATALOGUE))
    _require(bool(config.corpora), "corpora", config.corpora, "no corpus chosen", f"name some of: {names}")
    for name in config.corpora:
        _require(name in CATALOGUE, "corpora", name, "not in the catalogue", f"choose from: {names}")
    duplicates = sorted({name for name in config.corpora if config.corpora.count(name) > 1})
    _require(not duplicates, "corpora", duplicates, "named twice", "name each corpus once")
    non_commercial = [name for name in config.corpora if CATALOGUE[name].non_commercial]
    _require(
        not (config.commercial_only and non_commercial), "corpora", non_commercial,
        "licensed for non-commercial use only, which data.commercial_only refuses",
        "take them out, or set data.commercial_only to False where your use allows them",
    )  # fmt: skip
    bad = [code for code in config.languages if not (code.isalpha() and code.islower() and len(code) in (2, 3))]
    _require(not bad, "languages", bad, "no language code of ISO 639", "write en, de, ...; leave it empty to keep all")
    unknown = sorted(set(config.filters) - set(FILTERS))
    _require(not unknown, "filters", unknown, "no such filter", f"choose from: {', '.join(FILTERS)}")
    _require(
        config.near_duplicates_within in NEAR_DUPLICATES_WITHIN, "near_duplicates_within",
        config.near_duplicates_within, "no such group", f"choose from: {', '.join(NEAR_DUPLICATES_WITHIN)}",
    )  # fmt: skip
    text = [name for name in config.corpora if CATALOGUE[name].kind == "text"]
    _require(bool(text), "corpora", config.corpora, "no text corpus to pre-train on", "add one of kind text")
    _require(
        0 < config.heldout_fraction <= 0.5, "heldout_fraction", config.heldout_fraction,
        "must be above 0 and at most 0.5", "0.02 is the default",
    )  # fmt: skip
    _require(
        config.max_heldout_tokens >= 1, "max_heldout_tokens", config.max_heldout_tokens, "must be at least 1",
        "50000000 is the default",
    )  # fmt: skip
    _validate_by_name(config.midtrain_fraction, "midtrain_fraction", TEXT_DOMAINS)
    for domain, share in config.midtrain_fraction.items():
        _require(
            0 <= share < 1, f"midtrain_fraction.{domain}", share, "must be at least 0 and below 1",
            "0.25 is the default",
        )  # fmt: skip
    _validate_by_name(config.max_epochs, "max_epochs", STAGES)
    for stage, limit in config.max_epochs.items():
        _require(
            limit > 0, f"max_epochs.{stage}", limit, "must be above 0", "4 (text) and 8 (sft, qat) are the defaults"
        )
    _require(
        config.decontaminate_ngram >= MIN_NGRAM, "decontaminate_ngram", config.decontaminate_ngram,
        f"must be at least {MIN_NGRAM} words, or ordinary phrases count as contamination", "13 is the default",
    )  # fmt: skip
    _require(
        config.max_conversation_tokens >= MIN_CONVERSATION_TOKENS, "max_conversation_tokens",
        config.max_conversation_tokens, f"must be at least {MIN_CONVERSATION_TOKENS}",
        "8192, the context of instruction tuning, is the default",
    )  # fmt: skip
    _require(
        MIN_SHARD_BYTES <= config.shard_bytes <= MAX_SHARD_BYTES, "shard_bytes", config.shard_bytes,
        f"must be from {MIN_SHARD_BYTES} to {MAX_SHARD_BYTES} (MDS keeps 32-bit offsets)", "67108864 is the default",
    )  # fmt: skip
    _require(
        0 <= config.max_malformed_share <= 1, "max_malformed_share", config.max_malformed_share,
        "is a share of the rows, from 0 to 1", "0.01 is the default",
    )  # fmt: skip
    _require(config.workers >= 1, "workers", config.workers, "must be at least 1", "use the number of cores")
    _validate_tokenizer(config)


def _validate_by_name(given: dict[str, float], field: str, names: tuple[str, ...]) -> None:
    wrong = sorted(set(given) ^ set(names))
    _require(
        not wrong, field, given, f"has a number for each of {', '.join(names)}", f"add or remove {', '.join(wrong)}"
    )


def _validate_tokenizer(config: DataConfig) -> None:
    path, size = config.tokenizer.path, config.tokenizer.train_vocab_size
    if path:
        file = locate_tokenizer(path)
        _require(
            file.is_file(), "tokenizer.path", path, f"{file} does not exist",
            "give a tokenizer folder or a tokenizer.json, or leave it empty to train one",
        )  # fmt: skip
        from data.tokens.existing_tokenizer import load_existing  # transformers takes seconds to import

        load_existing(path, config.tokenizer.template_date)  # refuses what training or an export cannot use
    else:
        _require(
            not config.tokenizer.template_date, "tokenizer.template_date", config.tokenizer.template_date,
            "the chat template of a trained tokenizer prints no date", "leave it empty",
        )  # fmt: skip
        _require(
            size >= MIN_VOCAB_SIZE, "tokenizer.train_vocab_size", size,
            f"must be at least {MIN_VOCAB_SIZE} (256 bytes and the special tokens)", "4096 is the default",
        )  # fmt: skip


def estimate_bytes(config: DataConfig) -> int:
    """Return the disk in bytes that `prepare` needs at its worst moment, from the catalogue's estimates of the text.

    Fallbacks are counted in addition to their corpora: only later is it known which of them is read.
    """
    corpora: dict[str, Corpus] = {}
    for name in config.corpora:
        corpora[name] = CATALOGUE[name]
        if (fallback := CATALOGUE[name].fallback) is not None:
            corpora[fallback] = CATALOGUE[fallback]
    return WORK_COPIES * sum(corpus.text_bytes for corpus in corpora.values())
