"""`mobilemoe run smoke` at reduced size: every step for real, the driver killed in five of them, then the results."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.checksums import verify_checksums
from eval.export.formats import FORMATS
from pipelines.shared_data import open_shared_data
from pipelines.steps import STEPS
from tests.planted_keys import PLANTED, find_planted_in_commands, find_planted_in_files
from tests.titan_ext.object_stores import s3

pytestmark = pytest.mark.timeout(2400)  # six drivers, some minutes together; the machine may be busy

UMASK = 0o027

OVERRIDES = [
    "--data.corpora", "c4-sample", "wikipedia-plain", "dialogues", "reasoning-gym-math",
    "--data.tokenizer.train-vocab-size", "1024", "--model.vocab-size", "1024", "--model.n-layers", "2",
    "--stages.pretrain.steps", "24", "--stages.pretrain.warmup-steps", "4", "--stages.pretrain.learning-rate", "3e-3",
    "--stages.pretrain.global-batch-size", "16", "--stages.pretrain.local-batch-size", "8",
    "--stages.pretrain.seq-len", "128", "--stages.pretrain.checkpoint-interval", "4",
    "--stages.pretrain.heldout-interval", "12", "--stages.pretrain.log-interval", "1",
    *(x for stage in ("pretrain", "midtrain") for x in (
        f"--stages.{stage}.mixture.web", "0.7", f"--stages.{stage}.mixture.knowledge", "0.3",
        f"--stages.{stage}.mixture.math", "0", f"--stages.{stage}.mixture.code", "0",
        f"--stages.{stage}.mixture.science", "0",
    )),
    *(x for stage in ("midtrain", "sft", "qat") for x in (f"--stages.{stage}.warmup-steps", "1")),
    *(x for stage in ("midtrain", "sft", "qat") for x in (
        f"--stages.{stage}.steps", "4", f"--stages.{stage}.seq-len", "256", f"--stages.{stage}.log-interval", "1",
        f"--stages.{stage}.checkpoint-interval", "2",
    )),
    *(x for stage in ("sft", "qat") for x in (
        f"--stages.{stage}.mixture.chat", "0.5", f"--stages.{stage}.mixture.math", "0.5",
        f"--stages.{stage}.mixture.code", "0", f"--stages.{stage}.mixture.tool-use", "0",
        f"--stages.{stage}.mixture.reasoning", "0",
    )),
    "--evaluation.limit", "2", "--evaluation.heldout-tokens", "2000",
]  # fmt: skip


GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    chat = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    text = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    print("new", text.shape[1] - prompt.shape[1])
"""


class Driver:
    """One `mobilemoe run`, its output in a file."""

    def __init__(self, run: Path, log: Path):
        command = [sys.executable, "-m", "pipelines.cli", "run", "smoke", "--out", str(run), *OVERRIDES]
        self.log = log
        self.process = subprocess.Popen(
            command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=os.environ | PLANTED, umask=UMASK
        )
        self.shown: set[str] = set()
        """Planted keys in command lines."""

    def kill_when(self, there, timeout: float = 600) -> None:
        """SIGKILL once `there()` holds; an assertion if the driver ends before, or takes longer."""
        deadline = time.monotonic() + timeout
        try:
            while not there():
                assert self.process.poll() is None, self.log.read_text()[-4000:]
                assert time.monotonic() < deadline, self.log.read_text()[-4000:]
                self.shown |= {
                    *find_planted_in_commands(int(entry) for entry in os.listdir("/proc") if entry.isdigit())
                }
                time.sleep(0.1)
        finally:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def finish(self, timeout: float = 900) -> str:
        try:
            code = self.process.wait(timeout)
        finally:
            self.process.kill()
        assert code == 0, self.log.read_text()[-6000:]
        return self.log.read_text()


def read_steps(run: Path) -> dict:
    path = run / "manifest.json"
    return json.loads(path.read_text())["steps"] if path.exists() else {}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[dict], str]:
    """A run whose driver died in data, a stage, export, and evaluation beside packaging twice: (folder, steps by then,
    last log)."""
    folder = tmp_path_factory.mktemp("e2e")
    run, seen = folder / "run", []
    pretrain = run / "stages/1_pretrain"
    moments = (
        lambda: any((run / "data.partial").glob("work/logs/1-*/completions/*")),
        lambda: len(lines(pretrain / "metrics.jsonl")) >= 10 and any(pretrain.glob("checkpoint/step-*/.metadata")),
        lambda: any(run.glob("artifacts/*")),  # one of five, or its partial folder
        lambda: any(run.glob("eval/*.partial/*.json")),  # the first of 14 is done
        # Beside the evaluation, the program is traced then.
        lambda: (run / "artifacts/gguf").exists() and len(list(run.glob("eval/*/*.json"))) > 3,
    )
    for number, moment in enumerate(moments):
        driver = Driver(run, folder / f"driver_{number}.log")
        driver.kill_when(moment)
        assert driver.shown == set()
        seen.append(read_steps(run))
    text = Driver(run, folder / "driver_last.log").finish()
    seen.append(read_steps(run))
    return run, seen, text


def test_every_step_is_done_and_finished_steps_were_not_redone(finished):
    run, seen, _ = finished
    assert [seen[-1][name]["state"] for name in STEPS] == ["done"] * len(STEPS)
    for before, after in itertools.pairwise(seen):
        for name, entry in before.items():
            if entry["state"] == "done":
                assert after[name]["finished"] == entry["finished"], f"{name} was done and ran again"
    assert not (run / "stale").exists()
    assert not list(run.rglob("*.partial"))
    assert json.loads((run / "profile/profile.json").read_text())["measurements"][0]["context"] == 512


def test_no_key_of_the_environment_is_in_anything_that_the_run_left(finished):
    assert find_planted_in_files(finished[0].parent) == []


def test_files_have_the_modes_that_the_umask_leaves(finished):
    """0640 and 0750: no library opens a file to others, or closes one to the group."""
    wrong = [
        f"{path}: {mode:o}"
        for path in finished[0].rglob("*")
        if not path.is_symlink() and (mode := path.stat().st_mode & 0o777) not in (0o640, 0o750)
    ]
    assert wrong == []


def test_training_went_on_from_the_checkpoint_with_the_next_sample(finished):
    run, _, _ = finished
    metrics = lines(run / "stages/1_pretrain/metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 25))
    assert [line["tokens"] for line in metrics] == [16 * 128 * step for step in range(1, 25)]
    assert "Loading the checkpoint from" in (run / "stages/1_pretrain/logs/rank_0.log").read_text()
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    for stage in ("3_sft", "4_qat"):
        assert [line["step"] for line in lines(run / "stages" / stage / "metrics.jsonl")] == [1, 2, 3, 4]


def test_artifacts_are_whole_and_write_text_with_the_code_they_carry(finished, tmp_path):
    artifacts = finished[0] / "artifacts"
    assert {path.name for path in artifacts.iterdir()} == {entry.artifact for entry in FORMATS.values()}
    manifest = json.loads((finished[0] / "manifest.json").read_text())
    corpora = json.loads((finished[0] / "data/data_manifest.json").read_text())["corpora"]
    made_from = {"mobilemoe", *(f"library-{name}" for name in manifest["versions"])} | {f"corpus-{c}" for c in corpora}
    for folder in artifacts.iterdir():
        verify_checksums(folder)
        bill = json.loads((folder / "sbom.cdx.json").read_text())
        assert {component["bom-ref"] for component in bill["components"]} == made_from, folder.name
        assert str(finished[0]) not in json.dumps(bill)
        (program,) = [component for component in bill["components"] if component["bom-ref"] == "mobilemoe"]
        # Not the manifest's: somebody may commit between two starts of the driver.
        commits = [entry["value"] for entry in program.get("properties", ())]
        assert len(commits) == (manifest["git_commit"] is not None)
        assert all(re.fullmatch("[0-9a-f]{40}(-dirty)?", commit) for commit in commits)
    folders = [artifacts / name for name in ("bf16", "int4", "bf16-native")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", GENERATE, *map(str, folders)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["new", "8"] * 3


def test_int4_differs_from_bf16_but_not_by_much(finished):
    import eval.hf_mobilemoe  # noqa: F401  registers the classes

    artifacts = finished[0] / "artifacts"
    tokens = AutoTokenizer.from_pretrained(artifacts / "bf16")("The sum of two numbers is", return_tensors="pt")
    logits = [
        AutoModelForCausalLM.from_pretrained(artifacts / name, dtype=torch.float32)(**tokens).logits[0]
        for name in ("bf16", "int4")
    ]
    cosine = torch.nn.functional.cosine_similarity(*logits, dim=-1)
    assert 0.9 < cosine.min() < 1.0


def test_results_hold_fourteen_benchmarks_of_every_stages_model(finished):
    run = finished[0]
    for model in ("pretrain", "midtrain", "sft", "sft_int4_rounded", "qat_int4"):
        results = [json.loads(path.read_text()) for path in (run / "eval" / model).glob("*.json")]
        assert len(results) == 14
        assert all(0 <= result["value"] <= 1 and result["items"] == 2 for result in results)
    heldout = json.loads((run / "eval/heldout.json").read_text())
    assert heldout.keys() == {"pretrain", "midtrain", "sft", "sft_int4_rounded", "qat_int4"}
    for name in ("report.md", "report.html", "results.json"):
        assert (run / "report" / name).stat().st_size > 1000
    assert "chance" in (run / "report/report.md").read_text()


def test_another_run_takes_over_the_data(finished, tmp_path):
    run, other = finished[0], tmp_path / "other"
    words = ["run", "smoke", "--out", str(other), *OVERRIDES, "--until", "pretrain", "--stages.pretrain.steps", "6"]
    for data in (["--data", str(run)], []):  # the second time it is remembered
        command = [sys.executable, "-m", "pipelines.cli", *words, *data]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert ended.returncode == 0, ended.stderr[-4000:]
    assert "data: skip (up to date)" in ended.stderr
    assert not list((other / "data/shards").rglob("*.zstd"))
    packages = {path.name.partition("-")[0] for path in (other / "packages").iterdir()}
    assert packages < {path.name.partition("-")[0] for path in (run / "packages").iterdir()}
    own, first = (lines(folder / "stages/1_pretrain/metrics.jsonl")[0] for folder in (other, run))
    assert own["loss"] == first["loss"]  # of the same batch, with the same first weights
    own, first = (read_steps(folder)["data"]["identity"] for folder in (other, run))
    assert own == first


def test_the_data_command_sends_what_is_finished_to_a_store(finished, tmp_path, monkeypatch):
    run = finished[0]
    (tmp_path / "empty").mkdir()
    with s3(tmp_path / "empty", monkeypatch):
        words = ["data", "smoke", "--out", "s3://bucket/sets/a", "--work", str(run), "--json", *OVERRIDES]
        command = [sys.executable, "-m", "pipelines.cli", *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert ended.returncode == 0, ended.stderr[-4000:]
        made = json.loads(ended.stdout)
        shared = open_shared_data("s3://bucket/sets/a")
    assert shared.content == (run / "data/data_manifest.json").read_bytes()
    entry = shared.manifest["shards"]["pretrain"]["web"]
    assert made["shards"]["pretrain"]["web"]["tokens"] == entry["tokens"] > 0


def test_the_same_command_again_does_nothing(finished, tmp_path):
    run, seen, _ = finished
    text = Driver(run, tmp_path / "again.log").finish(timeout=200)
    assert text.count(": skip (up to date)") == len(STEPS)
    assert "dashboard" not in text, "no Ray is started for nothing"
    assert read_steps(run) == seen[-1]
