"""The readers of a checkpoint folder, the changes of one, and the comparison of the readers' outcomes."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eval.benchmarks.harness import load_model
from eval.device.weights import DeviceWeights
from eval.export.bf16 import export_bf16
from eval.export.dcp_checkpoint import CheckpointTensors
from eval.export.dimensions import dims_from_config
from eval.export.import_hf import import_folder
from eval.export.source import open_folder
from eval.export.tensor_files import TensorFiles, check_checkpoint, read_config
from eval.hf_mobilemoe import MobileMoEForCausalLM
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_state_dict, kept_in_float32, tensor_shapes
from tests.eval.tiny_checkpoint import DIMS

TINY = replace(DIMS, n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=4, top_k=2)
EMBEDDING, NORM, BIAS = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.feed_forward.expert_bias"
ROUTER = "model.layers.0.feed_forward.router.weight"
INDEX = "model.safetensors.index.json"


def from_transformers(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    return dict(MobileMoEForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def from_auto(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """With the dtype of config.json, as the evaluation loads."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def from_import(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    dims = import_folder(folder, out / "dcp")
    assert dims_from_config(open_folder(out / "dcp").config) == dims
    return CheckpointTensors(out / "dcp", dims)


def from_export(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    return dict(TensorFiles(export_bf16(open_folder(folder), out / "bf16", dtype=torch.float32)))


def from_device(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """Read every tensor as the program's exporter does; the packed ones of a float folder are rounded, so left out."""
    weights = DeviceWeights(open_folder(folder))
    for name, shape in tensor_shapes(weights.config).items():
        if len(shape) > 1 and not kept_in_float32(name):
            weights.read_matrix(name)
    weights.read_unquantized(BIAS)
    return {name: weights.read_unquantized(name) for name in (NORM, ROUTER)}


def from_evaluation(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, 1).model.state_dict())


def from_validation(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    check_checkpoint(folder)
    return {}


READERS = (
    from_transformers, from_auto, from_import, from_export, from_device, from_evaluation, from_validation
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One change of a folder, and the words of the refusal, in lower or upper case; None if all readers take it."""

    change: Callable[[Path], None]
    words: str | None = None
    not_read_by: tuple[Callable, ...] = ()
    """Readers whose own program never comes to this code."""


def edit(file: str, **keys: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file; `...` removes one."""

    def change(folder: Path) -> None:
        path = folder / file
        values = (json.loads(path.read_text()) if path.is_file() else {}) | keys
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def config(**keys: Any) -> Callable[[Path], None]:
    return edit("config.json", **keys)


def text(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    """Change a file's text."""

    def apply(folder: Path) -> None:
        (folder / file).write_text(change((folder / file).read_text()), encoding="utf-8")

    return apply


def tensors(change: Callable[[dict], dict], **metadata: str) -> Callable[[Path], None]:
    """Change the tensors of model.safetensors, or of the file that holds the embedding."""

    def apply(folder: Path) -> None:
        (path,) = (p for p in folder.glob("model*.safetensors") if any("embed" in n for n in load_file(p)))
        changed = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
        save_file(changed, path, metadata=metadata or {"format": "pt"})

    return apply


def index(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Change the content of the index in place."""

    def apply(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        change(values)
        (folder / INDEX).write_text(json.dumps(values))

    return apply


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def copy(source: str, name: str) -> Callable[[Path], None]:
    """Put a copy of a file beside it; `source` may be a pattern, whose first file counts."""
    return lambda folder: shutil.copyfile(sorted(folder.glob(source))[0], folder / name)


def repeat_in_the_last_file(folder: Path) -> None:
    """Write the first file's embedding into the last file, too, with other values."""
    first, *_, last = sorted(folder.glob("*.safetensors"))
    value = next(tensor for name, tensor in load_file(first).items() if name == EMBEDDING)
    save_file(load_file(last) | {EMBEDDING: value + 1}, last, metadata={"format": "pt"})


def link(folder: Path) -> None:
    """Lay the folder out as the hub's cache does: links from a snapshot to files named by their hashes."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(os.path.relpath(blobs / f"{number:064x}", folder))


def without_prefix(values: dict) -> dict:
    return {name.removeprefix("model."): tensor for name, tensor in values.items()}


def last_file(values: dict) -> str:
    return max(values["weight_map"].values())


def quantization(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())["quantization"]
        config(quantization=values | keys)(folder)

    return change


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    """Return a folder's tensors as safetensors reads them, packed ones unpacked."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    found = {f"model.{n.removeprefix('model.')}": t for n, t in found.items() if not n.startswith("lm_head")}
    values = json.loads((folder / "config.json").read_text())
    return dequantize_state_dict(found, read_config(folder)) if values.get("quantization") else found


def check_case(case: Case, original: Path, tmp_path: Path) -> None:
    """Let all readers read a changed copy, and compare their outcomes with each other and with `case`."""
    folder = shutil.copytree(original, tmp_path / "folder")
    if (whole := original.with_name("whole") / "model.safetensors").is_file():
        shutil.copyfile(whole, tmp_path / "whole.safetensors")
    case.change(folder)
    expected = read_files(folder) if case.words is None else {}
    for reader in [reader for reader in READERS if reader not in case.not_read_by]:
        out = tmp_path / reader.__name__
        if case.words is None:
            found = reader(folder, out)
            for name in found.keys() - {"lm_head.weight"}:
                # Only q * scale may be rounded, once, to the dtype that is loaded.
                wanted = expected[name].to(found[name].dtype) if original.name == "int4" else expected[name]
                assert torch.equal(found[name].float(), wanted.float()), (reader.__name__, name)
            some = {"from_device": {NORM, ROUTER}, "from_validation": set()}
            assert found.keys() - {"lm_head.weight"} == some.get(reader.__name__, expected.keys()), reader.__name__
        else:
            with pytest.raises((ValueError, OSError)) as refused:
                reader(folder, out)
            assert case.words.lower() in str(refused.value).lower(), (reader.__name__, str(refused.value))
            assert not (out / "dcp").exists() and not (out / "bf16").exists()
    if case.words is None:
        assert dims_from_config(read_config(folder)) == TINY
        loaded = MobileMoEForCausalLM.from_pretrained(folder).config
        assert dims_from_config(loaded) == TINY
