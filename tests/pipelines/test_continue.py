"""`--continue-from`: real training stages that go on from a checkpoint with other options, and what is refused."""

import dataclasses
import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import RefusedInput
from core.hashing import sha256_file
from core.stages import HELDOUT_FOLDERS, SHARD_FOLDERS
from pipelines.engine.manifest import Manifest
from pipelines.engine.runner import run_steps
from pipelines.engine.step import Step, StepFailed, plan_actions
from pipelines.engine.stop_file import find_stop_file
from pipelines.recipes import RECIPES
from pipelines.steps.build_steps import build_steps
from pipelines.steps.context import Context
from pipelines.steps.continue_stage import find_continuation
from pipelines.steps.data_parts import identify_parts
from tests.pipelines.test_recipes import change
from tests.titan_ext.stage_data import find_differences, write_data
from titan_ext.config import ModelDims, ParallelConfig
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import find_final_checkpoint, list_finished_checkpoints

DIMS = ModelDims(
    d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, expert_hidden=32, shared_hidden=32, n_experts=4,
    top_k=2, vocab_size=96, max_seq_len=64,
)  # fmt: skip


def make_recipe():
    smoke = RECIPES["smoke"].build()

    def shorten(stage, steps):
        return dataclasses.replace(
            stage, steps=steps, seq_len=64, global_batch_size=4, local_batch_size=4, warmup_steps=0, shards="pretrain",
            mixture={"web": 0.6, "code": 0.4}, checkpoint_interval=2, checkpoints_kept=9, heldout_batches=2,
            log_interval=1, heldout_interval=100,
        )  # fmt: skip

    stages = dataclasses.replace(
        smoke.stages, pretrain=shorten(smoke.stages.pretrain, 8), midtrain=shorten(smoke.stages.midtrain, 2)
    )
    parallel = ParallelConfig(world_size=1, precision="float32")
    return dataclasses.replace(smoke, model=DIMS, stages=stages, parallel=parallel)


def describe_data(folder: Path) -> None:
    """Write the entries of data_manifest.json that identify shards."""
    manifest = {"tokenizer": {"sha256": sha256_file(folder / "tokenizer/tokenizer.json")}}
    for top, parts in (("shards", SHARD_FOLDERS), ("heldout", HELDOUT_FOLDERS)):
        manifest[top] = {
            part: {
                index.parent.name: {"index_sha256": sha256_file(index)}
                for index in sorted((folder / top / part).glob("*/index.json"))
            }
            for part in parts
        }
    (folder / "data_manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size)
    describe_data(folder)
    return folder


class Driver:
    """A driver as that of `mobilemoe run`, with the ranks as processes of this machine in place of Ray's workers."""

    def __init__(self, run: Path, data: Path):
        self.run, self.data, self.said, self.trained = run, data, [], []

    def steps(self, recipe):
        context = Context(recipe, self.run, SimpleNamespace(run_gang=self.run_gang), self.said.append)
        steps = {step.name: step for step in build_steps(context, "items==1")}
        identity = {"shards": sha256_file(self.data / "data_manifest.json")}
        data = Step("data", 6, (), identity, ("data",), self.prepare_data)
        return [data, steps["pretrain"], steps["midtrain"], steps["sft"]]

    def prepare_data(self):
        shutil.copytree(self.data, self.run / "data")
        return {"parts": identify_parts(self.run / "data")}

    def run_gang(self, function, spec, name):
        self.trained.append(name)
        run_ranks(spec, self.run / "logs", function)

    def go(self, recipe, continue_from=None, until="midtrain"):
        self.said.clear()
        self.trained.clear()
        steps, manifest = self.steps(recipe), Manifest(self.run)
        self.run.mkdir(exist_ok=True)
        continuation = None
        if continue_from:
            continuation = find_continuation(continue_from, steps, self.run, manifest, self.said.append)
        run_steps(
            steps, self.run, manifest, until=until, restart_from=None, continuation=continuation,
            log_line=self.said.append, stop=threading.Event(),
        )  # fmt: skip
        return list(self.trained)

    def plan(self, recipe):
        return plan_actions(self.steps(recipe), self.run, Manifest(self.run))

    def read(self, log):
        return [json.loads(line) for line in (self.run / "stages/1_pretrain" / log).read_text().splitlines()]

    def checkpoints(self, folder="stages/1_pretrain"):
        return list_finished_checkpoints(self.run / folder)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    driver = Driver(tmp_path_factory.mktemp("finished") / "run", data)
    assert driver.go(make_recipe()) == ["pretrain", "midtrain"]
    assert driver.checkpoints() == [2, 4, 6, 8]
    return driver.run


@pytest.fixture
def driver(finished, data, tmp_path) -> Driver:
    return Driver(shutil.copytree(finished, tmp_path / "run"), data)


SLOWER = change(make_recipe(), "stages.pretrain.learning_rate", 1e-4)


def test_the_changed_stage_keeps_its_checkpoint_and_the_change_is_recorded(driver):
    rate = make_recipe().stages.pretrain.learning_rate
    assert driver.go(SLOWER, "4") == ["pretrain", "midtrain"]
    assert [line["step"] for line in driver.read("metrics.jsonl")] == list(range(1, 9))
    rates = [line["lr"] for line in driver.read("metrics.jsonl")]
    assert rates[3] > rate / 2 and max(rates[4:]) < 1e-4
    (made,) = Manifest(driver.run).step("pretrain")["changes"]
    assert made["changed"] == [{"field": "stages.pretrain.learning_rate", "from": rate, "to": 1e-4}]
    assert made["step"] == 4 and made["time"].startswith("20")
    stale = driver.run / "stale/stages/1_pretrain"
    assert list_finished_checkpoints(stale) == [6, 8]
    assert [json.loads(line)["lr"] for line in (stale / "metrics.jsonl").read_text().splitlines()][:4] == rates[:4]
    assert any("2 checkpoints after step 4 moved to stale/stages/1_pretrain" in line for line in driver.said)


def test_the_same_command_again_resumes_and_goes_on_once(driver):
    """It is interrupted from its first step on, which ends it a step later, and asked again; with and without the
    option."""
    find_stop_file(driver.run).touch()
    with pytest.raises(StepFailed, match="step-8: no finished checkpoint"):
        driver.go(SLOWER, "4")
    find_stop_file(driver.run).unlink()
    assert driver.checkpoints() == [2, 4, 6]
    assert driver.go(SLOWER, "4") == ["pretrain", "midtrain"]
    log = (driver.run / "stages/1_pretrain/logs/rank_0.log").read_text()
    assert re.findall(r"Training starts at step (\d+)", log) == ["1", "5", "7"]
    assert driver.go(SLOWER, "4") == driver.go(SLOWER) == []
    assert sorted(path.name for path in (driver.run / "stale/stages").iterdir()) == ["1_pretrain", "2_midtrain"]
    assert len(Manifest(driver.run).step("pretrain")["changes"]) == 1


def test_a_second_change_starts_from_what_the_first_left_before_it(driver):
    """The change at step 6 is undone where the next one begins at 4: what was changed there is what held at 4."""
    rate = make_recipe().stages.pretrain.learning_rate
    driver.go(SLOWER, "6", until="pretrain")
    clipped = change(make_recipe(), "stages.pretrain.max_grad_norm", 0.5)
    driver.go(clipped, "4", until="pretrain")
    (made,) = Manifest(driver.run).step("pretrain")["changes"]
    assert made["step"] == 4
    assert made["changed"] == [{"field": "stages.pretrain.max_grad_norm", "from": 1.0, "to": 0.5}]
    assert driver.read("metrics.jsonl")[4]["lr"] > rate / 2
    driver.go(change(clipped, "stages.pretrain.steps", 9), "8", until="pretrain")
    assert [made["step"] for made in Manifest(driver.run).step("pretrain")["changes"]] == [4, 8]
    assert find_final_checkpoint(driver.run / "stages/1_pretrain", 9)


def test_more_steps_of_a_finished_stage(driver):
    longer = change(make_recipe(), "stages.pretrain.steps", 10)
    assert driver.go(longer, "pretrain:8") == ["pretrain", "midtrain"]
    assert driver.checkpoints() == [2, 4, 6, 8, 10]


def test_other_shards_go_on_from_a_checkpoint(driver, data, tmp_path):
    other = write_data(tmp_path / "other", DIMS.vocab_size, domains=("code",), seed=7)
    driver.data = shutil.copytree(data, tmp_path / "data")
    for folder in ("shards/pretrain", "heldout/pretrain"):
        shutil.rmtree(driver.data / folder / "code")
        shutil.copytree(other / folder / "code", driver.data / folder / "code")
    describe_data(driver.data)
    before = driver.read("data.jsonl")[3]
    assert driver.go(make_recipe(), "4") == ["pretrain", "midtrain"]
    (made,) = Manifest(driver.run).step("pretrain")["changes"]
    assert [item["field"] for item in made["changed"]] == ["inputs.data"]
    after = driver.read("data.jsonl")[4]
    assert after["epochs"]["web"] > before["epochs"]["web"], "the same shards go on where they were"
    assert 0 < after["epochs"]["code"] < before["epochs"]["code"], "new shards begin with their first document"


def test_a_stage_stays_up_to_date_when_other_shards_are_made_anew(driver, data, tmp_path):
    driver.data = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(driver.data / "shards/sft/code")
    describe_data(driver.data)
    assert driver.go(make_recipe()) == []
    assert any("data: redo" in line for line in driver.said)
    assert [line for line in driver.said if "train: skip (up to date)" in line]


def test_numbers_that_are_not_finite_name_the_command_that_goes_on(driver):
    """The advice is carried out as it is printed."""
    broken = change(make_recipe(), "stages.pretrain.learning_rate", 1e30)
    with pytest.raises(StepFailed, match="not finite, so the parameters were not updated") as failure:
        driver.go(broken, "4", until="pretrain")
    options = re.search(r"--continue-from (\d+) --stages\.pretrain\.learning-rate (\S+)\. ", failure.value.args[0])
    assert options, failure.value.args[0]
    step, rate = int(options[1]), float(options[2])
    assert (step, rate) == (max(driver.checkpoints()), 5e29)
    with pytest.raises(StepFailed):  # half of it is too high as well
        driver.go(change(broken, "stages.pretrain.learning_rate", rate), str(step), until="pretrain")
    assert driver.go(SLOWER, "4", until="pretrain") == ["pretrain"]


@pytest.mark.parametrize(
    ("path", "value", "wanted", "words"),
    [
        ("stages.pretrain.learning_rate", 1e-4, "5", "pretrain has no checkpoint of this step; there are .*2, 4, 6, 8"),
        ("stages.pretrain.log_interval", 2, "sft:5", "sft has no checkpoint of this step; there are none"),
        ("stages.pretrain.learning_rate", 1e-4, "soon", "give the step of a checkpoint"),
        ("stages.pretrain.learning_rate", 1e-4, "eval:4", "give the step of a checkpoint"),
        ("stages.pretrain.learning_rate", 1e-4, "midtrain:2", "pretrain comes before midtrain and is not up to date"),
        ("stages.pretrain.log_interval", 2, "midtrain:2", "midtrain is done, and nothing of it has changed"),
        ("model.n_layers", 2, "4", "can follow model.n_layers: 1 -> 2. On the way may change the data and steps"),
        ("stages.pretrain.seq_len", 32, "4", "can follow stages.pretrain.seq_len: 64 -> 32"),
        ("stages.pretrain.global_batch_size", 8, "4", "can follow stages.pretrain.global_batch_size"),
        ("seed", 1, "4", "can follow seed: 0 -> 1"),
        ("stages.pretrain.steps", 4, "4", "stages.pretrain.steps = 4: must be above"),
    ],
)
def test_refused_before_anything_starts(path, value, wanted, words, finished, data):
    driver = Driver(finished, data)
    before = (finished / "manifest.json").read_bytes()
    with pytest.raises(RefusedInput, match=words):
        driver.go(change(make_recipe(), path, value), wanted)
    assert (finished / "manifest.json").read_bytes() == before and driver.checkpoints() == [2, 4, 6, 8]


def test_a_parent_that_new_data_would_do_anew_stops_the_run(driver, data, tmp_path):
    """Only the new data shows it: pretrain's shards are others, and midtrain was to go on from its checkpoint."""
    driver.data = write_data(tmp_path / "data", DIMS.vocab_size, seed=5)
    describe_data(driver.data)
    changed = change(make_recipe(), "stages.midtrain.steps", 4)
    with pytest.raises(StepFailed, match=r"it would be done anew \(input data changed\), and midtrain could not go on"):
        driver.go(changed, "midtrain:2")
    assert driver.checkpoints() == [2, 4, 6, 8], "pretrain is as it was"


def test_a_number_without_a_stage_does_not_roll_back_a_stage_that_is_up_to_date(driver, data, tmp_path):
    driver.data = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(driver.data / "shards/sft/code")
    describe_data(driver.data)
    with pytest.raises(StepFailed, match=r"pretrain is done, and nothing that it reads has changed; .* sft:4"):
        driver.go(make_recipe(), "4")
    assert driver.checkpoints() == [2, 4, 6, 8]


def test_a_stage_whose_parent_was_trained_anew_is_not_continued(driver):
    changed = change(SLOWER, "stages.midtrain.learning_rate", 1e-4)
    driver.go(SLOWER, "4", until="pretrain")
    with pytest.raises(RefusedInput, match=r"no checkpoint of midtrain can follow inputs\.pretrain"):
        driver.go(changed, "midtrain:2")


def test_what_was_never_changed_trains_to_the_same_bits(driver, data, tmp_path):
    """Rolled back without a change, a failed stage ends where it would have ended."""
    ends = [find_final_checkpoint(driver.run / "stages/1_pretrain", 8)]
    manifest = Manifest(driver.run)
    manifest.content["steps"]["pretrain"]["state"] = "failed"
    manifest.save()
    kept = shutil.copytree(ends[0], tmp_path / "kept")
    assert driver.go(make_recipe(), "4", until="pretrain") == ["pretrain"]
    assert find_differences(kept, ends[0]) == []
    assert Manifest(driver.run).step("pretrain")["changes"][0]["changed"] == []
