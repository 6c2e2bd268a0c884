"""These tests hold that a compiled file appears whole, readable for everybody, or not at all."""

import os
import shutil

import pytest

from core.errors import RefusedInput
from eval.device.compiler import compile_file

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: apt-get install g++")


def compile_text(text, folder, compiler="g++"):
    (folder / "source.cpp").write_text(text)
    compile_file(compiler, [str(folder / "source.cpp")], folder / "out" / "p", what="a program", advice="install one")


def test_the_file_has_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        compile_text("int main() {}", tmp_path)
    finally:
        os.umask(old)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p"]
    assert (tmp_path / "out" / "p").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("text", ["int main() { return f(); }", "int f(); int main() { return f(); }"])
def test_nothing_is_left_where_the_compiler_or_the_linker_fails(tmp_path, text):
    with pytest.raises(RefusedInput, match="could not build a program"):
        compile_text(text, tmp_path)
    assert not list((tmp_path / "out").iterdir())


def test_the_compiler_may_be_a_path_with_blanks_or_have_arguments(tmp_path):
    link = tmp_path / "a compiler"
    link.symlink_to(shutil.which("g++"))
    compile_text("int main() {}", tmp_path, str(link))
    compile_text("int main() { return NUMBER; }", tmp_path, "g++ -DNUMBER=0")
