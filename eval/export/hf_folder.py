"""Writing Hugging Face folders: config.json, code, tokenizer, safetensors shards, model card and checksums."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import eval.hf_mobilemoe
from core.atomic import write_json
from core.errors import RefusedInput, refuse_value_errors
from core.special_tokens import BOS, PAD, REQUIRED_TOKENS, STOP_TOKENS
from eval.config import ExportConfig
from eval.export.artifact_folder import new_folder
from eval.export.dimensions import config_from_dims, dims_from_config
from eval.export.model_card import OWN_CODE, write_model_card
from eval.hf_mobilemoe.checkpoint_mobilemoe import check_tensors, checkpoint_shapes, kept_in_float32
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.folder_mobilemoe import check_folder, check_tokenizer
from eval.hf_mobilemoe.tensors_mobilemoe import is_finite
from titan_ext.config import ModelDims

_CODE_FILES = (
    "configuration_mobilemoe.py", "spellings_mobilemoe.py", "checkpoint_mobilemoe.py", "folder_mobilemoe.py",
    "tensors_mobilemoe.py", "loading_mobilemoe.py", "packed_mobilemoe.py", "inputs_mobilemoe.py",
    "versions_mobilemoe.py", "modeling_mobilemoe.py",
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
    max_shard_bytes: int = ExportConfig.max_shard_bytes,
    extra_config: dict[str, Any] | None = None,
) -> Path:
    """Write an unquantized checkpoint that AutoModelForCausalLM loads; return `out`.

    Args:
        tensors: released names (`tensor_shapes`) and values, in any order; taken one by one, so that a generator
            needs no more memory than a shard.
        tokenizer_dir: an HF tokenizer folder with a chat template and the Llama-3 special tokens.
        out: appears when it is complete and replaces an earlier export there.
        dtype: bfloat16 or float32 of all tensors but the router's weight and the expert bias, which stay float32.
        max_shard_bytes: size limit of one safetensors file; a larger tensor gets a file of its own.
        extra_config: keys of config.json to add or to replace.

    Raises:
        RefusedInput: tensors missing, superfluous, misshaped or not finite; a tokenizer that does not fit; something
            other than an earlier export at `out`.
    """
    with refuse_value_errors():
        config = config_from_dims(dims, **(extra_config or {}))
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    with new_folder(out) as partial:
        fill_folder(cast_tensors(items, config, dtype), config, tokenizer_dir, partial, max_shard_bytes)
    return out


def cast_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], config: MobileMoEConfig, dtype: torch.dtype
) -> Iterable[tuple[str, torch.Tensor]]:
    """Set `config.dtype` to the dtype of a checkpoint, and return its tensors in it, each cast when it is taken.

    Raises:
        RefusedInput: the dtype is neither bfloat16 nor float32.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise RefusedInput(f"dtype is {dtype}; a checkpoint is torch.bfloat16 or torch.float32")
    config.dtype = dtype
    return ((name, t.detach().to(torch.float32 if kept_in_float32(name) else dtype)) for name, t in tensors)


def fill_folder(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: MobileMoEConfig,
    tokenizer_dir: Path,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Fill `folder` with the tensors of `checkpoint_shapes(config)`, config, code, tokenizer and model card.

    Raises:
        RefusedInput: as `write_hf_folder`.
    """
    write_tokenizer(Path(tokenizer_dir), config, folder)
    write_json(folder / "config.json", _config_json(config))
    for name in _CODE_FILES:
        shutil.copyfile(Path(eval.hf_mobilemoe.__file__).parent / name, folder / name)
    form = "bf16 checkpoint" if config.quantization is None else f"INT4 checkpoint ({config.quantization['format']})"
    write_model_card(folder, dims_from_config(config), form, OWN_CODE)
    shapes = write_shards(tensors, checkpoint_shapes(config), folder, max_shard_bytes)
    with refuse_value_errors():
        check_tensors(shapes, config, "the exported state dict")
        check_folder(folder)


def _config_json(config: MobileMoEConfig) -> dict[str, Any]:
    """Return the config in full: save_pretrained would leave out the keys that have transformers' own default."""
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
    """Copy the tokenizer through transformers, set the special ids of `config`, and write generation_config.json.

    Raises:
        RefusedInput: as `read_tokenizer`.
    """
    read_tokenizer(tokenizer_dir, config).save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


def read_tokenizer(tokenizer_dir: Path, config: MobileMoEConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, and set the special ids of `config`.

    The tokenizer's output goes into the model's `generate` as it is: ids and mask alone, padded on the left.

    Raises:
        RefusedInput: there is no tokenizer, or it is larger than the vocabulary, or lacks a chat template or a Llama-3
            special token.
    """
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise RefusedInput(f"{tokenizer_dir} has no tokenizer.json; copy the model's tokenizer there, all of its files")
    with refuse_value_errors():
        own_ids = check_tokenizer(tokenizer_dir, config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_dir,
        # A tokenizer that names none would return token types too, which `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        model_max_length=config.max_position_embeddings,
        # Llama 3's own files ask to remove the space in front of a full stop when ids become text.
        clean_up_tokenization_spaces=False,
    )
    if len(tokenizer) > config.vocab_size:
        raise RefusedInput(
            f"{tokenizer_dir} has {len(tokenizer)} tokens, the model's vocab_size is {config.vocab_size}"
        )
    if not tokenizer.chat_template:
        raise RefusedInput(f"{tokenizer_dir} has no chat template; save the tokenizer with one")
    vocab = tokenizer.get_vocab()
    missing = [token for token in REQUIRED_TOKENS if token not in vocab]
    if missing:
        raise RefusedInput(f"{tokenizer_dir} lacks the special tokens {missing}; export needs the Llama-3 ones")
    config.bos_token_id, config.pad_token_id = vocab[BOS], own_ids.get("pad_token_id", vocab[PAD])
    # transformers types one id; generation takes several.
    eos_token_ids: Any = [vocab[token] for token in STOP_TOKENS if token in vocab]
    config.eos_token_id = eos_token_ids
    return tokenizer


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]],
    expected: Mapping[str, tuple[int, ...]],
    folder: Path,
    max_shard_bytes: int,
) -> dict[str, tuple[int, ...]]:
    """Save the tensors in the order they come, in files of at most `max_shard_bytes`; return every name and shape.

    Args:
        expected: name -> shape of the model's tensors.

    Raises:
        RefusedInput: a tensor is not one of the model's, or holds a value that is not finite.
    """
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
        assert name not in shapes, f"{name} came twice"
        if name not in expected or tuple(tensor.shape) != expected[name]:
            rule = f"expected {list(expected[name])}" if name in expected else "is not a tensor of this model"
            raise RefusedInput(f"{name} {list(tensor.shape)}: {rule}")
        if tensor.is_floating_point() and not is_finite(tensor):
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
    """Rename the numbered files to their final names, which state how many there are, and write the index."""
    n = len(shard_names)
    files = [SAFE_WEIGHTS_NAME] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for i, file in enumerate(files):
        (folder / f"shard-{i + 1}").rename(folder / file)
    if n > 1:
        weight_map = {name: file for file, names in zip(files, shard_names, strict=True) for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
