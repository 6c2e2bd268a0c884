"""The tokenizer of a GGUF file: vocabulary, merges, special tokens and chat template, as llama.cpp reads them."""

from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from core.errors import RefusedInput, refuse_value_errors, report_damage
from core.special_tokens import BOS, EOM, EOS, EOT
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.folder_mobilemoe import read_json

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Llama 3's pattern of the words that are tokenized one by one."""
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
"""Qwen2's: every digit is a word."""


def write_tokenizer(writer: GGUFWriter, folder: Path, chat_template: str, config: MobileMoEConfig) -> None:
    """Write the tokenizer of a folder into the file's metadata.

    Rows of the vocabulary without a token get a name and the type UNUSED.

    Raises:
        RefusedInput: llama.cpp has no tokenizer that does the same.
        DamagedData: tokenizer.json is none of transformers' form.
    """
    path = folder / "tokenizer.json"
    with refuse_value_errors():
        content = read_json(path)
    with report_damage(path, "copy the tokenizer again"):
        _write_fields(writer, content, path, config)
    writer.add_chat_template(chat_template)


def _write_fields(writer: GGUFWriter, content: dict[str, Any], path: Path, config: MobileMoEConfig) -> None:
    words = find_word_splitter(content, str(path))
    vocab: dict[str, int] = dict(content["model"]["vocab"])
    types = dict.fromkeys(vocab.values(), TokenType.NORMAL)
    for token in content["added_tokens"]:
        vocab[token["content"]] = token["id"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    names = {number: token for token, number in vocab.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if not all(isinstance(text, str) for text in (*vocab, *merges)) or not all(type(n) is int for n in vocab.values()):
        raise TypeError("a token is no text, or an id no whole number")
    ids = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list([names.get(i, f"[UNUSED{i}]") for i in ids])
    writer.add_token_types([types.get(i, TokenType.UNUSED) for i in ids])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocab[BOS])
    writer.add_eos_token_id(vocab[EOS])
    writer.add_eot_token_id(vocab[EOT])
    if EOM in vocab:
        writer.add_eom_token_id(vocab[EOM])
    assert isinstance(config.pad_token_id, int), "reading the tokenizer sets the special ids"
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(True)


def find_word_splitter(content: dict[str, Any], where: str) -> str:
    """Return llama.cpp's name of the way in which a tokenizer.json splits text into words.

    Raises:
        RefusedInput: it is no byte-level BPE, or splits in a way that has no name here.
    """
    model, steps = content["model"], content.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or content.get("normalizer") or model.get("byte_fallback"):
        raise RefusedInput(f"{where}: only byte-level BPE without a normalizer is written to GGUF")
    steps = steps.get("pretokenizers", [steps])
    ignore_merges = bool(model.get("ignore_merges"))
    last, patterns = steps[-1], [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
    is_byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if is_byte_level and not last.get("use_regex", True) and patterns == [LLAMA3_WORDS]:
        # The same words; the first takes a word that is one token as that, the second merges it from its bytes.
        return "llama-bpe" if ignore_merges else "smaug-bpe"
    if is_byte_level and not last.get("use_regex", True) and patterns == [QWEN2_WORDS] and not ignore_merges:
        return "qwen2"
    if is_byte_level and last.get("use_regex", True) and not patterns and not ignore_merges:
        return "gpt-2"
    raise RefusedInput(
        f"{where}: pre_tokenizer {steps} is not Llama 3's, Qwen2's or GPT-2's, and llama.cpp knows ways to split text "
        "by name only; export to another format, or train with Llama 3's pattern"
    )
