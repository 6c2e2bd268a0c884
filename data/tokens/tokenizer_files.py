"""The files that decide the tokens of an existing tokenizer, and their hashes."""

from pathlib import Path

from core.hashing import sha256_file

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def locate_tokenizer(path: str) -> Path:
    """Return the tokenizer.json of `TokenizerConfig.path`, which is that file or its folder."""
    return Path(path) if path.endswith(".json") else Path(path) / TOKENIZER


def hash_tokenizer_files(path: str) -> dict[str, str]:
    """Return name -> SHA-256 of the files that decide the tokens, those that exist.

    The path alone is no identity: the same folder may hold another tokenizer, or another chat template, tomorrow.
    """
    file = locate_tokenizer(path)
    files = [file] if path.endswith(".json") else [file.with_name(name) for name in (TOKENIZER, CONFIG, TEMPLATE)]
    return {file.name: sha256_file(file) for file in files if file.is_file()}


def hash_folder(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of every file of a tokenizer folder that was saved."""
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
