"""The phone script against a stand-in for adb that runs its commands here: no phone is at hand."""

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "eval" / "device" / "expert_op" / "run_on_phone.sh"

ADB = """#!/bin/sh
case $1 in
  get-state) echo "${ADB_STATE:-device}" ;;
  shell) shift; sh -c "$(echo "$*" | sed "s|/data/local/tmp|$PHONE|g")" ;;
  push) shift 2; for last; do :; done; mkdir -p "$PHONE/mobilemoe"
        for file; do [ "$file" = "$last" ] || cp "$file" "$PHONE/mobilemoe/"; done ;;
  pull) cp "$(echo "$3" | sed "s|/data/local/tmp|$PHONE|")" "$4" ;;
esac
"""

RUNNER = """#!/bin/sh
echo "$*"
sleep 0.3
echo 'I 00:00:01 executorch:stats.h:100] PyTorchObserver {"prompt_tokens":3,"generated_tokens":9}'
[ -z "$RUNNER_FAILS" ]
"""


@pytest.fixture
def phone(tmp_path):
    """Runs the script and gives the finished process."""
    for name, content in {"bin/adb": ADB, "llama_main": RUNNER}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)
    program = tmp_path / "program"
    program.mkdir()
    for name in ("model.pte", "tokenizer.json"):
        (program / name).write_text("x")
    (program / "program.json").write_text('{"uses_fast_expert_op": false}')

    def run(*, numbers=("2", "9"), **environment):
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PHONE": str(tmp_path)} | environment
        command = [str(SCRIPT), str(program), str(tmp_path / "llama_main"), str(tmp_path / "out"), *numbers]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    run.folder = tmp_path
    return run


def test_it_collects_statistics_and_peak_memory(phone):
    done = phone()
    assert done.returncode == 0, done.stderr
    for domain in ("knowledge", "code", "maths"):
        result = json.loads((phone.folder / "out" / f"{domain}.json").read_text())
        assert result["stats"] == {"prompt_tokens": 3, "generated_tokens": 9}
        assert result["threads"] == 2 and result["peak_kb"] > 100
        log = (phone.folder / "out" / f"{domain}.log").read_text()
        assert f"--prompt_file {domain}.txt" in log and "--max_new_tokens 9" in log


def test_a_runner_that_fails_ends_it(phone):
    assert phone(RUNNER_FAILS="yes").returncode != 0


@pytest.mark.parametrize("numbers", [("0", "9"), ("2", "0"), ("-1", "9"), ("2", "x"), ("2", "1.5"), ("2; reboot", "9")])
def test_numbers_that_are_none_are_refused(phone, numbers):
    done = phone(numbers=numbers)
    assert done.returncode == 2 and "whole numbers from 1" in done.stderr


def test_no_phone_and_the_wrong_program_are_refused(phone):
    assert "adb sees no phone" in phone(ADB_STATE="offline").stderr
    (phone.folder / "program" / "program.json").write_text('{"uses_fast_expert_op": true}')
    assert "--expert-op stock" in phone().stderr
    (phone.folder / "program" / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in phone().stderr
