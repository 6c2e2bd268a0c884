"""Inputs of exported programs and of the profile: what is no prompt is refused with its value and limit."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from core.errors import RefusedInput
from eval.device import profile, prompts
from eval.device.runtime import DeviceProgram
from pipelines.cli import DONE, REFUSED, main
from tests.eval.tiny_checkpoint import DIMS

ROOT = Path(__file__).parents[2]
CONTEXT, VOCAB = 128, DIMS.vocab_size
TOKENS = [9, 10, 11, 12]


@pytest.fixture(scope="module")
def program(program_folder):
    return DeviceProgram(program_folder / "model.pte")


NOT_TOKENS = {
    "empty": ([], "shape [0]: give the ids of one sequence, at least one"),
    "beyond the vocabulary": ([9, VOCAB], f"tokens have {VOCAB}: ids are 0 to {VOCAB - 1}"),
    "far beyond": ([9, 2**62], f"tokens have {2**62}: ids are 0 to {VOCAB - 1}"),
    "beyond any integer": ([9, 2**70], f"give ids of 0 to {VOCAB - 1}"),
    "negative": ([9, -1], f"tokens have -1: ids are 0 to {VOCAB - 1}"),
    "floats": ([9.0, 10.0], "tokens are float32: give whole numbers"),
    "booleans": ([True, False], "tokens are bool: give whole numbers"),
    "a batch": ([TOKENS, TOKENS], "shape [2, 4]: give the ids of one sequence"),
    "a batch of one": (torch.tensor([TOKENS]), "shape [1, 4]: give the ids of one sequence"),
    "one number": (9, "shape []: give the ids of one sequence"),
    "text": ("the", "give ids of 0 to"),
    "nothing": ([9, None], "give ids of 0 to"),
}


@pytest.mark.parametrize("case", NOT_TOKENS)
def test_what_is_no_prompt_is_refused_with_value_and_limit(program, case):
    tokens, message = NOT_TOKENS[case]
    for call in (lambda: program.logits(tokens, 0), lambda: program.greedy(tokens, 2)):
        with pytest.raises(RefusedInput) as caught:
            call()
        assert message in str(caught.value)


@pytest.mark.parametrize("position", [5, 6, 100, 2**62, -1, 1.0, True, None])
def test_positions_that_do_not_go_on_are_refused(program, position):
    program.logits(TOKENS, 0)
    with pytest.raises(RefusedInput) as caught:
        program.logits([13], position)
    assert f"position is {position!r}: 4 tokens are in the cache, so the next is at 4" in str(caught.value)


def test_positions_go_on_and_back(program):
    """The next token; the same again; a new conversation without a reset: each as in one call."""
    whole = program.logits([*TOKENS, 13], 0)
    program.logits(TOKENS, 0)
    for _ in range(2):
        assert torch.allclose(program.logits([13], 4), whole, atol=1e-3)
    assert program.length == 5
    program.logits([50, 51, 52], 1)
    assert torch.equal(program.logits([*TOKENS, 13], 0), whole)
    program.logits(TOKENS, 0)
    with pytest.raises(RefusedInput):
        program.logits([VOCAB], 4)
    assert torch.allclose(program.logits(torch.tensor([13]), 4), whole, atol=1e-3), "a refusal changes nothing"


def test_lengths_up_to_the_context(program):
    tokens = [9 + i % 100 for i in range(CONTEXT)]
    assert program.logits(tokens[:-1], 0).isfinite().all()
    assert program.logits(tokens[-1:], CONTEXT - 1).isfinite().all()
    with pytest.raises(RefusedInput, match="129 tokens: the program's context is 128"):
        program.logits([9], CONTEXT)
    with pytest.raises(RefusedInput, match="128 tokens: the program's context is 128, and one less in one call"):
        program.logits(tokens, 0)
    assert len(program.greedy(tokens[:-1], 1)) == 1
    with pytest.raises(RefusedInput, match="has 127 tokens and max_new_tokens is 2: "):
        program.greedy(tokens[:-1], 2)
    for number in (0, -1, 1.5, True, None):
        with pytest.raises(RefusedInput, match=r"max_new_tokens is .*: give a whole number from 1"):
            program.greedy(TOKENS, number)


def test_every_row_of_the_vocabulary_is_an_id(program, program_folder):
    """Rows that no token of the tokenizer has are legal; they decode to nothing."""
    tokenizer = AutoTokenizer.from_pretrained(program_folder)
    assert len(tokenizer) < VOCAB, "the model has such rows"
    assert program.logits([0, VOCAB - 1], 0).isfinite().all()
    assert tokenizer.decode([VOCAB - 1]) == ""


def test_files_that_are_no_program_are_refused(program_folder, tmp_path):
    for content in (b"", b"not a program", (program_folder / "model.pte").read_bytes()[:1000]):
        (tmp_path / "model.pte").write_bytes(content)
        with pytest.raises(RefusedInput, match=r"model\.pte is no ExecuTorch program"):
            DeviceProgram(tmp_path / "model.pte")
    for path in (tmp_path, tmp_path / "none.pte"):
        with pytest.raises(RefusedInput, match="no such program"):
            DeviceProgram(path)
    with pytest.raises(RefusedInput, match="threads is 0: give a number from 1"):
        DeviceProgram(program_folder / "model.pte", 0)


PROMPTS = {
    "no domain": ("{}", "there is no prompt"),
    "empty text": ('{"a": ""}', "the prompt of domain 'a' is empty"),
    "a list": ('["a"]', "expected a JSON object"),
    "a number": ('{"a": 1}', "expected a JSON object"),
    "half of a character": ('{"a": "x\\ud800"}', "half of a character (a surrogate) at 1"),
    "a name that is taken": (f'{{"{prompts.DUMMY}": "x"}}', "give the domain another name"),
    "cut off": ('{"a": "x', "give a file with a JSON object"),
    "too deep": ("[" * 100_000, "give a file with a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "give a file with a JSON object"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_are_none_are_refused(case, int4_folder, tmp_path, capsys):
    content, message = PROMPTS[case]
    file = tmp_path / "prompts.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["profile", str(int4_folder), "--prompts", str(file), "--out", str(tmp_path / "out")]) == REFUSED
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_prompts_are_read_as_utf8_in_any_locale(int4_folder):
    """Profiled by a process whose own encoding is ASCII; a domain's name beyond it is shown as an escape.

    The file begins with a byte order mark, as some editors write it; the other tests' files have none. The
    folders have plain names: where Python's own fallbacks to UTF-8 are off, it cannot name others to a library.
    """
    with tempfile.TemporaryDirectory(prefix="ascii-") as plain:
        folder = Path(plain)
        shutil.copytree(int4_folder, folder / "int4")
        prompt = {"\u4e2d": "na\u00efve \u4e2d\u6587 " * 9}
        (folder / "prompts.json").write_bytes(json.dumps(prompt, ensure_ascii=False).encode("utf-8-sig"))
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "profile", "int4", "--prompts", "prompts.json", "--contexts", "40",
             "--repetitions", "1", "--threads", "1", "--out", "out"],
            env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0",
                 "HOME": plain, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            cwd=folder, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == DONE, done.stderr
        assert b"\\u4e2d" in done.stdout
        measured = json.loads((folder / "out" / "profile.json").read_text(encoding="utf-8"))["measurements"]
    assert [m["domain"] for m in measured] == ["\u4e2d", prompts.DUMMY]


def test_a_prompt_that_spells_a_special_token_is_text(int4_folder):
    tokenizer = AutoTokenizer.from_pretrained(int4_folder)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ids = prompts.tokenize(int4_folder, {"a": "x <|eot_id|> y"}, VOCAB, 64)["a"]
    assert eot not in ids
    assert tokenizer.decode(ids).startswith("x <|eot_id|> y")


def test_a_tokenizer_larger_than_the_model_is_refused(int4_folder):
    with pytest.raises(RefusedInput, match=r"gives id \d+: the model's ids are 0 to 49"):
        prompts.tokenize(int4_folder, {"a": "the quick brown fox"}, 50, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", ","], "--contexts ,: give numbers"),
        (["--contexts", "0"], "--contexts 0: the artifact takes more than 32"),
        (["--contexts", "-64"], "--contexts -64"),
        (["--contexts", "129"], "at most 128 tokens"),
        (["--contexts", "64,1e3"], "give numbers of tokens"),
        (["--repetitions", "0"], "--repetitions 0: give 1 to 1000"),
        (["--repetitions", "-1"], "--repetitions -1"),
        (["--repetitions", "1000000000"], "--repetitions 1000000000"),
        (["--threads", "0"], "--threads 0: give 1 to"),
        (["--threads", "100000"], "the processors of this machine"),
    ],
)
def test_numbers_out_of_their_ranges_are_refused(arguments, message, program_folder, tmp_path, capsys):
    assert main(["profile", str(program_folder), "--out", str(tmp_path / "out"), *arguments]) == REFUSED
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_contexts_are_measured_once_each():
    assert profile.choose_contexts([64, 40, 64], 128) == [40, 64]
    assert profile.choose_contexts(None, 1024) == [512, 1024] and profile.choose_contexts(None, 100) == [100]
    with pytest.raises(RefusedInput, match="--contexts: give numbers"):
        profile.choose_contexts([], 128)


@pytest.mark.parametrize("option", ["--context", "--expert-group-size"])
@pytest.mark.parametrize("value", ["0", "1", "-32", "-1", "nan", "1e3", "9" * 30])
def test_numbers_of_an_export_are_refused(option, value, int4_folder, tmp_path, capsys):
    command = ["export", str(int4_folder), "--format", "executorch", "--out", str(tmp_path / "out"), option, value]
    try:
        code = main(command)
    except SystemExit as end:
        code = end.code
    assert code == REFUSED
    error = capsys.readouterr().err
    assert option.removeprefix("--").replace("-", "_") in error or option in error
    assert "Traceback" not in error and not list(tmp_path.iterdir())


def test_an_artifact_may_be_given_as_its_program_or_from_inside(program_folder, tmp_path, monkeypatch, capsys):
    """`.` has no name that the folder of the results could get, and a .pte lies inside of the artifact."""
    measured = []
    monkeypatch.setattr(profile, "profile", lambda artifact, out, **rest: measured.append((artifact, out)) or {"a": 1})
    copy = tmp_path / "program"
    shutil.copytree(program_folder, copy)
    monkeypatch.chdir(copy)
    for artifact in (".", "model.pte", str(copy / "model.pte"), f"{copy}/"):
        assert main(["profile", artifact, "--json"]) == DONE
    assert {(artifact.resolve(), out) for artifact, out in measured} == {(copy, tmp_path / "program-profile")}
    assert main(["profile", ".", "--out", "inside"]) == REFUSED
    assert "--out inside: lies inside ARTIFACT" in capsys.readouterr().err
