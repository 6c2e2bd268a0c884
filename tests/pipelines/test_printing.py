"""Printing: what users and files bring is shown as it is, and never acts on the terminal."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table

from core.printable import make_line, make_printable
from pipelines.cli import main
from pipelines.engine.manifest import Manifest
from pipelines.printing import print_error, print_result, quote_command

ROOT = Path(__file__).parent.parent.parent

AS_THEY_ARE = [
    "x [v1]", "[/x]", "[bold]x[/bold]", "[link=file:///x]y[/link]", "\\[", "[red]\\", "a\\", ":smile:", "<b>", "%20 #1",
    "{x}", "$m_a$", "é 中 \U0001f600", "[[", "]", "@click=f",
]  # fmt: skip
"""Names that a reader of markup would change or refuse."""

ESCAPED = {
    "\x1b[31mred": r"\x1b[31mred", "a\rb": r"a\rb", "a\bb": r"a\x08b", "\x9b1m": r"\x9b1m", "\udcff": r"\udcff",
    "a\u202eb": r"a\u202eb", "a\u2028b": r"a\u2028b",
}  # fmt: skip
"""Names that would act on a terminal, and what is shown."""


@pytest.mark.parametrize(("name", "shown"), [*((name, name) for name in AS_THEY_ARE), *ESCAPED.items()])
def test_result_message_and_every_part_of_a_table_show_the_name(name, shown, capsys):
    print_result(f"written: {name}")
    print_error(f"refused: {name}")
    table = Table(title=f"T {name}", caption=f"C {name}")
    table.add_column(f"H {name}")
    table.add_row(f"R {name}")
    print_result(table)
    printed = capsys.readouterr()
    assert printed.err == f"refused: {shown}\n"
    assert printed.out.startswith(f"written: {shown}\n")
    for part in "TCHR":
        assert f"{part} {shown}" in printed.out


def test_line_feed_stays_in_a_message_and_is_shown_in_a_line():
    assert make_printable("a\n\tb") == "a\n\tb"
    assert make_line("run\nrefused: x") == r"run\nrefused: x"


def test_long_path_stays_in_one_piece(capsys):
    path = "/" + "a long name/" * 40
    print_result(Group(f"fetched: {path}"))
    print_error(f"refused: {path}")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (f"fetched: {path}\n", f"refused: {path}\n")


def test_stream_that_cannot_encode_a_name_gets_an_escape():
    script = (
        "from rich.table import Table; from pipelines.printing import print_result, print_error\n"
        "table = Table(title='\\u4e2d'); table.add_column('a wide column'); table.add_row('\\u00e9')\n"
        "print_result('\\u4e2d'); print_result(table); print_error('\\u4e2d')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT,
        env={"PYTHONIOENCODING": "latin-1:strict", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    out = done.stdout.decode("latin-1")
    assert out.startswith("\\u4e2d\n") and out.count("\\u4e2d") == 2 and "é" in out
    assert done.stderr == b"\\u4e2d\n"


def test_printed_command_can_be_pasted_into_a_shell():
    path = Path("/x [v1] $HOME 'y' `id` #1 \"z\"")
    done = subprocess.run(["sh", "-c", quote_command("printf", "%s", path)], capture_output=True, text=True, check=True)
    assert done.stdout == str(path)


def test_consoles_are_made_in_one_place():
    """Another console, or a reader of markup, would read a folder's name as markup again."""
    makers = re.compile(r"\bConsole\(|rich\.markup|rich\.print|rich import print|from_markup")
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for room in ("core", "data", "eval", "pipelines", "titan_ext")
        for file in (ROOT / room).rglob("*.py")
        for match in makers.finditer(file.read_text())
        if file.name != "printing.py"
    ]
    assert found == []


def test_status_shows_run_recipe_and_error_as_they_are(smoke, tmp_path, capsys):
    run = tmp_path / "x [v1] [" / "x]"
    run.mkdir(parents=True)
    manifest = Manifest(run)
    manifest.describe(dataclasses.replace(smoke, name="[/mine] :smile:"))
    manifest.start("fetch", {"version": 1, "fingerprint": "", "identity": "", "config": {}, "inputs": {}})
    manifest.finish("fetch", "failed", error="OSError: [Errno 28] No space left on device: '/a [/b]\\\\'")
    assert main(["status", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[/mine] :smile:  {run}"
    assert lines[-1] == "fetch: OSError: [Errno 28] No space left on device: '/a [/b]\\\\'"


@pytest.mark.parametrize("name", ["x [v1]", "[/x]", ":smile: \\"])
def test_refusal_of_the_command_names_the_path_as_it_is(name, tmp_path, capsys):
    assert main(["status", str(tmp_path / name)]) == 2
    assert f"refused: {tmp_path / name}: no manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["[/x]", "[v1]", ":smile:", "\\["])
def test_refusal_of_an_option_names_the_value_as_it_is(value, capsys):
    with pytest.raises(SystemExit):
        main(["run", "smoke", "--until", value])
    assert value in capsys.readouterr().err
