"""Hugging Face folders: config.json, code, tokenizer, safetensors shards and checksums, whole or not at all."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import eval.hf_mobilemoe
from core.errors import DamagedData, RefusedInput
from eval.export.dimensions import config_from_dims, dims_from_config
from eval.export.model_card import write_model_card
from eval.hf_mobilemoe.checkpoint_mobilemoe import check_dtype, check_tensors, checkpoint_shapes, kept_in_float32
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.loading_mobilemoe import open_file, read_index, remove_tied_head
from titan_ext.config import ModelDims

CHECKSUMS = "SHA256SUMS"
BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
TURN_END_TOKENS = ("<|eot_id|>", "<|eom_id|>")
"""Generation stops at these as well as at EOS_TOKEN."""

_CODE_FILES = (
    "configuration_mobilemoe.py", "checkpoint_mobilemoe.py", "loading_mobilemoe.py", "packed_mobilemoe.py",
    "modeling_mobilemoe.py",
)  # fmt: skip
_AUTO_MAP = {
    "AutoConfig": "configuration_mobilemoe.MobileMoEConfig",
    "AutoModel": "modeling_mobilemoe.MobileMoEModel",
    "AutoModelForCausalLM": "modeling_mobilemoe.MobileMoEForCausalLM",
}


def write_hf_folder(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    dims: ModelDims,
    tokenizer_dir: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 4 << 30,
    extra_config: dict[str, Any] | None = None,
) -> Path:
    """Write an unquantized checkpoint that AutoModelForCausalLM loads.

    Args:
        tensors: released names (`tensor_shapes`) and values, in any order; taken one by one, so that a generator
            needs no more memory than a shard.
        tokenizer_dir: an HF tokenizer folder with a chat template and the Llama-3 special tokens.
        out: appears when it is complete and replaces an earlier export there.
        dtype: bfloat16 or float32 of all tensors but the router's weight and the expert bias, which stay float32.
        max_shard_bytes: size limit of one safetensors file; a larger tensor gets a file of its own.
        extra_config: keys of config.json to add or to set otherwise.

    Raises:
        RefusedInput: tensors missing, superfluous, misshaped or not finite; a tokenizer that does not fit; `out` is
            something else than an earlier export.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise RefusedInput(f"dtype is {dtype}; a checkpoint is torch.bfloat16 or torch.float32")
    config = config_from_dims(dims, **(extra_config or {}))
    config.dtype = dtype
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    cast = ((name, t.detach().to(torch.float32 if kept_in_float32(name) else dtype)) for name, t in items)
    with new_folder(out) as partial:
        write_folder(cast, config, tokenizer_dir, partial, max_shard_bytes)
    return out


def write_folder(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: MobileMoEConfig,
    tokenizer_dir: Path,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Fill `folder` with the tensors of `checkpoint_shapes(config)`, config, code and tokenizer."""
    write_tokenizer(Path(tokenizer_dir), config, folder)
    (folder / "config.json").write_text(json.dumps(_config_json(config), indent=2) + "\n")
    for name in _CODE_FILES:
        shutil.copyfile(Path(eval.hf_mobilemoe.__file__).parent / name, folder / name)
    form = "bf16 checkpoint" if config.quantization is None else f"INT4 checkpoint ({config.quantization['format']})"
    write_model_card(folder, config, form)
    shapes = _write_shards(tensors, config, folder, max_shard_bytes)
    check_tensors(shapes, config, "the exported state dict")


def _config_json(config: MobileMoEConfig) -> dict[str, Any]:
    """The config in full: save_pretrained would leave out the keys that have transformers' own default value."""
    values = config.to_diff_dict()
    if config.quantization is None:
        del values["quantization"]
    return values | {
        "architectures": ["MobileMoEForCausalLM"],
        "auto_map": _AUTO_MAP,
        "model_type": MobileMoEConfig.model_type,
        "transformers_version": transformers.__version__,
    }


def write_tokenizer(tokenizer_dir: Path, config: MobileMoEConfig, folder: Path) -> None:
    """Copy the tokenizer through transformers, set the config's special ids, and write generation_config.json.

    What it gives goes into the model's `generate` as it is: ids and mask alone, padded on the left.

    Raises:
        RefusedInput: there is no tokenizer, or it is larger than the vocabulary, or lacks a chat template or a Llama-3
            special token.
    """
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise RefusedInput(f"{tokenizer_dir} has no tokenizer.json; copy the model's tokenizer there, all of its files")
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_dir,
        # Of a tokenizer that names none, transformers expects token types too, which `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        model_max_length=config.max_position_embeddings,
    )
    if len(tokenizer) > config.vocab_size:
        raise RefusedInput(
            f"{tokenizer_dir} has {len(tokenizer)} tokens, the model's vocab_size is {config.vocab_size}"
        )
    if not tokenizer.chat_template:
        raise RefusedInput(f"{tokenizer_dir} has no chat template; save the tokenizer with one")
    vocab = tokenizer.get_vocab()
    missing = [token for token in (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, TURN_END_TOKENS[0]) if token not in vocab]
    if missing:
        raise RefusedInput(f"{tokenizer_dir} lacks the special tokens {missing}; export needs the Llama-3 ones")
    config.bos_token_id, config.pad_token_id = vocab[BOS_TOKEN], vocab[PAD_TOKEN]
    config.eos_token_id = [vocab[token] for token in (EOS_TOKEN, *TURN_END_TOKENS) if token in vocab]
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


def _write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], config: MobileMoEConfig, folder: Path, max_shard_bytes: int
) -> dict[str, tuple[int, ...]]:
    """Save the tensors as they come, in files of at most `max_shard_bytes`; returns every name and shape."""
    expected = checkpoint_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    shard_names: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total_bytes = shard_bytes = 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        shard_names.append(list(shard))
        save_file(shard, folder / f"shard-{len(shard_names)}", metadata={"format": "pt"})
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if name in shapes:
            raise RefusedInput(f"{name} was given twice")
        if name not in expected or tuple(tensor.shape) != expected[name]:
            rule = f"expected {list(expected[name])}" if name in expected else "is not a tensor of this model"
            raise RefusedInput(f"{name} {list(tensor.shape)}: {rule}")
        if not tensor.isfinite().all():
            raise RefusedInput(f"{name} holds NaN or infinite values; the checkpoint it comes from is not usable")
        shapes[name] = tuple(tensor.shape)
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        shard[name] = tensor.contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    _name_shards(folder, shard_names, total_bytes)
    return shapes


def _name_shards(folder: Path, shard_names: list[list[str]], total_bytes: int) -> None:
    """Give the numbered files their final names, which state how many there are, and write the index."""
    n = len(shard_names)
    files = [SAFE_WEIGHTS_NAME] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for i, file in enumerate(files):
        (folder / f"shard-{i + 1}").rename(folder / file)
    if n > 1:
        weight_map = {name: file for file, names in zip(files, shard_names, strict=True) for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def read_config(folder: Path) -> MobileMoEConfig:
    """config.json of a local folder, as our own class whatever code lies beside it.

    Raises:
        RefusedInput: there is none, it is no JSON object, lacks a key or has a value that MobileMoE does not.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise RefusedInput(f"{folder} has no config.json; it is not a Hugging Face checkpoint")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise RefusedInput(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise RefusedInput(f"{path} is {type(values).__name__} and not a JSON object; copy it again")
    return MobileMoEConfig.from_dict(values, name_or_path=str(folder))


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of a local folder's safetensors files; each is read when it is asked for, and not kept.

    Raises:
        RefusedInput: a file is missing, cut short or no safetensors file, or the index or the head is not as it must be;
            when a tensor is read, its dtype is wrong or a value is not finite.
    """

    def __init__(self, folder: Path):
        index = Path(folder) / SAFE_WEIGHTS_INDEX_NAME
        files = read_index(index) if index.is_file() else {SAFE_WEIGHTS_NAME: []}
        shards = {Path(folder) / name: open_file(Path(folder) / name, expected) for name, expected in files.items()}
        self._files = {name: path for path, shard in shards.items() for name in shard.keys()}  # noqa: SIM118
        self._shards = {name: shards[path] for name, path in self._files.items()}
        self._shards = remove_tied_head(self._shards, self.__getitem__, folder)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._shards[name].get_tensor(name)
        check_dtype(name, tensor.dtype, self._files[name])
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RefusedInput(
                f"{self._files[name]}: {name} holds NaN or infinite values; the checkpoint is not usable"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, from the files' headers."""
        return {name: tuple(shard.get_slice(name).get_shape()) for name, shard in self._shards.items()}


def open_tensors(folder: Path, config: MobileMoEConfig) -> Mapping[str, torch.Tensor]:
    """The tensors `config` describes, of a Hugging Face folder or of a checkpoint that was imported from one.

    Raises:
        RefusedInput: they are incomplete or damaged.
    """
    if (Path(folder) / ".metadata").is_file():
        from eval.export.checkpoint import read_checkpoint  # torchtitan's model, which a Hugging Face folder needs not

        return read_checkpoint(Path(folder), dims_from_config(config))
    tensors = TensorFiles(folder)
    check_tensors(tensors.shapes(), config, str(folder))
    return tensors


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder `out`.partial to write into; on success it gets its checksums and becomes `out`.

    An earlier artifact at `out` (one with checksums) is replaced; anything else there is a ValueError.
    """
    out = Path(out)
    if out.exists() and not (out / CHECKSUMS).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise RefusedInput(f"{out} exists and is not an earlier export; choose another folder or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    write_checksums(partial)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def write_checksums(folder: Path) -> Path:
    """Write SHA256SUMS over every file of the folder, readable by `sha256sum -c`."""
    sums = Path(folder) / CHECKSUMS
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p != sums)
    sums.write_text("".join(f"{_sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))
    return sums


def verify_checksums(folder: Path) -> int:
    """Check every file SHA256SUMS lists and return their number; files it doesn't list are not looked at.

    Raises:
        RefusedInput: SHA256SUMS is absent, or a file is missing or differs; the message names it.
    """
    sums = Path(folder) / CHECKSUMS
    if not sums.is_file():
        raise RefusedInput(f"{folder} has no {CHECKSUMS}; the copy is incomplete or not one of our artifacts")
    lines = sums.read_text().splitlines()
    for line in lines:
        expected, name = line.split("  ", 1)
        path = Path(folder) / name
        if not path.is_file():
            raise DamagedData(f"{path} is listed in {CHECKSUMS} but missing; copy the folder again")
        if (found := _sha256(path)) != expected:
            raise DamagedData(f"{path} has SHA-256 {found}, {CHECKSUMS} says {expected}; copy the file again")
    return len(lines)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
