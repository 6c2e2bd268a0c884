"""Define the MDS samples that the data step writes and that training and evaluation read."""

import hashlib

TEXT_COLUMNS = {"tokens": "ndarray:uint32"}
"""Columns of a text sample: the token ids of one document, from bos to eos."""
SFT_COLUMNS = {"tokens": "ndarray:uint32", "loss_mask": "ndarray:uint8"}
"""Columns of a conversation sample: its token ids, and a mask of the same length.

The mask is 1 on the assistant's contents and on the `<|eot_id|>` that closes each, 0 elsewhere.
"""
SHARD_HASH = "xxh64"
"""Name of the hash that index.json holds of every shard. Readers check it before they use the shard."""
VOCABULARY_KEY = "vocabulary_sha256"
"""Key that we add to MDS's index.json: `hash_vocabulary` of the tokenizer whose ids the shards hold."""
SHARDS_AT = "shards_at.txt"
"""Name of a file beside an index.json whose shards lie elsewhere: one line, the path or address of their folder."""


def hash_vocabulary(vocabulary: dict[str, int]) -> str:
    """Return a hash of the meaning of token ids: SHA-256 of the lines `id<TAB>token<LF>` in order of ids, in UTF-8.

    It does not depend on the file format or the version of the tokenizer library. Two tokenizers with the same hash can
    read each other's shards.

    Args:
        vocabulary: token -> id, special tokens included.
    """
    lines = (f"{index}\t{token}\n" for token, index in sorted(vocabulary.items(), key=lambda item: item[1]))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
