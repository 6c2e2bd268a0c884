"""The readers of what others can write. Each target makes input `number` and says what became of it.

A target's function raises for a finding, and returns "read" or "refused". What counts as a refusal is a type that
the reader promises (RefusedInput, DamagedData, RequestRefused); every other exception is a finding, and so is a file
outside of the folder. `tests/fuzz/__main__.py` runs targets at length, `tests/fuzz/test_targets.py` a fixed sample.
"""

import json
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from streaming import MDSWriter

from core.checksums import parse_checksums
from core.errors import DamagedData, RefusedInput
from core.shard_columns import build_columns
from eval.export.bill_of_materials import BILL, build_bill, format_bill, write_bill
from eval.export.tensor_files import open_tensor_files, read_config
from eval.report.scores import read_result
from eval.serve.errors import RequestRefused
from eval.serve.requests import read_chat, read_completion
from eval.serve.tools import find_tool_calls
from pipelines.recipe import to_dict
from pipelines.recipes import RECIPES
from pipelines.recipes.load import load_recipe_of_run
from pipelines.status import read_status
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_text, mutate_value
from titan_ext.loader.shard_index import ShardIndex, open_index
from titan_ext.loader.shard_store import ShardStore

REFUSALS = (RefusedInput, DamagedData, RequestRefused)

COLUMNS = {"column_encodings": ["ndarray:uint32"], "column_names": ["tokens"], "column_sizes": [None]}
ENTRY = COLUMNS | {
    "compression": None, "format": "mds", "hashes": ["xxh64"], "samples": 2, "size_limit": 1 << 20, "version": 2,
    "raw_data": {"basename": "shard.00000.mds", "bytes": 60, "hashes": {"xxh64": "0" * 16}}, "zip_data": None,
}  # fmt: skip
CHAT = {
    "model": "m", "temperature": 0.5, "top_p": 0.9, "seed": 1, "max_tokens": 5, "stop": ["a"], "stream": True,
    "stream_options": {"include_usage": True}, "n": 1, "logit_bias": {}, "response_format": {"type": "text"},
    "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ],
}  # fmt: skip
CORPUS = {"domain": "web", "licence": "MIT OR Apache-2.0", "read": 2, "kept": 1, "address": "hf://datasets/a/b"}
BILL_OF_MATERIALS = json.loads(
    format_bill(build_bill({"recipe": {"seed": 1}, "versions": {"torch": "2"}, "git_commit": "0"}, {"a": CORPUS}), "a")
)
RESULT = {
    "value": 0.5, "stderr": 0.1, "chance": 0.25, "items": 2, "shots": 0, "values": [0.0, 1.0], "prompts_sha256": "0",
    "note": "",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader: `run(chance, folder)` makes an input of `chance` and reads it; files go to `folder`."""

    name: str
    run: Callable[[random.Random, Path], Any]
    sample: int
    """Number of inputs that CI takes."""

    def try_input(self, number: int, folder: Path) -> str:
        """Read input `number`; return "read" or "refused", and raise for everything else."""
        try:
            self.run(random.Random(f"{self.name} {number}"), folder)
        except REFUSALS as refusal:
            assert str(refusal), "a refusal says why"
            return "refused"
        return "read"


class _Right:
    """Right inputs, made once."""

    @cached_property
    def manifest(self) -> dict[str, Any]:
        recipe = to_dict(RECIPES["smoke"].build())
        done = {"state": "done", "version": 1, "fingerprint": "f", "identity": "i", "inputs": {}, "config": {}}
        steps = {name: done | {"seconds": 1.0} for name in ("fetch", "items", "data", "pretrain")}
        steps["eval"] = {"state": "running", "started_unix": 1.0, "fingerprint": "f", "inputs": {}, "attempts": []}
        return {"recipe": recipe, "steps": steps, "versions": {"torch": "2"}, "host": "h"}

    @cached_property
    def shard(self) -> bytes:
        """A shard of two samples, as streaming writes it."""
        with tempfile.TemporaryDirectory() as folder:
            with MDSWriter(out=folder, columns={"tokens": "ndarray:uint32"}) as writer:
                for length in (3, 5):
                    writer.write({"tokens": np.arange(length, dtype=np.uint32)})
            return Path(folder, "shard.00000.mds").read_bytes()


RIGHT = _Right()


def read_recipe(chance: random.Random, folder: Path) -> None:
    """Read the recipe of a run's manifest (`--like RUN`)."""
    (folder / "manifest.json").write_bytes(mutate_json(RIGHT.manifest, chance))
    load_recipe_of_run(folder)


def read_manifest(chance: random.Random, folder: Path) -> None:
    """Read the state of a run."""
    (folder / "manifest.json").write_bytes(mutate_json(RIGHT.manifest, chance))
    json.dumps(read_status(folder).to_dict())


def read_mds_index(chance: random.Random, folder: Path) -> None:
    """Read an index.json, and the columns made of it as the loader does."""
    index = {"version": 2, "shards": [ENTRY, ENTRY | {"samples": 3}], "vocabulary": "v"}
    path = folder / "index.columns"
    path.write_bytes(build_columns(mutate_json(index, chance), "0" * 64, "source"))
    _use_index(ShardIndex(path, "0" * 16))


def read_mds_columns(chance: random.Random, folder: Path) -> None:
    """Open a domain beside which an index.columns lies whose checks of damage were made to fit."""
    index = json.dumps({"version": 2, "shards": [ENTRY, ENTRY | {"samples": 3}]}).encode()
    (folder / "index.json").write_bytes(index)
    line, body = build_columns(index, _sha256(index), "source").split(b"\n", 1)
    if chance.random() < 0.5:
        body = mutate_bytes(body, chance)
    header = json.loads(line) | {"crc32": zlib.crc32(body)}
    changed = mutate_value(header, chance)
    (folder / "index.columns").write_bytes(json.dumps(changed).encode("utf-8", "surrogatepass") + b"\n" + body)
    _use_index(open_index(str(folder), folder / "cache", "domain"))


def _use_index(index: ShardIndex) -> None:
    for shard in range(min(index.num_shards, 3)):
        index.read_entry(shard), index.raw_name(shard), int(index.raw_bytes[shard])
    list(index.column_names)


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def read_mds_shard(chance: random.Random, folder: Path) -> None:
    """Read the samples of a shard whose hash and size the index states rightly."""
    shard = mutate_bytes(RIGHT.shard, chance) or b"\0"
    data = {"basename": "shard.00000.mds", "bytes": len(shard), "hashes": {"xxh64": xxhash.xxh64(shard).hexdigest()}}
    samples = min(int.from_bytes(shard[:4], "little"), 1 << 40)
    index = {"version": 2, "shards": [ENTRY | {"raw_data": data, "samples": samples}]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "shard.00000.mds").write_bytes(shard)
    store = ShardStore("domain", str(folder), folder / "cache", 1 << 30)
    for number in {0, 1, samples - 1}:
        if 0 <= number < samples:
            store.read(0, number)["tokens"].sum()


def read_checksums(chance: random.Random, folder: Path) -> None:
    """Read a SHA256SUMS; every name that is taken stays in the folder."""
    text = f"{'0' * 64}  a/b.json\n{'1' * 64}  model-00001.safetensors\n"
    names = parse_checksums(mutate_text(mutate_text(text, chance), chance), "source")
    for name in names:
        assert (folder / name).resolve().is_relative_to(folder.resolve()), name


def read_chat_request(chance: random.Random, folder: Path) -> None:
    """Read the body of a request for a chat, or for a completion."""
    body = mutate_value(CHAT, chance)
    try:
        value = json.loads(json.dumps(body))
    except (ValueError, RecursionError):
        value = body
    read = read_chat(value, "m")
    assert read.is_chat and all(isinstance(message["content"], str) for message in read.messages)


def read_completion_request(chance: random.Random, folder: Path) -> None:
    """Read the body of a request for a completion."""
    kept = ("model", "temperature", "top_p", "seed", "max_tokens", "stop", "stream", "stream_options", "n")
    body = {key: CHAT[key] for key in kept} | {"prompt": "once"}
    assert isinstance(read_completion(mutate_value(body, chance), "m").prompt, str)


def read_tool_calls(chance: random.Random, folder: Path) -> None:
    """Find the calls of tools in what a model wrote."""
    text = '<tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call>'
    for name, arguments in find_tool_calls(mutate_text(mutate_text(text, chance), chance), {"f"}):
        assert name == "f" and isinstance(json.loads(arguments), dict)


def read_bill_of_materials(chance: random.Random, folder: Path) -> None:
    """Read the bill of an artifact, to pass it on with another."""
    (folder / BILL).write_bytes(mutate_json(BILL_OF_MATERIALS, chance))
    (folder / "new").mkdir(exist_ok=True)
    write_bill(folder / "new", "new", folder)


def read_benchmark_result(chance: random.Random, folder: Path) -> None:
    """Read a benchmark's result, as the report does."""
    (folder / "piqa.json").write_bytes(mutate_json(RESULT, chance))
    read_result(folder / "piqa.json")


def make_model_targets(folder: Path) -> list[Target]:
    """Return the targets that start from a model's folder, which stays as it is.

    Args:
        folder: a BF16 folder, as exported.
    """
    config = json.loads((folder / "config.json").read_text())
    others = {
        name: json.loads((folder / name).read_text())
        for name in ("tokenizer_config.json", "generation_config.json", "tokenizer.json")
        if (folder / name).is_file()
    }
    weights = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header, values = json.loads(weights[8 : 8 + length]), weights[8 + length :]

    def put_right(target: Path) -> None:
        if not (target / "config.json").exists():
            for name, value in {"config.json": config, **others}.items():
                (target / name).write_text(json.dumps(value))
            (target / "model.safetensors").write_bytes(weights)

    def read_model_config(chance: random.Random, target: Path) -> None:
        put_right(target)
        (target / "config.json").write_bytes(mutate_json(config, chance))
        read_config(target)

    def read_tokenizer_files(chance: random.Random, target: Path) -> None:
        put_right(target)
        name = chance.choice(sorted(others))
        try:
            (target / name).write_bytes(mutate_json(others[name], chance))
            read_config(target)
        finally:
            (target / name).write_text(json.dumps(others[name]))

    def read_safetensors(chance: random.Random, target: Path) -> None:
        put_right(target)
        head = mutate_json(header, chance) if chance.random() < 0.9 else json.dumps(header).encode()
        size = len(head) if chance.random() < 0.9 else chance.choice((0, 1, len(head) + 8, 2**31, 2**63))
        (target / "model.safetensors").write_bytes(struct.pack("<Q", size) + head + values)
        tensors = open_tensor_files(target, read_config(target))
        tensors["model.norm.weight"].sum()

    return [
        Target("config.json", read_model_config, 150),
        Target("tokenizer and generation files", read_tokenizer_files, 40),
        Target("safetensors header", read_safetensors, 60),
    ]


TARGETS = [
    Target("recipe of a manifest", read_recipe, 150),
    Target("manifest, state of a run", read_manifest, 150),
    Target("MDS index.json", read_mds_index, 200),
    Target("MDS index.columns", read_mds_columns, 100),
    Target("MDS shard", read_mds_shard, 60),
    Target("SHA256SUMS", read_checksums, 300),
    Target("request for a chat", read_chat_request, 300),
    Target("request for a completion", read_completion_request, 300),
    Target("calls of tools", read_tool_calls, 300),
    Target("result of a benchmark", read_benchmark_result, 150),
    Target("bill of materials", read_bill_of_materials, 150),
]
