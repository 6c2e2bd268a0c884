"""`mobilemoe plan`: its figures are those of the rules, and by hand; what makes no sense is refused, nothing is run."""

import dataclasses
import json
import math

import pytest

from data.catalogue.corpora import CATALOGUE
from pipelines.cli import DONE, REFUSED, main
from pipelines.commands.plan import PARTS, format_plan
from pipelines.engine.manifest import Manifest
from pipelines.plan import describe_parallel, find_other_layout, plan_run
from pipelines.printing import print_result
from pipelines.recipes import RECIPES
from pipelines.validation.problems import InvalidRecipe
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.memory import MemoryEstimate
from titan_ext.traffic import count_traffic
from titan_ext.training.schedules import published_stages


@pytest.fixture(scope="module")
def published():
    return plan_run(RECIPES["l"].build())


def test_the_plan_of_l(published):
    assert published["parameters"]["total"] == pytest.approx(5.3e9, rel=0.03)
    own, other = (published["memory"]["layouts"][name] for name in ("recipe", "other"))
    assert own["title"] == "EP 1, HSDP, 32 replicas of 8, recomputation selective, compiled"
    assert other["title"] == "EP 4, FSDP over 256, recomputation selective, compiled"
    assert own["fits"] and other["fits"] and own["peak"] < published["memory"]["limit"] == 72e9
    choice = published["memory"]["choice"]
    assert "marin #6979" in choice["evidence"].replace("-community/marin", "")
    assert [option["sharding"] for option in choice["options"] if option["recipe"]] == ["EP 1, HSDP, 32 replicas of 8"]
    assert choice["options"][0]["recipe"] and choice["reason"].startswith("EP 1, HSDP, 32 replicas of 8 waits for")
    stages = published["stages"]
    assert stages["pretrain"]["tokens"] == pytest.approx(6e12, rel=1e-4)
    tokens = [entry["available"] for entry in stages["midtrain"]["domains"].values()]
    assert stages["midtrain"]["shards"] == sum(math.ceil(n * 4 / 2**26) for n in tokens)
    assert stages["qat"]["domains"]["safety"]["epochs"] == pytest.approx(
        stages["sft"]["domains"]["safety"]["epochs"] * 21 / 126, rel=1e-3
    )
    speed = stages["pretrain"]["roofline"]
    assert speed["gpu_hours"] == pytest.approx(6e12 / speed["tokens_per_second"] / 3600, rel=1e-4)
    assert "computed" in speed["source"] and "not run" in speed["source"]
    text = sum(CATALOGUE[name].text_bytes for name in RECIPES["l"].build().data.corpora)
    assert published["data"]["text_bytes"] == pytest.approx(text, rel=1e-9)
    assert 1e8 < published["data"]["heldout_tokens"] <= 37 * 10_000_000
    assert published["data"]["clean_core_hours"] == pytest.approx(text / 1e6 / 1.70 / 3600)
    assert [refusal.partition(" ")[0] for refusal in published["refusals"]] == ["data.tokenizer.train_vocab_size"]


def test_the_plan_names_what_is_unknown_and_does_not_refuse_it(smoke, capsys):
    plan = plan_run(smoke)
    assert plan["refusals"] == [] and plan["memory"]["limit"] is None
    assert plan["stages"]["pretrain"]["shards"] is None
    assert plan["stages"]["sft"]["roofline"] is None, "no GPU"
    assert {entry["epochs"] for entry in plan["stages"]["sft"]["domains"].values()} == {None}
    print_result(format_plan(plan))
    assert capsys.readouterr().out.count("unknown") > 20


def test_a_layout_beyond_the_gpu_stands_beside_the_nearest_that_fits():
    recipe = RECIPES["l"].build()
    parallel = dataclasses.replace(recipe.parallel, activation_checkpoint="selective")
    cluster = dataclasses.replace(recipe.cluster, gpu_memory=20_000_000_000)
    plan = plan_run(dataclasses.replace(recipe, parallel=parallel, cluster=cluster))
    layouts = plan["memory"]["layouts"]
    assert not layouts["recipe"]["fits"] and layouts["nearest"]["fits"]
    assert layouts["nearest"]["parallel"]["activation_checkpoint"] == "full"
    assert any(refusal.startswith("cluster.gpu_memory = 20000000000: stage pretrain") for refusal in plan["refusals"])


def test_a_stated_layout_stands_beside_the_best():
    recipe = RECIPES["s"].build()
    stated = dataclasses.replace(recipe.parallel, expert_parallel=4, data_parallel_replicate=1)
    cluster = dataclasses.replace(recipe.cluster, gpu="A100", network_gbits=50.0)
    choice = plan_run(dataclasses.replace(recipe, parallel=stated, cluster=cluster))["memory"]["choice"]
    assert choice["reason"].startswith(
        "EP 4, FSDP over 64 is stated in the recipe. Left open: EP 1, FSDP over 64 waits"
    )
    assert [option["sharding"] for option in choice["options"] if option["recipe"]] == ["EP 4, FSDP over 64"]
    assert (choice["gpu"], choice["network_gbits"], len(choice["options"])) == ("A100", 50, 6)
    wide = dataclasses.replace(recipe.parallel, context_parallel=2)
    assert "not timed" in plan_run(dataclasses.replace(recipe, parallel=wide))["memory"]["choice"]["reason"]


def test_every_part_of_the_memory_has_a_row():
    sizes = {field.name for field in dataclasses.fields(MemoryEstimate)} - {"accumulates"}
    assert set(PARTS) == sizes


@pytest.mark.parametrize(
    ("parallel", "other"),
    [
        (ParallelConfig(world_size=16, expert_parallel=4), "EP 1, HSDP, 2 replicas of 8"),
        (ParallelConfig(world_size=12, expert_parallel=4), "EP 1, FSDP over 12"),
        (ParallelConfig(world_size=16, data_parallel_replicate=2), "EP 4, FSDP over 16"),
        (ParallelConfig(world_size=6), None),
    ],
)
def test_the_other_layout(parallel, other):
    found = find_other_layout(dataclasses.replace(RECIPES["l"].build(), parallel=parallel))
    assert other == (found and describe_parallel(found.parallel).partition(", recomputation")[0])


def test_traffic_by_hand():
    dims, stage = FLAVORS["L"], published_stages()["pretrain"]
    experts = dims.n_layers * dims.n_experts * 3 * dims.d_model * dims.expert_hidden
    alone = count_traffic(dims, stage, ParallelConfig(world_size=8))
    shared = count_traffic(dims, stage, ParallelConfig(world_size=8, expert_parallel=4))
    # Two gathers of bfloat16 and a float32 reduction: 8 bytes a parameter, of which an eighth is there already.
    assert alone.tokens == 0 and alone.weights == pytest.approx(8 * 5.3e9 * 7 / 8, rel=0.03)
    assert alone.weights - shared.weights == pytest.approx(8 * experts * (7 / 8 - 1 / 4 * 1 / 2), rel=1e-6)
    rows = 8 * 2048 * 4 * 1.5
    assert shared.tokens == pytest.approx(4 * 2 * rows * dims.d_model * dims.n_layers * 3 / 4)
    again = count_traffic(dims, stage, ParallelConfig(8, 4, activation_checkpoint="full"))
    assert again.tokens == pytest.approx(shared.tokens * 6 / 4)


def test_the_command_takes_overrides_and_runs_of_others(smoke, tmp_path, capsys):
    assert main(["plan", "smoke", "--stages.pretrain.steps", "70", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["stages"]["pretrain"]["steps"] == 70
    Manifest(tmp_path / "run").describe(smoke)
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", "--like", str(tmp_path / "run"), "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["recipe"] == "smoke"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "smok"], "Did you mean smoke?"),
        (["plan", "--like"], "give the folder of a run"),
        (["plan", "smoke", "--parallel.world-size", "0"], "parallel.world_size = 0: must be above 0"),
        (["plan", "s", "--cluster.network-gbits", "0"], "cluster.network_gbits = 0.0: must be above 0"),
        (["plan", "smoke", "--data.max-epochs.sft", "nan"], "data.max_epochs.sft = nan: must be above 0"),
    ],
)
def test_refusals(words, message, capsys):
    assert main(words) == REFUSED
    printed = capsys.readouterr()
    assert message in printed.err.replace("\n", " ") and printed.out == ""


def test_numbers_that_make_no_sense_are_refused_together(smoke):
    broken = dataclasses.replace(
        smoke, parallel=dataclasses.replace(smoke.parallel, expert_parallel=3),
        model=dataclasses.replace(smoke.model, top_k=99),
    )  # fmt: skip
    with pytest.raises(InvalidRecipe, match="3 problem"):
        plan_run(broken)


def test_a_run_of_a_version_with_one_fraction_is_refused_by_name(smoke, tmp_path, capsys):
    Manifest(tmp_path / "run").describe(smoke)
    file = tmp_path / "run" / "manifest.json"
    content = json.loads(file.read_text())
    content["recipe"]["data"]["midtrain_fraction"] = 0.25
    file.write_text(json.dumps(content))
    assert main(["plan", "--like", str(tmp_path / "run")]) == REFUSED
    assert "recipe.data.midtrain_fraction: is 0.25" in capsys.readouterr().err.replace("\n", " ")
