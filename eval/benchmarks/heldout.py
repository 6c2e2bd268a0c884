"""Held-out loss of a Hugging Face folder over MDS shards.

The loss is the mean negative log-likelihood in nats a target token. A document is cut into windows of `context`
targets; every token after the first is a target exactly once, conditioned on the tokens before it in its window. With a
`loss_mask` only the targets it marks count. Tensor shapes: B windows, T tokens, V vocabulary, N counted targets.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from streaming.base.compression import decompress
from streaming.base.format import reader_from_json
from streaming.base.hashing import get_hash
from transformers import AutoModelForCausalLM, PreTrainedModel

import eval.hf_mobilemoe  # noqa: F401  registers MobileMoE with the Auto classes
from core.errors import RefusedInput

Window = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Inputs, targets (int64) and which targets count (bool), all of one length."""

_LOGITS = 1 << 29
"""Logits held at once, in elements: bounds the windows of a batch with a large vocabulary."""


def documents(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The samples of an MDS folder in their order, a shard at a time, every shard checked against its hash.

    streaming's LocalDataset reads uncompressed shards only and checks nothing; StreamingDataset would leave copies,
    decompressed, in the folder. Raises RefusedInput for a shard that is missing or damaged.
    """
    with tempfile.TemporaryDirectory(prefix="heldout-") as scratch:
        for info in json.loads((folder / "index.json").read_text())["shards"]:
            stored = info["zip_data"] or info["raw_data"]
            path = folder / stored["basename"]
            content = path.read_bytes() if path.exists() else b""
            if not content or any(get_hash(name, content) != value for name, value in stored["hashes"].items()):
                raise RefusedInput(
                    f"heldout: {path} is missing or does not match its hash; delete {folder} and rerun data"
                )
            raw = Path(scratch) / info["raw_data"]["basename"]
            raw.write_bytes(decompress(info["compression"], content) if info["zip_data"] else content)
            reader = reader_from_json(scratch, None, info)
            for index in range(reader.samples):
                yield reader[index]
            raw.unlink()


def windows(samples: Iterable[dict[str, np.ndarray]], context: int, max_tokens: int) -> Iterator[Window]:
    """Windows of the documents in their order, until `max_tokens` counted targets have been given."""
    left = max_tokens
    for index, sample in enumerate(samples):
        tokens = sample["tokens"].astype(np.int64)
        mask = sample["loss_mask"].astype(bool) if "loss_mask" in sample else np.ones(len(tokens), bool)
        if len(mask) != len(tokens):
            raise RefusedInput(f"heldout: sample {index} has {len(tokens)} tokens but a loss_mask of {len(mask)}")
        for start in range(0, len(tokens) - 1, context):
            targets = tokens[start + 1 : start + 1 + context]
            counted = mask[start + 1 : start + 1 + context]
            counted = counted & (np.cumsum(counted) <= left)
            if counted.any():
                yield tokens[start : start + len(targets)], targets, counted
            left -= int(counted.sum())
            if left == 0:
                return


def _batch_loss(model: PreTrainedModel, batch: list[Window]) -> float:
    """Sum of the counted targets' losses, in nats."""
    longest = max(len(inputs) for inputs, _, _ in batch)
    # Padding on the right: under causal attention nothing in front of it sees it.
    padded = [[np.pad(array, (0, longest - len(array))) for array in window] for window in batch]
    inputs_BT, targets_BT, counted_BT = (
        torch.from_numpy(np.stack(column)).to(model.device) for column in zip(*padded, strict=True)
    )
    logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
    logits_NV = logits_BTV[counted_BT].float()
    return F.cross_entropy(logits_NV, targets_BT[counted_BT], reduction="sum").item()


def _domain_loss(model: PreTrainedModel, scored: list[Window], context: int, batch_size: int) -> dict:
    rows = max(1, min(batch_size, _LOGITS // (context * model.config.vocab_size)))
    # By length, so that a batch holds little padding.
    scored = sorted(scored, key=lambda window: len(window[0]))
    total = sum(_batch_loss(model, scored[i : i + rows]) for i in range(0, len(scored), rows))
    tokens = sum(int(counted.sum()) for _, _, counted in scored)
    return {"loss": total / tokens if tokens else None, "tokens": tokens}


@torch.inference_mode()
def heldout_loss(
    model_dir: Path,
    shards: Path,
    *,
    max_tokens: int,
    context: int,
    batch_size: int,
    report: Callable[[str, int, int], None],
) -> dict:
    """Held-out loss of a HF folder over `shards/<domain>/` (MDS: tokens uint32, optional loss_mask uint8).

    Args:
        max_tokens: counted targets a domain at most; the first documents are taken.
        context: targets a window, at most the model's max_position_embeddings.
        batch_size: windows a forward pass, fewer where the logits would grow too large.
        report: progress, as (domain, done, total).

    Returns {"loss": nats a token over all domains, "tokens", "by_domain": {domain: {"loss", "tokens"}}}; a domain
    without a target has loss None. Raises RefusedInput if there are no shards, a token is outside the vocabulary or the
    context is longer than the model's.
    """
    domains = sorted(index.parent for index in shards.glob("*/index.json"))
    if not domains:
        raise RefusedInput(f"heldout: no <domain>/index.json below {shards}; run the data step first")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", local_files_only=True).to(device).eval()
    longest = model.config.max_position_embeddings
    if not 1 <= context <= longest:
        raise RefusedInput(
            f"heldout: context {context} is not between 1 and the model's max_position_embeddings {longest}"
        )
    by_domain = {}
    for done, domain in enumerate(domains):
        report(domain.name, done, len(domains))
        scored = list(windows(documents(domain), context, max_tokens))
        highest = max((max(int(inputs.max()), int(targets.max())) for inputs, targets, _ in scored), default=0)
        if highest >= model.config.vocab_size:
            raise RefusedInput(
                f"heldout: {domain} holds token {highest}, but the model's vocab_size is {model.config.vocab_size}; "
                "the shards were written with another tokenizer"
            )
        by_domain[domain.name] = _domain_loss(model, scored, context, batch_size)
    report("heldout", len(domains), len(domains))
    tokens = sum(domain["tokens"] for domain in by_domain.values())
    total = sum(domain["loss"] * domain["tokens"] for domain in by_domain.values() if domain["tokens"])
    return {"loss": total / tokens if tokens else None, "tokens": tokens, "by_domain": by_domain}
