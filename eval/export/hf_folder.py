"""Writing Hugging Face folders: config.json, code, tokenizer, safetensors shards, model card and checksums."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

import eval.hf_mobilemoe
from core.atomic import write_json
from core.errors import RefusedInput, refuse_value_errors
from core.special_tokens import BOS, PAD, REQUIRED_TOKENS, STOP_TOKENS
from eval.config import ExportConfig
from eval.export.artifact_folder import new_folder
from eval.export.dimensions import config_from_dims, dims_from_config
from eval.export.model_card import OWN_CODE, write_model_card
from eval.export.shards import write_shards
from eval.export.tensor_layout import TensorLayout, choose_dtype, describe_folder
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.folder_mobilemoe import check_folder, check_tokenizer
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
        tensors: released names (`tensor_shapes`) and values, in any order; taken one by one, so that a generator, or
            a mapping that reads when it is asked, needs no more memory than a tensor. They fill the files in the order
            of a mapping, and those of a generator in the order of the network.
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
    with new_folder(out, tokenizer_dir) as partial:
        stream = cast_tensors(items, config, dtype)
        layout = describe_folder(config, tensors if isinstance(tensors, Mapping) else ())
        fill_folder(stream, layout, config, tokenizer_dir, partial, max_shard_bytes)
    return out


def cast_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], config: MobileMoEConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Set `config.dtype` to the dtype of a checkpoint, and return its tensors in it, each cast when it is taken.

    Raises:
        RefusedInput: the dtype is neither bfloat16 nor float32.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise RefusedInput(f"dtype is {dtype}; a checkpoint is torch.bfloat16 or torch.float32")
    config.dtype = dtype

    def cast() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            cast = tensor.detach().to(choose_dtype(name, config))
            del tensor  # before the next one is read
            yield name, cast
            del cast

    return cast()


def fill_folder(
    tensors: Iterable[tuple[str, torch.Tensor]],
    layout: TensorLayout,
    config: MobileMoEConfig,
    tokenizer_dir: Path,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Fill `folder` with the tensors of `layout` (`describe_folder(config)`), config, code, tokenizer and model card.

    Raises:
        RefusedInput: as `write_hf_folder`.
    """
    write_tokenizer(Path(tokenizer_dir), config, folder)
    write_json(folder / "config.json", _config_json(config))
    for name in _CODE_FILES:
        shutil.copyfile(Path(eval.hf_mobilemoe.__file__).parent / name, folder / name)
    form = "bf16 checkpoint" if config.quantization is None else f"INT4 checkpoint ({config.quantization['format']})"
    write_model_card(folder, dims_from_config(config), form, OWN_CODE)
    write_shards(tensors, layout, folder, max_shard_bytes)
    with refuse_value_errors():
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
