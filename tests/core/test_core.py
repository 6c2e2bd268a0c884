"""Tests of core's errors, hashes, samples and stages."""

import hashlib
import subprocess
import sys

import pytest

from core.errors import RefusedInput, refuse_value_errors
from core.hashing import sha256_file, sha256_json
from core.progress import print_progress
from core.samples import hash_vocabulary
from core.stages import HELDOUT_FOLDERS, SHARD_FOLDERS, STAGE_FOLDERS, heldout_folder


def test_a_value_error_becomes_a_refusal_with_its_text():
    with pytest.raises(RefusedInput, match="no such key") as refused, refuse_value_errors():
        raise ValueError("no such key")
    assert isinstance(refused.value.__cause__, ValueError)
    with pytest.raises(KeyError), refuse_value_errors():
        raise KeyError


def test_hashes_are_sha256(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc" * 1_000_000)
    assert sha256_file(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sha256_json({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a": [2], "b": 1}').hexdigest()


def test_the_vocabulary_hash_is_of_ids_and_tokens_alone():
    expected = hashlib.sha256(b"0\ta\n1\t\xc3\xa4\n").hexdigest()
    assert hash_vocabulary({"a": 0, "ä": 1}) == hash_vocabulary({"ä": 1, "a": 0}) == expected
    assert hash_vocabulary({"a": 1, "ä": 0}) != expected


def test_stage_folders_sort_in_the_order_of_the_stages():
    assert sorted(STAGE_FOLDERS.values()) == list(STAGE_FOLDERS.values())
    assert {heldout_folder(shards) for shards in SHARD_FOLDERS} == set(HELDOUT_FOLDERS)


def test_progress_goes_to_stderr(capsys):
    print_progress("reading", 3, 0)
    assert capsys.readouterr() == ("", "reading 3/0\n")


def test_core_imports_without_the_other_rooms_packages():
    code = "import core.atomic, core.cache, core.errors, core.hashing, core.progress, core.samples, core.stages, sys"
    check = f"{code}; sys.exit(any(name in sys.modules for name in ('numpy', 'torch', 'transformers', 'rich')))"
    subprocess.run([sys.executable, "-c", check], check=True)
