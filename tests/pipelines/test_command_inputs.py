"""Paths and numbers of every command: what cannot be used is refused with 2, named, before anything starts."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import pytest

from core.checksums import write_checksums
from core.errors import RefusedInput
from pipelines.cli import DONE, REFUSED, main
from pipelines.commands import COMMANDS, inputs
from pipelines.commands.scaling_law import ACTIONS
from pipelines.engine.manifest import Manifest
from pipelines.steps import STEPS
from pipelines.validation.number_ranges import BOUND

ROOT = Path(__file__).parents[2]
NOBODY = 65534


def run(*arguments) -> int:
    """Exit code of the command, also where tyro ends it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


@pytest.fixture
def good(tmp_path, smoke) -> Path:
    """A folder that every command takes as its input: a run, a model and an artifact at once."""
    folder = tmp_path / "good"
    Manifest(folder).describe(smoke)
    (folder / "config.json").write_text("{}")
    write_checksums(folder)
    return folder


@pytest.fixture
def as_nobody():
    """Run as the user `nobody` for a while: permissions do not bind root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)


# Command line of each command, with {path} for the path under test, {good} for a folder that serves, {new} for none.
READ = {
    ("status", "run"): ("status", "{path}"),
    ("report", "run"): ("report", "{path}"),
    ("report", "law"): ("report", "{good}", "--law", "{path}"),
    ("report", "compare"): ("report", "{good}", "--compare", "{path}"),
    ("scaling-law law", "law"): ("scaling-law", "law", "--law", "{path}"),
    ("scaling-law solve", "law"): ("scaling-law", "solve", "--memory", "3GB", "--tokens", "1B", "--law", "{path}"),
    ("scaling-law fit", "points"): ("scaling-law", "fit", "{path}", "--out", "{new}"),
    ("scaling-law fit", "heldout"): ("scaling-law", "fit", "{path}", "--heldout", "{path}", "--out", "{new}"),
    ("eval", "checkpoint"): ("eval", "{path}"),
    ("eval", "items_folder"): ("eval", "{good}", "--items-folder", "{path}"),
    ("export", "checkpoint"): ("export", "{path}", "--format", "bf16", "--out", "{new}"),
    ("import", "folder"): ("import", "{path}", "--out", "{new}"),
    ("profile", "artifact"): ("profile", "{path}", "--out", "{new}"),
    ("profile", "prompts"): ("profile", "{good}", "--prompts", "{path}"),
    ("serve", "artifact"): ("serve", "{path}"),
    ("publish", "source"): ("publish", "{path}", "{new}"),
    ("fetch", "source"): ("fetch", "{path}", "{new}"),
    ("run", "data"): ("run", "smoke", "--out", "{new}", "--data", "{path}"),
    ("scaling-law sweep", "data"): ("scaling-law", "sweep", "tiny", "--out", "{new}", "--data", "{path}"),
}
WRITTEN = {
    ("run", "out"): ("run", "smoke", "--out", "{path}"),
    ("data", "out"): ("data", "smoke", "--out", "{path}"),
    ("data", "work"): ("data", "smoke", "--out", "memory://sets", "--work", "{path}"),
    ("eval", "out"): ("eval", "{good}", "--out", "{path}"),
    ("export", "out"): ("export", "{good}", "--format", "bf16", "--out", "{path}"),
    ("import", "out"): ("import", "{good}", "--out", "{path}"),
    ("profile", "out"): ("profile", "{good}", "--out", "{path}"),
    ("publish", "destination"): ("publish", "{good}", "{path}"),
    ("fetch", "folder"): ("fetch", "{good}", "{path}"),
    ("scaling-law law", "figures"): ("scaling-law", "law", "--figures", "{path}"),
    ("scaling-law fit", "figures"): ("scaling-law", "fit", "{good}", "--figures", "{path}"),
    ("scaling-law sweep", "out"): ("scaling-law", "sweep", "tiny", "--out", "{path}"),
}
FILES = {("scaling-law fit", "out"), ("scaling-law solve", "write_recipe")}
"""Outputs that are files, which may exist; tests/pipelines/test_scaling_law.py has them."""


def test_every_path_of_every_command_is_tried():
    """A new option that takes a path belongs into one of the two tables."""
    paths = {("publish", "destination"), ("fetch", "source")}  # addresses too, so text
    kinds = {command: entry.arguments for command, entry in COMMANDS.items()}
    kinds |= {f"scaling-law {name}": kind for name, kind in ACTIONS.items()}
    for command, arguments in kinds.items():
        hints = typing.get_type_hints(arguments)
        paths |= {(command, field) for field, kind in hints.items() if "Path" in str(kind) or "Address" in str(kind)}
    assert paths == READ.keys() | WRITTEN.keys() | FILES


def make_bad_path(kind: str, parent: Path) -> Path:
    """Return a path below `parent` that is not what a command takes."""
    path = parent / "bad"
    if kind == "file":
        path.write_text("x")
    elif kind == "below a file":
        path.write_text("x")
        path /= "below"
    elif kind == "broken link":
        path.symlink_to(parent / "nowhere")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path = Path("/dev/null")
    elif kind == "long name":
        path = parent / ("x" * 300)
    elif kind == "kernel":
        path = Path("/proc/nothing/here")
    return path


FIND_BAD = ("absent", "file", "below a file", "broken link", "loop", "pipe", "device", "long name", "empty folder")


@pytest.mark.parametrize("kind", FIND_BAD)
@pytest.mark.parametrize("option", READ, ids=" ".join)
def test_an_input_that_is_not_there_is_refused(option, kind, good, tmp_path, capsys):
    if option == ("profile", "prompts") and kind == "file":
        pytest.skip("that is a prompts file, if a bad one")
    path = make_bad_path(kind, tmp_path)
    if kind == "empty folder":
        path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run(*(word.format(path=path, good=good, new=tmp_path / "new") for word in READ[option])) == REFUSED
    message = capsys.readouterr()
    assert f"{path}" in message.err[message.err.index("refused: ") :] and message.out == ""
    assert "Traceback" not in message.err
    assert sorted(tmp_path.rglob("*")) == before


PLACE_BAD = ("file", "below a file", "broken link", "loop", "pipe", "socket", "device", "long name", "kernel")


@pytest.mark.parametrize("kind", PLACE_BAD)
@pytest.mark.parametrize("option", WRITTEN, ids=" ".join)
def test_an_output_that_cannot_be_written_is_refused(option, kind, good, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_bad_path(kind, tmp_path) if kind != "socket" else Path("bad")
    if kind == "socket":
        make_bad_path(kind, Path())
    before = sorted(tmp_path.rglob("*"))
    assert run(*(word.format(path=path, good=good) for word in WRITTEN[option])) == REFUSED
    message = capsys.readouterr()
    assert message.err.startswith("refused: ") and str(path) in message.err and message.out == ""
    name = f"--{option[1]}" if f"--{option[1]}" in WRITTEN[option] else option[1].upper()
    assert message.err.startswith(f"refused: {name} ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def shared(good):
    """A folder that everybody may enter, unlike pytest's: `good` and a folder that belongs to the one who made it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(good, folder / "good")
    (folder / "readable").mkdir(mode=0o755)
    (folder / "locked").mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("option", WRITTEN, ids=" ".join)
def test_an_output_without_permission_is_refused(option, shared, as_nobody, capsys):
    if os.geteuid() == shared.stat().st_uid:
        (shared / "readable").chmod(0o555)
    path = shared / "readable" / "new" / "folder"
    assert run(*(word.format(path=path, good=shared / "good") for word in WRITTEN[option])) == REFUSED
    assert f"nothing can be written to {shared / 'readable'} (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("option", READ, ids=" ".join)
def test_an_input_without_permission_is_refused(option, shared, as_nobody, capsys):
    if os.geteuid() == shared.stat().st_uid:
        (shared / "locked").chmod(0)
    words = [
        word.format(
            path=shared / "locked" / "x", good=shared / "good", new=Path(tempfile.gettempdir()) / "mobilemoe-new"
        )
        for word in READ[option]
    ]
    assert run(*words) == REFUSED
    message = capsys.readouterr().err
    assert str(shared / "locked") in message and "Permission denied" in message


@pytest.mark.parametrize("option", [*READ, *WRITTEN], ids=" ".join)
@pytest.mark.parametrize("form", ["apart", "joined"])
def test_an_empty_path_is_refused(option, form, good, tmp_path, capsys, monkeypatch):
    """A shell variable that is not set; Path("") would be the working directory."""
    monkeypatch.chdir(tmp_path)
    words = [word.format(path="", good=good, new=tmp_path / "new") for word in (READ | WRITTEN)[option]]
    place = words.index("")
    named = words[place - 1] if words[place - 1].startswith("--") else "an argument"
    if form == "joined" and named.startswith("--"):
        words[place - 1 : place + 1] = [f"{named}="]
    assert run(*words) == REFUSED
    message = capsys.readouterr().err
    assert named in message and "empty text" in message
    assert list(tmp_path.iterdir()) == [good]


NUMBERS = {
    ("info", "context"): ("info", "S", "--context"),
    ("info", "seq_len"): ("info", "S", "--seq-len"),
    ("eval", "limit"): ("eval", "{good}", "--limit"),
    ("eval", "batch_tokens"): ("eval", "{good}", "--batch-tokens"),
    ("eval", "workers"): ("eval", "{good}", "--estimate", "--workers"),
    ("eval", "prefill_rate"): ("eval", "{good}", "--estimate", "--prefill-rate"),
    ("eval", "decode_rate"): ("eval", "{good}", "--estimate", "--decode-rate"),
    ("profile", "contexts"): ("profile", "{good}", "--contexts"),
    ("profile", "repetitions"): ("profile", "{good}", "--repetitions"),
    ("profile", "threads"): ("profile", "{good}", "--threads"),
    ("serve", "port"): ("serve", "{good}", "--port"),
    ("serve", "threads"): ("serve", "{good}", "--threads"),
}
"""Options of numbers; tests/eval/test_executorch.py has those of `export`, which need a checkpoint."""


def test_every_number_of_every_command_is_tried():
    numbers = {("profile", "contexts")}  # with commas, so text
    for command, entry in COMMANDS.items():
        hints = typing.get_type_hints(entry.arguments)
        numbers |= {(command, field) for field, kind in hints.items() if {int, float} & {kind, *typing.get_args(kind)}}
    assert numbers == NUMBERS.keys()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e30", "9" * 30, "9" * 5000, "x", "", "0x10", "1.5"])
@pytest.mark.parametrize("option", NUMBERS, ids=" ".join)
def test_a_number_out_of_its_range_is_refused(option, value, tiny_model, tmp_path, capsys, monkeypatch):
    """Digits that Python reads and digits that it does not: `int` takes 4,300 at most."""
    monkeypatch.chdir(tmp_path)
    words = [word.format(good=tiny_model) for word in NUMBERS[option]]
    assert run(*words, value) == REFUSED
    message = capsys.readouterr()
    assert words[-1] in message.err.replace("\n", " ") and message.out == ""
    assert "Traceback" not in message.err and list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A model's config.json, from which sizes are read before any weight."""
    from eval.export.dimensions import config_from_dims
    from tests.eval.tiny_checkpoint import DIMS

    folder = tmp_path_factory.mktemp("tiny") / "model"
    config_from_dims(DIMS).save_pretrained(folder)
    return folder


def list_numbers(value, prefix=""):
    """Yield the dotted path and the type of every number in a tree of dataclasses."""
    for field in dataclasses.fields(value):
        inner, name = getattr(value, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from list_numbers(inner, f"{name}.")
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            yield name, type(inner)


def replace_number(tree, path, value):
    name, _, rest = path.partition(".")
    inner = replace_number(getattr(tree, name), rest, value) if rest else value
    return dataclasses.replace(tree, **{name: inner})


def test_no_number_of_a_recipe_is_nan_or_breaks_the_checks(smoke, tmp_path):
    """Every leaf: refused, or accepted; never another error. What is no number is always refused."""
    from pipelines.preflight import check_disk
    from pipelines.validation.validate_recipe import validate_recipe

    accepted, broken = [], []
    for path, kind in list_numbers(smoke):
        for value in map(kind, (0, -1, 10**30) if kind is int else (0, -1, "nan", "inf", "-inf", 1e300)):
            recipe = replace_number(smoke, path, value)
            try:
                validate_recipe(recipe)
                check_disk(recipe, tmp_path / "run", dict.fromkeys(STEPS, "run"))
                accepted.append((path, value))
            except RefusedInput:
                pass
            except Exception as error:
                broken.append((path, value, repr(error)))
    assert broken == []
    assert [(path, value) for path, value in accepted if not abs(value) <= BOUND] == []
    negative = {path for path, value in accepted if value < 0}
    assert negative == set()


@pytest.mark.parametrize(
    "spelling", ["{x}", "{x}/", "{x}/../x", "{x}/.", "{link}", "{x}/deeper", "{link}/deeper", "{up}"]
)
def test_outputs_apart_from_their_source(spelling, tmp_path):
    source = tmp_path / "a" / "x"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    path = Path(spelling.format(x=source, link=tmp_path / "link", up=source.parent))
    with pytest.raises(RefusedInput, match=r"--out .*(is|lies inside|contains) SOURCE .*name a folder outside of it"):
        inputs.require_apart("--out", path, "SOURCE", source)
    for other in (tmp_path / "a" / "y", tmp_path / "a" / "x2", tmp_path / "a" / "x.partial"):
        inputs.require_apart("--out", other, "SOURCE", source)


def test_a_relative_path_finds_its_place(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    assert inputs.beside(Path(), "-profile") == tmp_path / "x-profile"
    assert inputs.beside(Path("../x/"), "-profile") == tmp_path / "x-profile"
    with pytest.raises(RefusedInput, match="is SOURCE"):
        inputs.require_apart("--out", Path(), "SOURCE", Path("../x"))


@pytest.mark.parametrize("command", [("--help",), ("run", "smoke", "--help"), ("info", "S"), ("recipes", "--json")])
def test_a_reader_that_goes_away_is_no_failure(command):
    """A pipe such as `mobilemoe info S | head -1`, whose reader takes nothing at all."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *command], stdout=writing, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (DONE, "")


@pytest.mark.parametrize("command", [("run", "smoke", "--help"), ("info", "S"), ("recipes",), ("run", "sm\u00f6ke")])
def test_a_stream_without_the_characters_gets_others(command):
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *command], capture_output=True, check=False, cwd=ROOT,
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert done.returncode == (REFUSED if command[-1].startswith("sm") and command[-1] != "smoke" else DONE), (
        done.stderr
    )
    assert b"Error:" not in done.stderr and (done.stdout + done.stderr).decode("ascii")


def test_a_closed_stdout_is_no_failure():
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m pipelines.cli recipes --json >&-"],
        capture_output=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (DONE, b"")
