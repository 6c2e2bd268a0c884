"""The MDS samples that the data step writes and that training and evaluation read."""

import hashlib

TEXT_COLUMNS = {"tokens": "ndarray:uint32"}
"""One document: bos ... eos."""
SFT_COLUMNS = {"tokens": "ndarray:uint32", "loss_mask": "ndarray:uint8"}
"""One conversation; loss_mask is 1 on the assistant's contents and the tokens that close them."""
SHARD_HASH = "xxh64"
"""Hash in index.json that every reader checks before it uses a shard."""
VOCABULARY_KEY = "vocabulary_sha256"
"""Key of index.json, beside MDS's own: `hash_vocabulary` of the tokenizer whose ids the shards hold."""


def hash_vocabulary(vocabulary: dict[str, int]) -> str:
    """Return one hash of what token ids mean: SHA-256 of `id<TAB>token<LF>` in the order of the ids, UTF-8.

    It does not depend on the file format or the library's version; two tokenizers that share it read each other's
    shards.
    """
    lines = (f"{index}\t{token}\n" for token, index in sorted(vocabulary.items(), key=lambda item: item[1]))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
