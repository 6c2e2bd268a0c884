"""This module compares the files of a checkpoint folder that state the same fact; every exported folder has a copy.

transformers, import, export, the device and the evaluation each read some of these files, and not the same ones. Where
two files differ, readers would get different models; so all of them refuse the folder.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .spellings_mobilemoe import TOKEN_IDS, check_elsewhere, check_token_ids

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Keys of tokenizer_config.json and special_tokens_map.json that name one token."""


def check_folder(folder: Path) -> None:
    """Compare the files of a folder that state the same fact; files that are absent state nothing.

    The weights' own names, shapes and values are compared by `tensors_mobilemoe.open_checkpoint`.

    Raises:
        ValueError: two files differ, or a file is no JSON object; the message names files and values.
    """
    folder = Path(folder)
    _check_weight_files(folder)
    config = _read_optional(folder / "config.json")
    try:
        check_elsewhere(config)  # transformers follows `configuration_files` before it gives us the values
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error
    ids = check_tokenizer(folder, config.get("vocab_size"))
    generation = _read_optional(folder / "generation_config.json")
    try:
        check_token_ids(generation, config.get("vocab_size"))
    except ValueError as error:
        raise ValueError(f"{folder}/generation_config.json: {error}") from error
    _check_token_ids(folder, {"config.json": config, "generation_config.json": generation, "tokenizer.json": ids})


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object of a JSON file, which every reader of JSON reads in the same way.

    Raises:
        ValueError: it is no JSON object in UTF-8, or has a byte order mark, a key twice, or NaN or Infinity.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
        values = json.loads(text, object_pairs_hook=_refuse_repeated, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again, or correct it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is {type(values).__name__} and not a JSON object; copy it again")
    return values


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {key!r} stands there twice, as {[value for name, value in pairs if name == key]}")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_index(path: str | Path) -> dict[str, list[str]]:
    """Return file -> names of its tensors from a model.safetensors.index.json; a damaged one raises a ValueError."""
    try:
        index = read_json(path)
        weight_map = index["weight_map"]
        files: dict[str, list[str]] = {file: [] for file in sorted(weight_map.values())}
        for name, file in weight_map.items():
            files[file].append(name)
        if not isinstance(index["metadata"], dict):
            raise TypeError("metadata is no object")
        if strange := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
            raise ValueError(f"{strange[0]!r} is no safetensors file of this folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of tensors and their files ({error!r}); copy it again") from error
    return files


def _check_weight_files(folder: Path) -> None:
    """Refuse files that a reader may take for the weights instead of those that the index names.

    transformers prefers model.safetensors to the index, other programs read every model*.safetensors. Files of other
    names and kinds (consolidated.safetensors, *.bin, *.gguf) are read by none of our readers.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    named = set(read_index(index)) if index.is_file() else {SAFE_WEIGHTS_NAME}
    stated_by = SAFE_WEIGHTS_INDEX_NAME if index.is_file() else f"there is no {SAFE_WEIGHTS_INDEX_NAME}, and it"
    present = sorted(path.name for path in folder.glob("model*.safetensors"))
    if present and (others := [name for name in present if name not in named]):
        raise ValueError(
            f"{folder} holds {others[0]}, but {stated_by} does not name it ({', '.join(sorted(named)[:3])}); "
            "remove the file that is not of this checkpoint"
        )
    if present and (folder / ".metadata").is_file():
        raise ValueError(f"{folder} holds {present[0]} and the .metadata of a DCP checkpoint; keep one of them")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds adapter_config.json, and transformers would load the model that it names; merge the "
            "adapter into the weights, or remove the file"
        )


def check_tokenizer(folder: Path, vocab_size: Any) -> dict[str, Any]:
    """Compare the files of a tokenizer with each other and with the model's number of embedding rows.

    A tokenizer that is smaller than the vocabulary is accepted: the last rows are padding.

    Args:
        vocab_size: number of rows; any other value than a whole number is not compared.

    Returns:
        `bos_token_id`, `eos_token_id` and `pad_token_id` as far as the tokenizer has them; {} without tokenizer.json.

    Raises:
        ValueError: two files differ, or an id is beyond the vocabulary; the message names files and values.
    """
    path = folder / "tokenizer.json"
    config, special = (_read_optional(folder / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map"))
    _check_chat_template(folder, config)
    for key in SPECIAL_TOKENS:
        a, b = _read_content(config.get(key)), _read_content(special.get(key))
        if None not in (a, b) and a != b:
            raise ValueError(
                f"{folder}: {key} is {a!r} in tokenizer_config.json and {b!r} in special_tokens_map.json; correct one"
            )
    if not path.is_file():
        return {}
    ids = read_token_ids(path)
    highest = max(ids, key=lambda token: ids[token], default=None)
    if highest is not None and isinstance(vocab_size, int) and ids[highest] >= vocab_size:
        raise ValueError(
            f"{path} gives {highest!r} the id {ids[highest]}, config.json has vocab_size {vocab_size}; "
            "the tokenizer is of another model"
        )
    for file, token, number in _find_added_tokens(folder, config):
        if ids.get(token) != number:
            raise ValueError(
                f"{folder}: {file} gives {token!r} the id {number}, tokenizer.json {ids.get(token, 'none')}; "
                "copy the tokenizer again, all of its files"
            )
    named = {key: _read_content(special.get(key, config.get(key))) for key in SPECIAL_TOKENS}
    for key, token in named.items():
        if token is not None and (not isinstance(token, str) or token not in ids):
            raise ValueError(f"{folder}: {key} is {token!r}, which tokenizer.json does not have; correct one of them")
    return {key: ids[token] for key in TOKEN_IDS if (token := named[key.removesuffix("_id")]) is not None}


def _read_content(token: Any) -> Any:
    """Return the text of a token that stands as text or as an object."""
    return token.get("content") if isinstance(token, Mapping) else token


def read_token_ids(path: Path) -> dict[str, int]:
    """Return token -> id of a tokenizer.json; a ValueError says that it is none, or gives a token or an id twice."""
    values = read_json(path)
    try:
        vocab = values["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {row[0]: i for i, row in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
        if not all(type(number) is int for number in (*ids.values(), *added.values())):
            raise TypeError("an id is no whole number")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is no Hugging Face tokenizer.json ({error!r}); copy it again") from error
    owners = {number: token for token, number in ids.items()}
    for token, number in added.items():
        if ids.get(token, number) != number or owners.get(number, token) != token:
            raise ValueError(
                f"{path}: added_tokens give {token!r} the id {number}, the vocabulary {ids.get(token, 'none')}; the id "
                f"{number} is {owners.get(number)!r} there; copy the tokenizer again"
            )
        owners[number] = token
    return ids | added


def _find_added_tokens(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str, int | str]]:
    """Yield file, token and id of every added token that stands outside of tokenizer.json."""
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, Mapping):
        raise ValueError(f"{folder}/tokenizer_config.json: added_tokens_decoder is no object; copy the tokenizer again")
    for number, token in added.items():
        yield "tokenizer_config.json", str(_read_content(token)), int(number) if number.isdecimal() else number
    for token, number in _read_optional(folder / "added_tokens.json").items():
        yield "added_tokens.json", token, number


def _check_chat_template(folder: Path, config: Mapping[str, Any]) -> None:
    """Compare the chat templates of chat_template.jinja, chat_template.json and tokenizer_config.json."""
    found: dict[str, Any] = {"tokenizer_config.json": config.get("chat_template")}
    found["chat_template.json"] = _read_optional(folder / "chat_template.json").get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        found["chat_template.jinja"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file, text in found.items():
        if isinstance(text, list):  # several templates by name; the default one is what the other files may hold
            found[file] = {row.get("name"): row.get("template") for row in text}.get("default")
    stated = [(file, text) for file, text in found.items() if text is not None]
    for file, text in stated[1:]:
        if text != stated[0][1]:
            raise ValueError(f"{folder}: {stated[0][0]} and {file} hold different chat templates; remove one of them")


def _check_token_ids(folder: Path, stated: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the ids that a model begins, ends and fills its texts with.

    A narrower file's ends are among a wider one's: the tokenizer has one, config.json may have several, and generation
    stops at those of generation_config.json.
    """
    for key in TOKEN_IDS:
        found = [(file, values[key]) for file, values in stated.items() if values.get(key) is not None]
        for i, (file, value) in enumerate(found):
            for other, other_value in found[i + 1 :]:
                wide, narrow = (set(ids) if isinstance(ids, list) else {ids} for ids in (value, other_value))
                if other == "generation_config.json":
                    wide, narrow = narrow, wide
                agree = narrow <= wide if key == "eos_token_id" else narrow == wide
                if not agree:
                    raise ValueError(
                        f"{folder}: {key} is {value} in {file} and {other_value} in {other}; correct one of them"
                    )
