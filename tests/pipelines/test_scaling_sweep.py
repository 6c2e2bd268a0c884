"""The grids of a sweep, its branches, its estimate and its comparisons, against numbers counted by hand."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import RefusedInput
from pipelines.cli import main
from pipelines.scaling.points import Point, group_scales, read_points, select_architecture
from pipelines.scaling.sweep import results, tiny
from pipelines.scaling.sweep.estimate import count_runs_at_once, estimate_disk, estimate_sweep
from pipelines.scaling.sweep.figures import draw_sweep
from pipelines.scaling.sweep.grid import Grid, expand_sweep
from pipelines.scaling.sweep.load import load_sweep
from titan_ext.model_stats import count_parameters

TOKENS = (0.4e6, 0.8e6)


def make_sweep(*grids, checkpoint_interval=200, **changes):
    """Return the sweep `tiny` with other grids."""
    made = tiny.sweep()
    pretrain = dataclasses.replace(made.recipe.stages.pretrain, checkpoint_interval=checkpoint_interval)
    recipe = dataclasses.replace(made.recipe, stages=dataclasses.replace(made.recipe.stages, pretrain=pretrain))
    return dataclasses.replace(made, recipe=recipe, grids=grids, **changes)


def test_a_grid_is_a_product_whose_dense_model_comes_once():
    grid = Grid(d_model=(32, 64), experts=(1, 4), granularity=(1, 4), shared=(True, False), tokens=TOKENS)
    runs = expand_sweep(make_sweep(grid))
    assert sorted(run.name for run in runs) == sorted(
        f"d{width}_{rest}" for width in (32, 64) for rest in ("E1_dense", "E4_g1", "E4_g4", "E4_g4_shared")
    )
    dense = next(run for run in runs if run.name == "d32_E1_dense").model
    assert (dense.n_experts, dense.top_k, dense.expert_hidden, dense.shared_hidden, dense.route_scale) == (
        1,
        1,
        128,
        0,
        1,
    )
    assert [run.train_flops for run in runs] == sorted((run.train_flops for run in runs), reverse=True)


def test_grids_are_joined():
    runs = expand_sweep(
        make_sweep(
            Grid(d_model=(32,), experts=(4,), tokens=(0.4e6,)),
            Grid(d_model=(32,), experts=(4,), tokens=(0.8e6,), learning_rate_factors=(1.0, 2.0)),
        )
    )
    assert {run.name: [branch.tokens for branch in run.branches] for run in runs} == {
        "d32_E4_g8_shared": [400_384, 800_768], "d32_E4_g8_shared_lr2": [800_768],
    }  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([32, 64, 96]), st.sampled_from([2, 4, 8]))
def test_granularity_and_shared_expert_keep_active_and_total_parameters(width, experts):
    grid = Grid(d_model=(width,), experts=(experts,), granularity=(1, 2, 4, 8), shared=(True, False), tokens=TOKENS)
    counts = [count_parameters(run.model) for run in expand_sweep(make_sweep(grid))]
    assert len(counts) == 7
    assert len({count.active - count.router for count in counts}) == 1
    assert len({count.total - count.router for count in counts}) == 1


def test_the_rate_follows_the_rule():
    grid = Grid(d_model=(32, 64, 128), experts=(4,), tokens=TOKENS, learning_rate_factors=(1.0, 0.5))
    sweep = make_sweep(grid, learning_rate=4e-3, base_width=64, width_exponent=0.5)
    rates = {run.name: run.branches[0].stage.learning_rate for run in expand_sweep(sweep)}
    assert rates["d64_E4_g8_shared"] == pytest.approx(4e-3)
    assert rates["d32_E4_g8_shared"] == pytest.approx(4e-3 * 2**0.5)
    assert rates["d128_E4_g8_shared_lr0.5"] == pytest.approx(2e-3 / 2**0.5)


@settings(max_examples=200, deadline=None)
@given(st.integers(3, 3000), st.floats(0.05, 0.6), st.integers(1, 700))
def test_the_start_of_a_branch_is_a_checkpoint_that_is_still_there_at_its_end(steps, decay_fraction, wanted):
    grid = Grid(d_model=(32,), experts=(1,), tokens=(1024.0 * steps,))
    sweep = make_sweep(grid, decay_fraction=decay_fraction, checkpoint_interval=wanted)
    sweep = without_warmup(sweep)
    ((branch,),) = (run.branches for run in expand_sweep(sweep))
    stage = branch.stage
    assert stage.steps == steps and branch.tokens == 1024 * steps
    assert stage.checkpoint_interval <= wanted
    assert round(stage.steps * stage.decay_fraction) == stage.steps - branch.start, "as torchtitan rounds"
    saved = [step for step in range(1, steps + 1) if step % stage.checkpoint_interval == 0 or step == steps]
    assert branch.start in saved[-stage.checkpoints_kept :]


def without_warmup(sweep):
    pretrain = dataclasses.replace(sweep.recipe.stages.pretrain, warmup_steps=0)
    recipe = dataclasses.replace(sweep.recipe, stages=dataclasses.replace(sweep.recipe.stages, pretrain=pretrain))
    return dataclasses.replace(sweep, recipe=recipe)


def test_a_plateau_is_trained_once():
    (run,) = expand_sweep(make_sweep(Grid(d_model=(32,), experts=(1,), tokens=(0.4e6, 0.8e6, 1.6e6))))
    trained, done = 0, 0
    for branch in run.branches:
        trained += branch.stage.steps - done
        done = branch.start
    assert run.trained_tokens == trained * 1024
    assert run.trained_tokens < 0.7 * sum(branch.tokens for branch in run.branches)
    assert run.train_flops == 6 * count_parameters(run.model).active * trained * 1024


@pytest.mark.parametrize(
    ("grid", "changes", "message"),
    [
        ({"experts": ()}, {}, "grids[0].experts = []"),
        ({"tokens": (0.0,)}, {}, "grids[0].tokens = [0.0]: must be above 0"),
        ({"tokens": (float("nan"),)}, {}, "grids[0].tokens = [nan]: must be above 0 and finite"),
        ({"d_model": (32.0,)}, {}, "grids[0].d_model = [32.0]: must be a list of whole numbers"),
        ({"experts": (True,)}, {}, "grids[0].experts = [True]: must be a list of whole numbers"),
        ({"shared": (1,)}, {}, "grids[0].shared = [1]: must be a list of true or false"),
        ({"tokens": (1e4,)}, {}, "no plateau is left"),
        ({"tokens": (0.4e6, 0.4001e6)}, {}, "too close"),
        ({"d_model": (40,)}, {}, "must be a multiple of head_dim = 16"),
        ({"granularity": (3,)}, {}, "granularity = 3"),
        ({}, {"decay_fraction": 1.0}, "decay_fraction = 1.0"),
        ({}, {"learning_rate": float("nan")}, "learning_rate = nan"),
        ({}, {"base_width": 0}, "base_width = 0: must be above 0"),
        ({}, {"width_exponent": float("nan")}, "width_exponent = nan"),
        ({"d_model": (48,)}, {}, "n_kv_heads"),
    ],
)
def test_a_grid_that_no_model_has_is_refused(grid, changes, message):
    plain = {"d_model": (32,), "experts": (4,), "tokens": TOKENS}
    with pytest.raises(RefusedInput) as refusal:
        expand_sweep(make_sweep(Grid(**plain | grid), **changes))
    assert message in str(refusal.value)


def test_a_sweep_without_grids_is_refused():
    with pytest.raises(RefusedInput, match="no grid"):
        expand_sweep(make_sweep())


SWEEP = {
    "recipe": "tiny", "learning_rate": 0.005, "base_width": 64,
    "grids": [{"d_model": [32], "experts": [1, 4], "tokens": [4e5], "shared": [True]}],
}  # fmt: skip


def test_a_json_file_is_the_same_sweep(tmp_path):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(SWEEP))
    made = load_sweep(str(file))
    assert made == make_sweep(Grid(d_model=(32,), experts=(1, 4), tokens=(4e5,)), learning_rate=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": []}, "has no field grid"),
        ({"learning_rate": None}, "learning_rate = None: must be a number"),
        ({"grids": [{"d_model": [32], "experts": [1]}]}, "grids[0]: lacks tokens"),
        ({"grids": [{**SWEEP["grids"][0], "tokens": 4e5}]}, "grids[0].tokens = 400000.0: must be a list"),
        ({"grids": {}}, "grids: must be a list"),
        ({"recipe": "huge"}, "recipe = 'huge': give smoke, hour, s, m, l, tiny, published"),
    ],
)
def test_a_json_file_that_gives_no_sweep_is_refused(change, message, tmp_path):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(SWEEP | change))
    with pytest.raises(RefusedInput) as refusal:
        load_sweep(str(file))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["huge"], "sweep 'huge': give tiny, published"),
        (["absent.json"], "absent.json: cannot be read as JSON"),
        (["absent.py"], "sweep absent.py: no such file"),
        (["tiny"], "--out: name a folder"),
        (["tiny", "--estimate", "--rate", "fast"], "--rate 'fast'"),
        (["tiny", "--out", "sweep", "--runs-at-once", "0"], "--runs-at-once 0"),
    ],
)
def test_what_cannot_start_is_refused(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["scaling-law", "sweep", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_python_file_gives_a_sweep(tmp_path, capsys):
    file = tmp_path / "my.py"
    file.write_text("from pipelines.scaling.sweep import tiny\n\n\ndef sweep():\n    return tiny.sweep()\n")
    assert load_sweep(str(file)) == tiny.sweep()
    file.write_text("def sweep():\n    return 1\n")
    with pytest.raises(RefusedInput, match="returned a int, not a Sweep"):
        load_sweep(str(file))


def test_the_estimate_of_the_published_sweep(capsys):
    assert main(["scaling-law", "sweep", "published", "--estimate", "--json", "--rate", "100T"]) == 0
    found = json.loads(capsys.readouterr().out)
    # 3 sizes x 6 numbers of experts, and at 0.5B and E = 8 the eight architectures besides the one in both grids.
    assert (found["runs"], found["points"]) == (26, 130)
    assert found["tokens_without_branches"] == pytest.approx(26 * 1.5e12, rel=1e-3)
    # Once to 80% of 500B, and 20% of 100B, ..., 500B.
    assert found["tokens"] == pytest.approx(26 * (0.8 * 500e9 + 0.2 * 1500e9), rel=1e-3)
    assert found["rank_hours"] == pytest.approx(found["train_flops"] / 100e12 / 3600, rel=1e-6)
    assert found["hours"] == pytest.approx(found["rank_hours"] / 64, rel=1e-6)


def test_an_estimate_uses_what_was_measured():
    runs = expand_sweep(make_sweep(Grid(d_model=(32, 64), experts=(4,), tokens=TOKENS)))
    recipe, done = tiny.build_recipe(), Point(active=1e6, tokens=1e6, experts=4, loss=5.0, step_seconds=0.5)
    found = estimate_sweep(recipe, runs, rate=None, runs_at_once=2, finished=[done])
    assert found.flops_per_rank == pytest.approx(6 * 1e6 * 1024 / 0.5)
    longest = max(run.train_flops for run in runs)
    seconds = max(sum(run.train_flops for run in runs) / 2, longest) / found.flops_per_rank
    assert found.hours == pytest.approx(seconds / 3600)
    (small, large) = sorted(count_parameters(run.model).total for run in runs)
    kept = max(branch.stage.checkpoints_kept for branch in runs[0].branches)
    assert estimate_disk(runs) == 16 * (small + large) * (2 + kept)


@pytest.mark.parametrize(
    ("world", "gpus", "cpus", "at_once"), [(1, 0, 8, 8), (4, 0, 8, 2), (4, 1, 64, 2), (64, 1, 64, 1)]
)
def test_runs_side_by_side_are_those_that_fit(world, gpus, cpus, at_once):
    recipe = tiny.build_recipe()
    recipe = dataclasses.replace(
        recipe,
        parallel=dataclasses.replace(recipe.parallel, world_size=world),
        cluster=dataclasses.replace(recipe.cluster, gpus_per_worker=gpus),
    )
    assert count_runs_at_once(recipe, cpus, 8) == at_once


def make_points(predict, widths=(32, 64, 96), experts=(1, 4, 8), tokens=(0.4e6, 0.8e6, 1.6e6)):
    """Return the points of a grid of granularity 8 with a shared expert, with losses by `predict`."""
    grid = Grid(d_model=widths, experts=experts, tokens=tokens)
    points = []
    for run in expand_sweep(make_sweep(grid)):
        count = count_parameters(run.model)
        for branch in run.branches:
            loss = predict(count.active, branch.tokens, run.experts)
            points.append(
                Point(
                    active=count.active, tokens=branch.tokens, experts=run.experts, loss=loss, total=count.total,
                    granularity=run.granularity, shared_expert=run.shared, learning_rate_factor=1.0, name=run.name,
                    train_flops=6.0 * count.active * branch.tokens, step_seconds=0.1,
                )
            )  # fmt: skip
    return points


def a_law(active, tokens, experts):
    return 2.0 + 0.9 * (active / 1e5) ** -0.3 * experts**-0.1 + 1.5 * (tokens / 1e6) ** -0.4


def test_points_come_back_from_their_file(tmp_path):
    points = make_points(a_law)
    results.write_points(points, tmp_path)
    found = read_points([tmp_path / "points.csv"])
    assert found == points
    assert results.name_architecture(found[0].granularity, found[0].shared_expert) == "g8_shared"
    (tmp_path / "half.csv").write_text("active,tokens,experts,loss,granularity\n1e6,1e6,4,5.0,2.5\n")
    with pytest.raises(RefusedInput, match=r"line 2, granularity = '2\.5': must be a whole number"):
        read_points([tmp_path / "half.csv"])


def test_experts_are_compared_with_dense_at_equal_compute_and_memory():
    points = make_points(a_law)
    equal = {(c.point.name, c.point.tokens): c.difference for c in results.compare_with_dense(points)}
    assert len(equal) == 18
    sparse, dense = (
        next(p for p in points if p.name == f"d64_{n}" and p.tokens > 1e6) for n in ("E8_g8_shared", "E1_dense")
    )
    assert equal["d64_E8_g8_shared", sparse.tokens] == pytest.approx(sparse.loss - dense.loss)
    found = {(c.point.name, c.point.tokens): c.difference for c in results.compare_at_equal_memory(points)}
    # Dense models have 0.10M, 0.25M and 0.47M parameters: of the others only these have a total within that range.
    assert {name for name, _ in found} == {"d32_E4_g8_shared", "d32_E8_g8_shared"}
    for (name, tokens), difference in found.items():
        point = next(p for p in points if (p.name, p.tokens) == (name, tokens))
        assert difference == pytest.approx(point.loss - a_law(point.total, tokens, 1), abs=0.02)


def test_architectures_and_rates_are_compared_with_their_own_kind():
    one = Point(active=1e5, tokens=1e6, experts=4, loss=5.0, granularity=1, shared_expert=False, name="d32_E4_g1")
    fine = dataclasses.replace(one, loss=4.9, granularity=8, shared_expert=True, name="d32_E4_g8_shared")
    fast = dataclasses.replace(fine, loss=5.2, learning_rate_factor=2.0, name="d32_E4_g8_shared_lr2")
    (difference,) = results.compare_architectures([one, fine, fast])
    assert (difference.point, difference.other) == (fine, "g1") and difference.difference == pytest.approx(-0.1)
    (difference,) = results.compare_learning_rates([one, fine, fast])
    assert difference.point == fast and difference.difference == pytest.approx(0.3)


def test_every_architecture_is_fitted_with_the_dense_models_and_drawn(tmp_path):
    points = make_points(a_law)
    fits = results.fit_architectures(points, num_starts=60, num_draws=4)
    assert set(fits) == {"dense", "g8_shared"} and len(fits["g8_shared"].points) == 27
    assert fits["g8_shared"].law.rmse < 0.02 and fits["dense"].law.rmse < 1e-3
    left_out = set(fits["g8_shared"].left_out)
    assert {name for name in left_out if name.startswith("experts")} == {f"experts = {e}" for e in (1, 4, 8)}
    assert len([name for name in left_out if name.startswith("active")]) == 3, "a scale is a width"
    json.dumps(results.summarize(points, fits))
    draw_sweep(points, fits, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "compute.png", "experts_g8_shared.png", "isoflop_g8_shared.png", "memory.png", "residuals_dense.png",
        "residuals_g8_shared.png",
    ]  # fmt: skip


def test_the_files_of_a_sweep_can_be_fitted_again(tmp_path, capsys):
    points = make_points(a_law)
    scan = [dataclasses.replace(point, loss=9.0, learning_rate_factor=2.0) for point in points[:3]]
    other = [dataclasses.replace(point, loss=9.0, granularity=4) for point in points if point.experts == 4]
    results.write_points([*points, *scan, *other], tmp_path)
    words = [str(tmp_path / "points.csv"), "--granularity", "8", "--starts", "40", "--draws", "4", "--json"]
    assert main(["scaling-law", "fit", *words, "--out", str(tmp_path / "law.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["points"], found["diverged"]) == (27, 0) and found["rmse"] < 0.02


def test_points_that_determine_no_law_are_said_so():
    fits = results.fit_architectures(make_points(a_law, tokens=(0.4e6, 0.8e6)), num_starts=5, num_draws=0)
    assert "three different numbers of tokens; there are 2" in fits["g8_shared"]


def test_sizes_that_differ_by_their_routers_are_one_scale():
    assert group_scales([100.0, 254.4, 262.0, 98.5, 470.0]) == [[98.5, 100.0], [254.4, 262.0], [470.0]]


def test_dense_points_belong_to_every_architecture():
    points = make_points(a_law)
    chosen = select_architecture(points, 8, True)
    assert len(chosen) == len(points) and {(p.granularity, p.shared_expert) for p in chosen} == {(8, True)}
    assert {point.experts for point in select_architecture(points, 4, True)} == {1}


def test_the_shipped_tiny_sweep_is_what_its_page_says():
    runs = expand_sweep(tiny.sweep())
    points = [(run, branch) for run in runs for branch in run.branches if run.learning_rate_factor == 1]
    assert len(points) >= 24
    assert {run.model.d_model for run, _ in points} == {32, 64, 96, 128}
    assert {run.experts for run, _ in points} == {1, 4, 8}
    assert {run.granularity for run, _ in points} == {None, 1, 4, 8}
