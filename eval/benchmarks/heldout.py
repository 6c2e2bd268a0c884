"""Held-out loss of a Hugging Face folder over MDS shards.

The loss is the mean negative log-likelihood in nats a target token. A document is cut into windows of `context`
targets; every token after the first is a target exactly once, conditioned on the tokens before it in its window. With a
`loss_mask` only the targets it marks count. Tensor shapes: B windows, T tokens, V vocabulary, N counted targets.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

import eval.hf_mobilemoe  # noqa: F401  registers MobileMoE with the Auto classes
from core.errors import DamagedData, RefusedInput, refuse_value_errors
from core.progress import Progress
from eval.benchmarks.expert_counts import ExpertCounts
from eval.compute_dtype import choose_dtype
from eval.export.tensor_files import check_config
from titan_ext.loader.shard_store import ShardStore

Window = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Inputs, targets (int64) and which targets count (bool), all of one length."""

MAX_LOGITS = 1 << 29
"""Number of logits held at once: bounds the windows of a batch with a large vocabulary."""
CACHE_BYTES = 1 << 28
"""Bytes of unpacked shards kept on the disk while a domain is read; each sample is read once."""


@torch.inference_mode()
def heldout_loss(
    model_dir: Path, shards: Path, *, max_tokens: int, context: int, batch_tokens: int, progress: Progress
) -> dict:
    """Measure the held-out loss of a Hugging Face folder over the MDS shards of `shards/<domain>/`.

    Args:
        max_tokens: largest number of counted targets a domain; the first documents are taken.
        context: targets a window, at most the model's max_position_embeddings.
        batch_tokens: number of tokens a forward pass, fewer where the logits would grow too large.
        progress: called with the domain's name as the phase.

    Returns:
        {"loss": nats a token over all domains, "tokens", "dtype" that the model computed in, "by_domain": {domain:
        {"loss", "tokens", "expert_load", "windows", "targets_sha256"}}}; the loss of a domain without targets is None.
        `expert_load` has every layer's shares of the routed experts, and no layers for a model without. `windows` has
        each window's sum of losses and number of counted targets; two models can be compared on them where
        `targets_sha256` is the same.

    Raises:
        RefusedInput: the folder holds no model, there are no shards, no domain has a target, a token is outside the
            vocabulary, `max_tokens` is below 1, or the context is longer than the model's.
        DamagedData: a shard is damaged or missing, or a sample's loss_mask does not have the length of its tokens.
    """
    if max_tokens < 1:
        raise RefusedInput(f"heldout: max_tokens is {max_tokens}, so nothing would be measured; set it to 1 or more")
    domains = sorted(index.parent for index in shards.glob("*/index.json"))
    if not domains:
        raise RefusedInput(f"heldout: no <domain>/index.json below {shards}; run the data step first")
    model = _load_model(model_dir)
    longest = model.config.max_position_embeddings
    if not 1 <= context <= longest:
        raise RefusedInput(
            f"heldout: context {context} is not between 1 and the model's max_position_embeddings {longest}"
        )
    by_domain = {}
    for done, domain in enumerate(domains):
        progress(domain.name, done, len(domains))
        windows = list(cut_windows(read_documents(domain), context, max_tokens))
        _check_vocabulary(windows, domain, model.config.vocab_size)
        by_domain[domain.name] = _measure_domain(model, windows, context, batch_tokens)
    progress("heldout", len(domains), len(domains))
    tokens = sum(domain["tokens"] for domain in by_domain.values())
    if tokens == 0:
        raise RefusedInput(
            f"heldout: no document of {', '.join(by_domain)} below {shards} has a token to predict (2 tokens, and in a "
            "conversation one that its loss_mask marks); raise data.heldout_fraction and run the data step again"
        )
    total = sum(domain["loss"] * domain["tokens"] for domain in by_domain.values() if domain["tokens"])
    dtype = str(model.dtype).removeprefix("torch.")
    return {"loss": total / tokens, "tokens": tokens, "dtype": dtype, "by_domain": by_domain}


def read_documents(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the samples of an MDS folder in their order; every shard's hash is checked before its first sample.

    The shards are read through the store that training reads them with. Compressed shards are unpacked in a temporary
    folder, which is removed at the end; nothing is written to `folder`.
    """
    with tempfile.TemporaryDirectory(prefix="heldout-") as cache:
        store = ShardStore(folder.name, str(folder), Path(cache), CACHE_BYTES)
        for shard, num_samples in enumerate(store.index.samples):
            for index in range(num_samples):
                yield store.read(shard, index)


def cut_windows(samples: Iterable[dict[str, np.ndarray]], context: int, max_tokens: int) -> Iterator[Window]:
    """Yield windows of at most `context` targets in the order of the documents, up to `max_tokens` counted targets."""
    left = max_tokens
    for index, sample in enumerate(samples):
        tokens = sample["tokens"].astype(np.int64)
        mask = sample["loss_mask"].astype(bool) if "loss_mask" in sample else np.ones(len(tokens), bool)
        if len(mask) != len(tokens):
            raise DamagedData(
                f"heldout: sample {index} has {len(tokens)} tokens but a loss_mask of {len(mask)}; "
                "run the data step again"
            )
        for start in range(0, len(tokens) - 1, context):
            targets = tokens[start + 1 : start + 1 + context]
            counted = mask[start + 1 : start + 1 + context]
            counted = counted & (np.cumsum(counted) <= left)
            if counted.any():
                yield tokens[start : start + len(targets)], targets, counted
            left -= int(counted.sum())
            if left == 0:
                return


def _load_model(model_dir: Path) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_config(model_dir)
    with refuse_value_errors():
        dtype = choose_dtype(model_dir)
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def _check_vocabulary(windows: list[Window], domain: Path, vocab_size: int) -> None:
    highest = max((max(int(inputs.max()), int(targets.max())) for inputs, targets, _ in windows), default=0)
    if highest >= vocab_size:
        raise RefusedInput(
            f"heldout: {domain} holds token {highest}, but the model's vocab_size is {vocab_size}; "
            "the shards were written with another tokenizer"
        )


def _measure_domain(model: PreTrainedModel, windows: list[Window], context: int, batch_tokens: int) -> dict:
    """Return a domain's mean loss in nats a token (None without targets), its counted targets and the experts' load."""
    rows = max(1, min(batch_tokens // context, MAX_LOGITS // (context * model.config.vocab_size)))
    # By length, so that a batch holds little padding.
    order = sorted(range(len(windows)), key=lambda i: len(windows[i][0]))
    sums = [0.0] * len(windows)
    with ExpertCounts(model) as experts:
        for start in range(0, len(order), rows):
            numbers = order[start : start + rows]
            for i, loss in zip(numbers, _sum_losses(model, [windows[i] for i in numbers], experts), strict=True):
                sums[i] = loss
    counts = [int(counted.sum()) for _, _, counted in windows]
    digest = hashlib.sha256(b"".join(targets.tobytes() + counted.tobytes() for _, targets, counted in windows))
    return {
        "loss": sum(sums) / sum(counts) if sum(counts) else None,
        "tokens": sum(counts),
        "expert_load": experts.shares(),
        "windows": [[round(loss, 4), n] for loss, n in zip(sums, counts, strict=True)],
        "targets_sha256": digest.hexdigest(),
    }


def _sum_losses(model: PreTrainedModel, batch: list[Window], experts: ExpertCounts) -> list[float]:
    """Return each window's sum of the counted targets' losses, in nats."""
    longest = max(len(inputs) for inputs, _, _ in batch)
    # Padding on the right: under causal attention nothing in front of it sees it.
    padded = [[np.pad(array, (0, longest - len(array))) for array in window] for window in batch]
    inputs_BT, targets_BT, counted_BT = (
        torch.from_numpy(np.stack(column)).to(model.device) for column in zip(*padded, strict=True)
    )
    lengths_B = torch.tensor([len(inputs) for inputs, _, _ in batch], device=model.device)
    experts.real_BT = torch.arange(longest, device=model.device) < lengths_B[:, None]
    logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
    losses_N = F.cross_entropy(logits_BTV[counted_BT].float(), targets_BT[counted_BT], reduction="none")
    rows_N = counted_BT.nonzero()[:, 0]
    return torch.zeros(len(batch), device=model.device).index_add_(0, rows_N, losses_N).tolist()
