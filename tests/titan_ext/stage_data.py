"""Test data for training stages, and comparisons of the checkpoints they write."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from streaming import MDSWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedTokenizerFast

from core.samples import SFT_COLUMNS, SHARD_HASH, TEXT_COLUMNS


def write_data(folder: Path, vocab_size: int, domains=("web", "code"), documents: int = 150, seed: int = 0) -> Path:
    """Write a data step's output with learnable text: documents that count upwards modulo the vocabulary."""
    generator = np.random.default_rng(seed)
    for part in ("shards/pretrain", "heldout/pretrain", "shards/sft", "heldout/sft"):
        masked = part.endswith("sft")
        columns = SFT_COLUMNS if masked else TEXT_COLUMNS
        for domain in domains:
            with MDSWriter(
                out=str(folder / part / domain), columns=columns, compression="zstd", hashes=[SHARD_HASH]
            ) as writer:
                for _ in range(documents):
                    length = int(generator.integers(5, 60))
                    start, stride = generator.integers(0, vocab_size), generator.integers(1, 4)
                    tokens = ((start + stride * np.arange(length)) % vocab_size).astype(np.uint32)
                    sample = {"tokens": tokens}
                    if masked:
                        sample["loss_mask"] = (np.arange(length) >= length // 2).astype(np.uint8)
                    writer.write(sample)
    words = {f"w{i}": i for i in range(vocab_size - 1)} | {"<pad>": vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    return folder


def load_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the full tensors of model and optimizer."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("dataloader")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def list_entries(checkpoint: Path) -> set[str]:
    """Return the names of all that a checkpoint holds, numbers of the optimizer's groups included."""
    return set(dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def find_differences(one: Path, other: Path) -> list[str]:
    """Return the names of the model's and optimizer's tensors that differ in any bit between two checkpoints."""
    tensors = [load_tensors(checkpoint) for checkpoint in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    return [name for name, tensor in tensors[0].items() if not torch.equal(tensor, tensors[1][name])]
