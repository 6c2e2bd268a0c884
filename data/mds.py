"""The MDS sample schema, written down once, and the blocks and functions that write shards.

A task writes its part of every destination (`shards/pretrain/web`, `heldout/sft/math`, ...) below `parts/<rank>/`;
`assemble` joins the parts of a destination into one ordinary MDS folder.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from streaming import MDSWriter

from data import tokenizer
from data.chat import Encoder
from data.files import write_json

TEXT_COLUMNS = {"tokens": "ndarray:uint32"}
"""One document: bos ... eos."""
SFT_COLUMNS = {"tokens": "ndarray:uint32", "loss_mask": "ndarray:uint8"}
"""One conversation; loss_mask is 1 on the assistant's contents and the tokens that close them."""
COMPRESSION = "zstd"
HASHES = ["xxh64"]


def destination(metadata: dict) -> str:
    """Folder of a document's shard below the data folder, from its split, kind and domain."""
    split, kind, domain = metadata["split"], metadata["kind"], metadata["domain"]
    if split == "heldout":
        return f"heldout/{'sft' if kind == 'sft' else 'pretrain'}/{domain}"
    return f"shards/{split}/{domain}"


def writer(folder: Path, kind: str, shard_bytes: int) -> MDSWriter:
    """An MDSWriter of the project's schema."""
    columns = SFT_COLUMNS if kind == "sft" else TEXT_COLUMNS
    return MDSWriter(out=str(folder), columns=columns, compression=COMPRESSION, hashes=HASHES, size_limit=shard_bytes)


class ShardWriter(PipelineStep):
    """Last block: tokenizes this rank's documents and writes `parts/<rank>/<destination>`, whole or not at all.

    Beside the parts it leaves what the manifest sums up:
      counts.json   destination -> documents, tokens, trained_tokens, bytes (UTF-8, of the text)
      unigrams.npz  destination -> int64 [vocab], how often each id is a trained target (held-out and sft only)
    """

    type = "💽 - WRITER"
    name = "mds"

    def __init__(self, tokenizer_folder: Path, parts: Path, shard_bytes: int):
        super().__init__()
        self.tokenizer_folder = tokenizer_folder
        self.parts = parts
        self.shard_bytes = shard_bytes

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        loaded = tokenizer.load(self.tokenizer_folder)
        encoder = Encoder(loaded)
        part = self.parts / f"{rank:05d}"
        beside = self.parts / f"{rank:05d}.partial"
        for leftover in (part, beside):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
        writers: dict[str, MDSWriter] = {}
        counts: dict[str, dict[str, int]] = {}
        unigrams: dict[str, np.ndarray] = {}
        for document in data:
            with self.track_time():
                target = destination(document.metadata)
                sample = self._sample(encoder, document)
                if target not in writers:
                    writers[target] = writer(beside / target, document.metadata["kind"], self.shard_bytes)
                    counts[target] = dict.fromkeys(("documents", "tokens", "trained_tokens", "bytes"), 0)
                writers[target].write(sample)
                trained = trained_tokens(sample)
                added = (1, len(sample["tokens"]), len(trained), len(document.text.encode()))
                for key, value in zip(counts[target], added, strict=True):
                    counts[target][key] += value
                if not target.startswith(("shards/pretrain", "shards/midtrain")):
                    if target not in unigrams:
                        unigrams[target] = np.zeros(len(loaded), dtype=np.int64)
                    unigrams[target] += np.bincount(trained, minlength=len(loaded))
        for mds in writers.values():
            mds.finish()
        (beside / "counts.json").write_text(json.dumps(counts))
        np.savez_compressed(beside / "unigrams.npz", **unigrams)
        beside.rename(part)

    @staticmethod
    def _sample(encoder: Encoder, document: Document) -> dict[str, np.ndarray]:
        if document.metadata["kind"] == "sft":
            tokens, loss_mask = encoder.conversation(document.metadata["messages"])
            return {"tokens": tokens, "loss_mask": loss_mask}
        return {"tokens": encoder.document(document.text)}


def trained_tokens(sample: dict[str, np.ndarray]) -> np.ndarray:
    """Ids that a model is trained to predict: an answer's where there is a mask, otherwise all but the opening bos."""
    if "loss_mask" in sample:
        return sample["tokens"][sample["loss_mask"] == 1]
    return sample["tokens"][1:]


def assemble(parts: Path, out: Path, target: str) -> None:
    """Join the parts of one destination into the MDS folder `out/target`; skipped where it is complete.

    Shards are renamed, not copied. An interruption leaves `<target>.partial`, which the next call goes on with.
    """
    final = out / target
    if (final / "index.json").exists():
        return
    beside = final.with_name(final.name + ".partial")
    beside.mkdir(parents=True, exist_ok=True)
    shards = []
    for part in sorted(parts.glob(f"*/{target}")):
        for shard in json.loads((part / "index.json").read_text())["shards"]:
            for data in (shard["raw_data"], shard["zip_data"]):
                source = part / data["basename"]
                _, _, suffix = data["basename"].split(".", 2)
                data["basename"] = f"shard.{len(shards):05d}.{suffix}"
                if source.exists():
                    source.rename(beside / data["basename"])
            assert (beside / shard["zip_data"]["basename"]).exists(), f"{part} lost a shard"
            shards.append(shard)
    write_json(beside / "index.json", {"version": 2, "shards": shards})
    beside.rename(final)
