"""The command: exit codes, refusals that create nothing, overrides, JSON."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from pipelines.cli import main
from pipelines.commands import COMMANDS
from pipelines.commands.run import parse as parse_run
from pipelines.display import Display, format_line
from pipelines.engine.manifest import Manifest
from pipelines.engine.run_lock import lock_run
from pipelines.recipe import to_dict
from pipelines.recipes import RECIPES
from pipelines.status import read_status
from pipelines.steps import STEPS


def run(*arguments):
    """Exit code of the command, also where tyro ends it."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def parse(*overrides):
    return parse_run(["smoke", *overrides]).recipe


def test_overrides_reach_every_kind_of_leaf():
    recipe = parse(
        "--stages.pretrain.steps", "200", "--data.heldout-fraction", "0.05", "--quantization.group_size", "64",
        "--stages.pretrain.mixture.web", "0.5", "--data.corpora", "c4-sample", "tool-calls", "--name", "other",
        "--evaluation.limit", "3", "--parallel.precision", "bfloat16",
    )  # fmt: skip
    assert recipe.stages.pretrain.steps == 200
    assert recipe.data.heldout_fraction == 0.05
    assert recipe.quantization.group_size == 64
    assert recipe.stages.pretrain.mixture["web"] == 0.5
    assert recipe.stages.pretrain.mixture["math"] == RECIPES["smoke"].build().stages.pretrain.mixture["math"]
    assert recipe.data.corpora == ("c4-sample", "tool-calls")
    assert recipe.evaluation.limit == 3


REFUSED = [
    (("run", "smok"), "Did you mean smoke?"),
    (("rum", "smoke"), "Did you mean run?"),
    (("run", "smoke", "--stages.pretrain.stepz", "5"), "--stages.pretrain.steps"),
    (("run", "smoke", "--stages.pretrain.steps", "many"), "--stages.pretrain.steps"),
    (("run", "smoke", "--until", "pretraining"), "pretrain"),
    (("run", "smoke", "--until", "data", "--from", "sft"), "--until data comes before --from sft"),
    (("run", "smoke", "--continue-from", "9", "--from", "sft"), "--continue-from and --from"),
    (("run", "smoke", "--continue-from", "9"), "pretrain has no checkpoint of this step; there are none"),
    (("run", "smoke", "--continue-from", "the last"), "give the step of a checkpoint"),
    (("run", "smoke", "--model.top-k", "17"), "model.top_k = 17"),
    (("run", "smoke", "--stages.pretrain.mixture.web", "0.7"), "the shares must sum to 1"),
    (("run", "smoke", "--evaluation.suite", "al"), "foundational"),
    (("run", "smoke", "--model.n-layers", "10000000"), "GB free"),
    (("run", "s"), "--data.tokenizer.path"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_refused_with_2_and_nothing_created(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    message = capsys.readouterr()
    assert words in message.err and message.out == ""
    assert list(tmp_path.iterdir()) == []


def test_help_and_refusal_import_neither_torch_nor_ray(tmp_path):
    script = (
        "import sys; from pipelines.cli import main\n"
        "codes = [main(['--help']), main(['recipes']), main(['run', 'smok'])]\n"
        "sys.exit(0 if codes == [0, 0, 2] and not {'torch', 'ray', 'transformers'} & set(sys.modules) else 1)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_has_a_summary_and_help(name, capsys):
    assert run("--help") == 0
    assert f"  {name:12} {COMMANDS[name].summary}" in capsys.readouterr().out
    assert run(name, "--help") == 0
    assert f"mobilemoe {name}" in capsys.readouterr().out


def test_run_takes_the_steps_of_the_list(capsys):
    assert run("run", "smoke", "--help") == 0
    assert ",".join(STEPS) in re.sub(r"[\s│]", "", capsys.readouterr().out)  # without the box and its line breaks


def test_recipes_as_json_names_what_each_needs(capsys):
    assert run("recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed.keys() == {"smoke", "hour", "s", "m", "l"}
    assert listed["smoke"]["needs"] == "" and "64 GPUs" in listed["s"]["needs"]
    gigabytes = [int(re.search(r"(\d+) GB of memory a GPU", listed[name]["needs"])[1]) for name in "sml"]
    # M computes nothing again and L does, so L needs less.
    assert len(set(gigabytes)) == 3 and max(gigabytes) <= 60


@pytest.mark.parametrize("command", ["status", "report"])
def test_folder_without_a_run_is_refused(command, tmp_path, capsys):
    assert run(command, str(tmp_path)) == 2
    assert "no manifest.json" in capsys.readouterr().err


def test_export_refuses_a_run_of_an_earlier_version(tmp_path, smoke, capsys):
    checkpoint = tmp_path / "stages" / "3_sft" / "checkpoint" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    recipe = to_dict(smoke)
    del recipe["quantization"]
    (tmp_path / "manifest.json").write_text(json.dumps({"recipe": recipe, "steps": {}}))
    assert run("export", str(checkpoint), "--format", "int4", "--out", str(tmp_path / "out")) == 2
    assert "earlier version" in capsys.readouterr().err


def test_eval_and_export_refuse_what_is_no_checkpoint(tmp_path, capsys):
    assert run("eval", str(tmp_path)) == 2
    assert "for example RUN/stages/3_sft/checkpoint/step-40" in capsys.readouterr().err
    assert run("eval", str(tmp_path), "--suite", "founational") == 2
    assert "Did you mean foundational?" in capsys.readouterr().err
    assert run("export", str(tmp_path), "--format", "bf16", "--out", str(tmp_path / "out")) == 2
    assert "no DCP checkpoint" in capsys.readouterr().err
    (tmp_path / ".metadata").touch()
    assert run("export", str(tmp_path), "--format", "int4", "--out", str(tmp_path / "out")) == 2
    assert "give one inside a run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def begun(tmp_path, smoke):
    """A run folder in the middle of pre-training, as a killed driver leaves it."""
    manifest = Manifest(tmp_path)
    pretrain = dataclasses.replace(smoke.stages.pretrain, steps=240, seq_len=256, global_batch_size=16)
    manifest.describe(dataclasses.replace(smoke, stages=dataclasses.replace(smoke.stages, pretrain=pretrain)))
    for name in ("fetch", "items", "data", "pretrain"):
        manifest.start(name, {"version": 1, "fingerprint": name, "identity": name, "config": {}, "inputs": {}})
        if name != "pretrain":
            manifest.finish(name, "done")
    stage = tmp_path / "stages" / "1_pretrain"
    stage.mkdir(parents=True)
    record = {"step": 60, "tokens": 245_760, "loss": 6.5, "tokens_per_second": 4096.0}
    (stage / "metrics.jsonl").write_text(f'{{"step": 59}}\n{json.dumps(record)}\n{{"step": 6')
    return tmp_path


def test_status_of_a_killed_run(begun, capsys):
    assert run("status", str(begun), "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in status["steps"]] == list(STEPS)
    assert [step["state"] for step in status["steps"]][:5] == ["done", "done", "done", "interrupted", "pending"]
    assert status["driver"] is None
    assert run("status", str(begun)) == 0
    assert "interrupted" in capsys.readouterr().out


def test_status_while_a_driver_is_at_work(begun):
    with lock_run(begun):
        status = read_status(begun)
    step = status.steps[STEPS.index("pretrain")]
    assert (step.state, step.done, step.total, step.tokens, step.loss) == ("running", 60, 240, 245_760, 6.5)
    assert step.seconds_left == 180 * 16 * 256 / 4096
    assert status.driver.startswith("pid ")
    assert format_line(status) == (
        f"step 4 of {len(STEPS)}  "
        "pretrain  training 60/240 (25%)  245,760 tokens  loss 6.5000  4,096 tokens/s  0:03:00 left"
    )


def test_a_run_that_ends_early_counts_its_own_steps(begun, capsys, monkeypatch):
    monkeypatch.setattr("pipelines.display.LINE_INTERVAL_SECONDS", 0)
    with lock_run(begun):
        Display(begun, until="pretrain").refresh()
    assert capsys.readouterr().err.startswith("step 4 of 4  pretrain  training 60/240")


def test_second_driver_is_refused_and_told_of_the_first(begun, capsys):
    held = subprocess.Popen(
        [sys.executable, "-c", "import sys, time, pathlib; from pipelines.engine.run_lock import lock_run\n"
         "with lock_run(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)", str(begun)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert held.stdout.readline() == "held\n"
    assert run("run", "smoke", "--out", str(begun)) == 2
    assert f"another driver, pid {held.pid} on host" in capsys.readouterr().err
    held.kill()
    held.wait()
    with lock_run(begun):
        assert read_status(begun).driver.startswith("pid ")
    assert read_status(begun).driver is None
