"""Every shipped recipe builds, validates, and holds the published numbers."""

import dataclasses
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from core.errors import RefusedInput
from core.stages import STAGES
from data.catalogue.corpora import CATALOGUE
from data.catalogue.open_corpora import OPEN_CORPORA
from data.mixture import choose_heldout_fraction, estimate_tokens
from data.validate_config import estimate_bytes, validate_config
from eval.benchmarks.items import PACKAGE
from eval.config import EvaluationConfig
from pipelines.engine.fingerprints import fingerprint
from pipelines.engine.manifest import Manifest
from pipelines.engine.step import plan_actions
from pipelines.preflight import check_disk, count_checkpoints, estimate_disk, estimate_left, measure_folder
from pipelines.recipe import to_dict
from pipelines.recipes import RECIPES
from pipelines.steps import STEPS
from pipelines.steps.build_steps import build_steps
from pipelines.steps.context import Context
from pipelines.validation.epoch_rules import count_repetitions, find_epoch_problems
from pipelines.validation.input_rules import read_tokenizer_size
from pipelines.validation.memory_rules import estimate_stages, find_memory_problems, find_nearest_layout, settle
from pipelines.validation.problems import InvalidRecipe
from pipelines.validation.validate_recipe import find_problems, validate_recipe
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.model_stats import count_parameters
from titan_ext.training.schedules import published_stages


def with_tokenizer(recipe, path):
    return replace(recipe, data=replace(recipe.data, tokenizer=replace(recipe.data.tokenizer, path=str(path))))


def change(recipe, path, value):
    """The recipe with the field at a dotted path replaced."""
    name, _, rest = path.partition(".")
    return replace(recipe, **{name: change(getattr(recipe, name), rest, value) if rest else value})


def test_stages_of_a_recipe_are_the_stages_that_run(smoke):
    assert tuple(name for name, _ in smoke.stages.items()) == STAGES


def test_smoke_validates(smoke):
    assert list(find_problems(smoke)) == []


@pytest.mark.parametrize("name", ["s", "m", "l"])
def test_published_recipes_validate_once_they_have_a_tokenizer(name, llama3_tokenizer):
    recipe = RECIPES[name].build()
    assert [problem.field for problem in find_problems(recipe)] == ["data.tokenizer.train_vocab_size"]
    validate_recipe(with_tokenizer(recipe, llama3_tokenizer))
    assert "--data.tokenizer.path" in RECIPES[name].needs


@pytest.mark.parametrize(("name", "total"), [("s", 1.3e9), ("m", 2.8e9), ("l", 5.3e9)])
def test_published_sizes_and_token_budgets(name, total):
    recipe = RECIPES[name].build()
    assert count_parameters(recipe.model).total == pytest.approx(total, rel=0.05)
    tokens = [stage.steps * stage.seq_len * stage.global_batch_size for _, stage in recipe.stages.items()]
    assert tokens == pytest.approx([6e12, 500e9, 126e9, 21e9], rel=1e-4)
    assert [stage.seq_len for _, stage in recipe.stages.items()] == [2048, 8192, 8192, 8192]
    assert [stage.learning_rate for _, stage in recipe.stages.items()] == [4e-4, 4e-5, 4e-6, 4e-6]


def test_published_mixtures_are_the_papers_but_for_domains_that_would_repeat_too_often():
    recipe, paper = RECIPES["l"].build(), published_stages()
    for name, stage in recipe.stages.items():
        limited = [domain for domain, share in stage.mixture.items() if share < paper[name].mixture[domain]]
        assert limited == (["safety"] if stage.shards == "sft" else [])
        assert math.fsum(stage.mixture.values()) == pytest.approx(1, abs=1e-6)
    assert recipe.stages.qat.mixture == recipe.stages.sft.mixture
    grown = {d: s / paper["sft"].mixture[d] for d, s in recipe.stages.sft.mixture.items() if d != "safety"}
    assert list(grown.values()) == pytest.approx([1 / (1 - 0.094)] * len(grown), rel=0.01)


@pytest.mark.parametrize("name", ["s", "m", "l"])
def test_each_split_holds_what_its_stage_needs(name):
    for stage, domains in count_repetitions(RECIPES[name].build()).items():
        for domain, repetition in domains.items():
            assert repetition.epochs <= (8 if stage in ("sft", "qat") else 4), (stage, domain)


def test_held_out_is_capped_in_tokens():
    config = RECIPES["l"].build().data
    shares = {name: choose_heldout_fraction(config, CATALOGUE[name]) for name in config.corpora}
    tokens = {name: share * estimate_tokens(CATALOGUE[name]) for name, share in shares.items()}
    assert max(tokens.values()) <= 10_000_000 * (1 + 1e-9) and shares["dclm-baseline"] < 1e-4
    assert shares["nemotron-safety"] == 0.02, "a corpus of few tokens keeps its share"


@pytest.mark.parametrize("name", ["s", "m", "l"])
def test_published_layouts_fit_80_gb_with_a_tenth_to_spare(name):
    recipe = RECIPES[name].build()
    assert settle(recipe).expert_ranks == 1 and recipe.cluster.machine.card.memory == 80e9
    peaks = {stage: estimate.peak for stage, estimate in estimate_stages(recipe).items()}
    assert max(peaks.values()) < 72e9, peaks


def test_a_layout_that_does_not_fit_is_refused_with_the_nearest_that_does():
    recipe = RECIPES["l"].build()
    plain = change(change(recipe, "parallel.activation_checkpoint", "none"), "parallel.compile", False)
    (problem,) = [problem for problem in find_problems(plain) if problem.field == "cluster.gpu_memory"]
    assert "stage pretrain needs about" in problem.rule and "may take 72.0 GB" in problem.rule
    assert "--parallel.activation-checkpoint selective fits with 37.9 GB" in problem.way_out
    small = change(recipe, "cluster.gpu_memory", 20_000_000_000)
    assert settle(small).activation_checkpoint == "full" and not list(find_memory_problems(small))
    small = change(small, "parallel.activation_checkpoint", "selective")
    nearest = find_nearest_layout(small)
    assert nearest.describe_changes(small) == ["--parallel.activation-checkpoint full"]
    fitting = replace(small, parallel=nearest.parallel, stages=nearest.stages)
    assert not [problem for problem in find_problems(fitting) if problem.field == "cluster.gpu_memory"]
    (problem,) = find_memory_problems(change(recipe, "cluster.gpu_memory", 2_000_000_000))
    assert "no layout on as many GPUs fits" in problem.way_out
    assert not list(find_memory_problems(change(change(small, "cluster.gpus_per_worker", 0), "cluster.gpu_memory", 1)))


def test_more_epochs_than_allowed_are_refused_until_they_are_allowed():
    recipe = RECIPES["l"].build()
    paper = change(recipe, "stages.sft.mixture", published_stages()["sft"].mixture)
    (problem,) = find_epoch_problems(paper)
    assert problem.field == "data.max_epochs.sft" and "stage sft takes 11.84B tokens of safety" in problem.rule
    share = float(problem.way_out.split("lower the share to ")[1].split(",")[0])
    mixture = published_stages()["sft"].mixture | {"safety": share}
    assert 0.8 * 8 < count_repetitions(change(recipe, "stages.sft.mixture", mixture))["sft"]["safety"].epochs <= 8
    allowed = int(problem.way_out.split("--data.max-epochs.sft ")[1])
    assert not list(find_epoch_problems(change(paper, "data.max_epochs", recipe.data.max_epochs | {"sft": allowed})))
    fewer = change(paper, "data.max_epochs", recipe.data.max_epochs | {"sft": allowed - 1})
    assert len(list(find_epoch_problems(fewer))) == 1
    nothing = change(recipe, "data.midtrain_fraction", recipe.data.midtrain_fraction | {"web": 0.0})
    (problem,) = find_epoch_problems(nothing)
    assert "inf epochs" in problem.rule and "change data.midtrain_fraction.web" in problem.way_out


@pytest.mark.parametrize("name", ["smoke", "hour"])
def test_corpora_of_unknown_size_refuse_nothing(name):
    recipe = RECIPES[name].build()
    repetitions = [r for domains in count_repetitions(recipe).values() for r in domains.values()]
    assert repetitions and {repetition.epochs for repetition in repetitions} == {None}
    assert not list(find_epoch_problems(recipe))


REFUSALS = [
    ("model.top_k", 17, "model.top_k", "at most 16"),
    ("model.n_kv_heads", 3, "model.n_kv_heads", "1, 2, 4"),
    ("model.head_dim", 31, "model.head_dim", "even"),
    ("model.n_experts", 0, "model.n_experts", "above 0"),
    ("model.shared_hidden", 0, "model.shared_hidden", "the released format has a shared expert"),
    ("model.shared_hidden", -64, "model.shared_hidden", "must not be negative"),
    ("stages.sft.benchmark_interval", 30, "stages.sft.benchmark_interval", "must be a multiple of"),
    ("evaluation.benchmarks", ("pica",), "evaluation.benchmarks", "is no benchmark of the suite foundational"),
    ("evaluation", EvaluationConfig("advanced", ("gpqa",)), "evaluation.benchmarks", "has no items in a registry"),
    ("evaluation.quick_benchmarks", ("pica",), "evaluation.quick_benchmarks", "is no benchmark of the suite"),
    ("evaluation.suite", "advanced", "evaluation.run_generated_code", "run code that the model writes"),
    ("evaluation.items_folder", "/nowhere", "evaluation.items_folder", "is no folder"),
    ("stages.sft.checkpoints_kept", 1, "stages.sft.checkpoints_kept", "2 to"),
    ("stages.sft.checkpoint_interval", 0, "stages.sft.checkpoint_interval", "no checkpoint before the last step"),
    ("stages.sft.checkpoint_minutes", -1.0, "stages.sft.checkpoint_minutes", "0 to"),
    ("parallel.expert_parallel", 3, "parallel.expert_parallel", "1, 2, 4, 8, 16"),
    ("parallel.expert_parallel", 4, "parallel.expert_parallel", "the 2 ranks of a replica"),
    ("parallel.data_parallel_replicate", 3, "parallel.world_size", "x data_parallel_replicate x"),
    ("parallel.tensor_parallel", 4, "parallel.tensor_parallel", "model.n_kv_heads = 2"),
    ("parallel.tensor_parallel", 2, "parallel.tensor_parallel", "stages.qat.quantize rounds whole tokens"),
    ("stages.qat.distillation_weight", 1.5, "stages.qat.distillation_weight", "between 0 and 1"),
    ("stages.sft.distillation_weight", 0.5, "stages.sft.distillation_weight", "only the stage that quantizes"),
    ("parallel.pipeline_parallel", 4, "parallel.world_size", "multiple of pipeline_parallel x"),
    ("parallel.pipeline_parallel", 2, "parallel.expert_parallel", "the 1 ranks of a replica"),
    ("parallel.pipeline_parallel", 8, "parallel.pipeline_parallel", "each needs a layer; set it to at most 4"),
    ("parallel.context_parallel", 0, "parallel.context_parallel", "above 0"),
    ("stages.pretrain.mixture", {"web": 0.5, "math": 0.4}, "stages.pretrain.mixture", "+0.1"),
    ("stages.pretrain.mixture", {"web": 1.5, "math": -0.5}, "stages.pretrain.mixture.math", "between 0 and 1"),
    ("stages.sft.mixture", {"chat": 0.5, "safety": 0.5}, "stages.sft.mixture.safety", "add a corpus"),
    ("stages.midtrain.seq_len", 2048, "stages.midtrain.seq_len", "model.max_seq_len = 1024"),
    ("stages.midtrain.seq_len", 128, "stages.midtrain.seq_len", "at least 256"),
    ("stages.pretrain.global_batch_size", 12, "stages.pretrain.global_batch_size", "set it to 16"),
    ("stages.sft.steps", 0, "stages.sft.steps", "above 0"),
    ("stages.sft.heldout_batches", 0, "stages.sft.heldout_batches", "above 0"),
    ("stages.sft.warmup_steps", 60, "stages.sft.warmup_steps", "below stages.sft.steps = 40"),
    ("stages.sft.decay_fraction", 0.01, "stages.sft.decay_fraction", "leaves no step of 40 to decay in; set 0.025"),
    ("stages.sft.decay_fraction", 0.95, "stages.sft.decay_fraction", "warm-up (4) and decay (38) are more than the 40"),
    ("stages.sft.decay_fraction", 1.5, "stages.sft.decay_fraction", "0.001 to 1"),
    ("stages.pretrain.capacity_factor", 0.5, "stages.pretrain.capacity_factor", "set 1.5"),
    ("stages.pretrain.skip_spikes_sigma", 0.0, "stages.pretrain.skip_spikes_sigma", "set 6"),
    ("stages.sft.shards", "chat", "stages.sft.shards", "pretrain, midtrain or sft"),
    ("stages.qat.quantize", False, "stages.qat.quantize", "set it to True"),
    ("stages.sft.quantize", True, "stages.sft.quantize", "set it to False"),
    ("quantization.group_size", 48, "quantization.group_size", "divisor of 64"),
    ("quantization.group_size", 24, "quantization.group_size", "model.d_model = 128"),
    ("quantization.expert_group_size", 128, "quantization.expert_group_size", "model.expert_hidden = 64"),
    ("quantization.expert_group_axis", "rows", "quantization.expert_group_axis", "choose in or out"),
    ("data.tokenizer.train_vocab_size", 8192, "data.tokenizer.train_vocab_size", "--model.vocab-size 8192"),
    ("data.heldout_fraction", 0.0, "data", "data.heldout_fraction = 0.0"),
    ("data.corpora", ("c5",), "data", "c4-sample"),
    ("evaluation.suite", "everything", "evaluation.suite", "foundational"),
    ("evaluation.limit", 0, "evaluation.limit", "leave it out"),
    ("cluster.cpus_per_worker", 0, "cluster.cpus_per_worker", "positive"),
    ("cluster.gpus_per_worker", 2, "cluster.gpus_per_worker", "0 or 1"),
    ("stages.pretrain.float8", True, "parallel.precision", "set bfloat16"),
    ("stages.qat.float8", True, "stages.qat.float8", "INT4 and INT8"),
    ("cluster.gpu_memory", 0, "cluster.gpu_memory", "positive"),
    ("cluster.gpu", "V100", "cluster.gpu", "A100, H100, H200"),
    ("cluster.network_gbits", 0.0, "cluster.network_gbits", "positive"),
    ("cluster.max_failures", -1, "cluster.max_failures", "0 for no restart"),
    ("cluster.hang_minutes", -0.5, "cluster.hang_minutes", "0"),
    ("cluster.shard_cache.folder", "caches/shards", "cluster.shard_cache.folder", "begin with /"),
    ("cluster.shard_cache.folder", "/dev/null/shards", "cluster.shard_cache.folder", "name another folder"),
    ("cluster.shard_cache.size_bytes", 0, "cluster.shard_cache.size_bytes", "above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "field", "words"), REFUSALS)
def test_refusal_names_field_and_way_out(smoke, path, value, field, words):
    problems = [problem for problem in find_problems(change(smoke, path, value)) if problem.field == field]
    assert any(words in str(problem) for problem in problems), list(find_problems(change(smoke, path, value)))


@pytest.fixture
def in_a_pipeline(smoke):
    return replace(smoke, parallel=ParallelConfig(world_size=2, pipeline_parallel=2, precision="float32"))


def test_smoke_in_a_pipeline_validates(in_a_pipeline):
    assert list(find_problems(in_a_pipeline)) == []


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"stages.pretrain.local_batch_size": 8}, "stages.pretrain.global_batch_size", "set it to at least 16"),
        (
            {"parallel.pipeline_schedule": "Interleaved1F1B", "stages.sft.global_batch_size": 20},
            "stages.sft.global_batch_size",
            "makes 5 micro-batches, which Interleaved1F1B cannot take in 2 equal rounds",
        ),
        (
            {"parallel.pipeline_schedule": "Interleaved1F1B", "model.n_layers": 3},
            "parallel.pipeline_parallel",
            "most 1",
        ),
        ({"stages.qat.distillation_weight": 0.5}, "parallel.pipeline_parallel", "a teacher is not split"),
    ],
)
def test_refusals_of_a_pipeline(in_a_pipeline, changes, field, words):
    recipe = in_a_pipeline
    for path, value in changes.items():
        recipe = change(recipe, path, value)
    problems = list(find_problems(recipe))
    assert [problem.field for problem in problems] == [field] and words in str(problems[0]), problems


def test_all_problems_come_in_one_error(smoke):
    broken = change(change(change(smoke, "model.top_k", 99), "stages.sft.steps", 0), "evaluation.suite", "x")
    with pytest.raises(InvalidRecipe) as refused:
        validate_recipe(broken)
    fields = {problem.field for problem in refused.value.problems}
    assert {"model.top_k", "stages.sft.steps", "evaluation.suite"} <= fields
    assert all(field in str(refused.value) for field in fields)


def test_tokenizer_size_counts_added_tokens(llama3_tokenizer):
    assert read_tokenizer_size(llama3_tokenizer) == read_tokenizer_size(llama3_tokenizer.parent) == 128_256


def test_tokenizer_that_is_none_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path.*no Hugging Face tokenizer"):
        read_tokenizer_size(tmp_path)


NEW = dict.fromkeys(STEPS, "run")
"""Actions of a run of which nothing is there."""


def test_disk_check_refuses_with_numbers(smoke, tmp_path, monkeypatch):
    check_disk(smoke, tmp_path / "not" / "there", NEW)
    huge = replace(smoke, model=dataclasses.replace(FLAVORS["L"], n_layers=100_000))
    with pytest.raises(ValueError, match=r"still needs about [\d,]+\.\d\d GB .* free; give --out"):
        check_disk(huge, tmp_path / "run", NEW)
    assert not (tmp_path / "run").exists()


def test_checkpoints_for_good_count_in_the_disk_and_save_time_no_benchmarks(smoke):
    stage = smoke.stages.sft
    tokens = stage.seq_len * stage.global_batch_size
    kept = replace(stage, checkpoint_permanent_tokens=10.0 * tokens, checkpoints_kept=3)
    assert (stage.steps, count_checkpoints(kept), count_checkpoints(stage)) == (40, 3 + 4, 2)
    by_time = replace(stage, checkpoint_interval=0, checkpoint_minutes=10, benchmark_interval=20)
    with pytest.raises(RefusedInput, match=r"benchmark_interval = 20: scores checkpoints of known steps"):
        validate_recipe(replace(smoke, stages=replace(smoke.stages, sft=by_time)))


def test_disk_check_counts_what_is_still_to_be_written(smoke, tmp_path, monkeypatch):
    whole, looked = estimate_disk(smoke), []

    def measure(folder):
        looked.append(str(folder.relative_to(tmp_path)))
        return measure_folder(folder)

    monkeypatch.setattr("pipelines.preflight.measure_folder", measure)
    monkeypatch.setattr("pipelines.preflight.shutil.disk_usage", lambda path: SimpleNamespace(free=whole.total - 1000))
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "shard").write_bytes(b"x" * 1000)
    # Where the data is done anew, the former work stays beside it.
    for action in ("run", "redo"):
        assert estimate_left(smoke, tmp_path, NEW | {"data": action}) == whole
    with pytest.raises(ValueError, match="free"):
        check_disk(smoke, tmp_path, NEW)
    assert looked == []
    check_disk(smoke, tmp_path, NEW | {"data": "resume"})
    assert looked == ["data.partial"]
    left = estimate_left(smoke, tmp_path, NEW | {"data": "skip", "pretrain": "skip", "midtrain": "resume"})
    assert left.data == 0 and left.checkpoints == pytest.approx(whole.checkpoints * 3 / 4)
    assert looked[1:] == ["stages/2_midtrain/checkpoint"]


def test_workers_and_other_options_that_change_no_bytes_ask_for_no_room_again(smoke, tmp_path):
    """A finished data step counts as finished, whatever the number of its workers."""
    manifest, inputs = Manifest(tmp_path), {}
    for step in build_steps(Context(smoke, tmp_path, None, print), PACKAGE)[:4]:
        manifest.start(step.name, {
            "version": step.version, "config": step.config, "inputs": {name: inputs[name] for name in step.needs},
            "fingerprint": fingerprint(step, {name: inputs[name] for name in step.needs}),
        })  # fmt: skip
        inputs[step.name] = f"identity of {step.name}"
        manifest.finish(step.name, "done", identity=inputs[step.name])
        for output in step.outputs:
            (tmp_path / output).mkdir(parents=True)
    other = replace(smoke, data=replace(smoke.data, workers=512))
    for recipe, expected in ((smoke, "skip"), (other, "skip"), (replace(smoke, seed=1), "redo")):
        actions = plan_actions(
            build_steps(Context(recipe, tmp_path, None, print), PACKAGE), tmp_path, Manifest(tmp_path)
        )
        assert actions["data"] == expected and actions["midtrain"] == "run"


def test_recipe_as_dict_is_json_ready(smoke):
    tree = to_dict(smoke)
    assert tree["data"]["corpora"] == list(smoke.data.corpora)
    assert tree["quantization"] == {"group_size": 32, "expert_group_axis": "in", "expert_group_size": None}


@pytest.mark.parametrize("name", ["s", "m", "l"])
def test_published_recipes_name_the_catalogue_but_for_non_commercial_sets(name):
    config = RECIPES[name].build().data
    left_out = {corpus.name for corpus in OPEN_CORPORA} - set(config.corpora)
    assert left_out == {"natural-reasoning", "tulu-3", "wildguardmix"}
    assert config.commercial_only
    assert all(corpus in RECIPES[name].needs for corpus in config.corpora)
    with pytest.raises(ValueError, match=r"natural-reasoning.*non-commercial"):
        validate_config(replace(config, corpora=(*config.corpora, "natural-reasoning")))
    # The web alone is 22.6 TB of text, of which compressed copies and shards lie on disk at once.
    assert 40e12 < estimate_bytes(config) < 60e12


@pytest.mark.parametrize(
    ("name", "gib"),
    # domains of the text stages x sections of 8 ranks x 6 shards of 64 MiB; sft has 7 domains
    [("s", 7 * 4 * 6 / 16), ("m", 7 * 2 * 6 / 16), ("l", 7 * 1 * 6 / 16)],
)
def test_a_cache_below_what_a_node_holds_is_refused_with_the_bytes(name, gib):
    enough = change(RECIPES[name].build(), "cluster.shard_cache.size_bytes", int(gib * 2**30))
    field = "cluster.shard_cache.size_bytes"
    assert [problem for problem in find_problems(enough) if problem.field == field] == []
    (problem,) = (p for p in find_problems(change(enough, field, int(gib * 2**30) - 1)) if p.field == field)
    assert f"take up to {int(gib * 2**30)};" in str(problem)
