"""The caches: found without a home, and compiled code kept apart for every kind of machine."""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from core import cache
from core.cache import find_compiler, make_private_folder
from core.errors import RefusedInput

ROOT = Path(__file__).parents[2]
SHOW = """
import os
from core.cache import LIBRARIES, cache_dir, keep_compiled_code_apart
keep_compiled_code_apart()
keep_compiled_code_apart()
print(cache_dir(), *(os.environ[name] for name in LIBRARIES), sep="\\n")
"""


def show_caches(**variables):
    """Return the cache folder and the three folders of compiled code in a process with these variables."""
    removed = ("MOBILEMOE_CACHE", "ATEN_CPU_CAPABILITY", *cache.LIBRARIES)
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment = {n: v for n, v in (environment | {"PYTHONPATH": str(ROOT)} | variables).items() if v is not None}
    done = subprocess.run([sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True)
    return list(map(Path, done.stdout.splitlines()))


def test_the_cache_lies_in_the_home_or_where_the_user_says(tmp_path):
    assert show_caches(HOME=str(tmp_path))[0] == tmp_path / ".cache/mobilemoe"
    assert show_caches(MOBILEMOE_CACHE=str(tmp_path / "mine"))[0] == tmp_path / "mine"


@pytest.mark.parametrize("home", ["/proc/nobody", "/dev/null/home"])
def test_without_a_home_that_can_be_written_the_cache_is_temporary(tmp_path, home):
    found = show_caches(HOME=home, TMPDIR=str(tmp_path))[0]
    assert found == tmp_path / f"mobilemoe-cache-{os.getuid()}"


@pytest.fixture
def folder():
    """A folder without blanks or quotes in its path, which the tests' own temporary folders have."""
    with tempfile.TemporaryDirectory(prefix="cache-") as path:
        yield Path(path)


def test_instruction_sets_have_folders_of_their_own(folder):
    plain = show_caches(MOBILEMOE_CACHE=str(folder))
    restricted = show_caches(MOBILEMOE_CACHE=str(folder), ATEN_CPU_CAPABILITY="default")
    assert [path.name for path in plain[1:]] == ["inductor", "triton", "extensions"]
    assert all(path.parent.parent == folder for path in plain[1:] + restricted[1:])
    assert len({path.parent for path in plain[1:]}) == 1
    assert plain[1].parent != restricted[1].parent


def test_a_folder_of_the_user_is_the_parent_and_a_child_of_another_kind_moves_beside_it(folder):
    (_, chosen, *_) = show_caches(TORCHINDUCTOR_CACHE_DIR=str(folder / "mine"))
    assert chosen.parent.parent == folder / "mine"
    (_, inherited, *_) = show_caches(TORCHINDUCTOR_CACHE_DIR=str(chosen))
    assert inherited == chosen
    (_, other, *_) = show_caches(TORCHINDUCTOR_CACHE_DIR=str(chosen), ATEN_CPU_CAPABILITY="default")
    assert other.parent.parent == folder / "mine" and other != chosen


def test_a_path_that_inductor_would_split_is_replaced(folder):
    """Its command for the compiler is one string of paths, which it splits at blanks and quotes."""
    for chosen in ({"MOBILEMOE_CACHE": str(folder / "a b")}, {"TORCHINDUCTOR_CACHE_DIR": str(folder / "it's")}):
        (_, used, *_) = show_caches(TMPDIR=str(folder), **chosen)
        assert used.parent.parent == folder / f"mobilemoe-cache-{os.getuid()}"


def test_torchs_own_default_is_nobodys_choice(tmp_path):
    (_, folder, *_) = show_caches(
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "torchinductor_root"), TMPDIR=str(tmp_path), MOBILEMOE_CACHE="/x"
    )
    assert folder.parent.parent == Path("/x")


def test_a_private_folder_is_closed_to_others_and_refused_where_they_could_write(tmp_path):
    """One of mode 755, as a copy has made it, becomes 700."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    assert make_private_folder(folder, "MOBILEMOE_CACHE") == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(RefusedInput, match=r"can be written by another user.*MOBILEMOE_CACHE"):
        make_private_folder(folder, "MOBILEMOE_CACHE")


def test_a_compiler_of_several_words_is_known_by_its_version(monkeypatch, tmp_path):
    program = tmp_path / "wrapper"
    program.write_text('#!/bin/sh\nexec "$@"\n')
    program.chmod(0o755)
    assert find_compiler(f"{shlex.quote(str(program))} echo") == [str(program), "echo"]
    assert find_compiler(str(program)) == [str(program)], "a path with blanks"
    assert find_compiler("no-such-compiler a") is None and find_compiler("") is None
