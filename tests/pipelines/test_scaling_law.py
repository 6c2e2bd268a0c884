"""The law: published coefficients, its reduced forms, the sizes of the design rules, and the solution for a phone."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import RefusedInput
from eval.export.sizes import int4_bytes
from pipelines.cli import main
from pipelines.recipe import to_dict
from pipelines.recipes import RECIPES
from pipelines.scaling.dimensions import build_dims, choose_layers
from pipelines.scaling.findings import compute_findings
from pipelines.scaling.law import E_MAX, PUBLISHED, count_experts, effective_experts, load_law
from pipelines.scaling.prediction import predict_run
from pipelines.scaling.sizes import parse_size
from pipelines.scaling.solve import Budget, list_candidates, solve
from titan_ext.config import FLAVORS
from titan_ext.model_stats import count_parameters, kv_cache_bytes


def predict_by_hand(n, d, experts):
    """Return the published law, written out with the printed numbers; n and d in billions."""
    e = 1 / (1 / (experts - 1 + 1 / (1 / 1 - 1 / 32)) + 1 / 32)
    of_size = 0.2388 * e**0.0906 * n ** (-0.2833 + 0.0387 * math.log(e))
    return of_size + 0.6019 * e**1.0593 * d ** (-0.3210 - 0.3684 * math.log(e)) + 1.9730


def test_the_published_law_predicts_2_2_to_2_5_nats_within_its_sweep():
    losses = PUBLISHED.coefficients.predict_loss(
        np.array([0.3e9, 0.5e9, 0.9e9])[:, None, None],
        np.array([100e9, 500e9])[:, None],
        np.array([1, 2, 4, 8, 16, 32]),
    )
    assert losses.shape == (3, 2, 6)
    assert losses[1, 0, 3] == pytest.approx(predict_by_hand(0.5, 100, 8), abs=1e-12)
    assert losses[1, 0, 3] == pytest.approx(2.3422, abs=1e-4)
    assert losses.min() > 2.25 and losses.max() < 2.45
    assert (losses[..., 1:] < losses[..., :1]).all(), "every number of experts is better than the dense model"


@given(st.floats(1, 1e6))
def test_effective_experts_start_at_1_grow_and_have_an_inverse(experts):
    e = float(effective_experts(experts))
    assert effective_experts(1) == 1
    assert 1 <= e < E_MAX
    assert float(effective_experts(experts + 1)) > e
    if experts < 1000:  # beyond that, rounding of e decides
        assert float(count_experts(e)) == pytest.approx(experts, rel=1e-6)


@pytest.mark.parametrize("wrong", [0.5, 0, -3, math.nan])
def test_fewer_than_one_expert_is_refused(wrong):
    with pytest.raises(RefusedInput, match="1 is a dense model"):
        effective_experts(wrong)


@pytest.mark.parametrize("wrong", [0.9, 32, 40])
def test_an_effective_number_that_no_model_has_is_refused(wrong):
    with pytest.raises(RefusedInput, match="not including, 32"):
        count_experts(wrong)


@given(st.floats(1e8, 1e10), st.floats(1e9, 1e13), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_a_fixed_number_of_experts_gives_chinchillas_form(active, tokens, experts):
    reduced = PUBLISHED.coefficients.fix_experts(experts)
    expected = PUBLISHED.coefficients.predict_loss(active, tokens, experts)
    assert reduced.predict_loss(active, tokens) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("flavor", ["S", "M", "L"])
def test_the_design_rules_give_the_published_dimensions(flavor):
    dims = FLAVORS[flavor]
    assert build_dims(dims.d_model, 8) == dims
    assert choose_layers(dims.d_model) == dims.n_layers


@settings(max_examples=50)
@given(
    st.sampled_from([256, 512, 768, 1024]), st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from([1, 2, 4, 8, 16]),
    st.booleans(),
)  # fmt: skip
def test_granularity_and_shared_expert_move_no_parameters_but_the_routers(d_model, experts, granularity, shared):
    if shared and granularity == 1:
        with pytest.raises(RefusedInput, match="even granularity"):
            build_dims(d_model, experts, granularity=granularity, shared=shared)
        return
    coarse = count_parameters(build_dims(d_model, experts, granularity=1, shared=False))
    dims = build_dims(d_model, experts, granularity=granularity, shared=shared)
    fine = count_parameters(dims)
    assert fine.active - fine.router == coarse.active - coarse.router
    assert fine.total - fine.router == coarse.total - coarse.router
    assert fine.router == dims.n_layers * dims.n_experts * d_model
    assert (dims.n_experts + dims.shared_hidden // dims.expert_hidden) == experts * granularity


def flavor_budget(flavor, tokens):
    dims = FLAVORS[flavor]
    return Budget(
        memory=int4_bytes(dims) + kv_cache_bytes(dims, 8192, 1), context=8192, tokens=tokens,
        decode_flops=2 * count_parameters(dims).active,
    )  # fmt: skip


@pytest.mark.parametrize(("flavor", "tokens"), [("S", 100e9), ("S", 500e9), ("M", 100e9), ("M", 200e9), ("L", 100e9)])
def test_the_budgets_of_a_flavor_give_the_flavor(flavor, tokens):
    solution = solve(PUBLISHED, flavor_budget(flavor, tokens))
    assert solution.best.dims == FLAVORS[flavor]
    assert solution.loss == pytest.approx(
        predict_by_hand(count_parameters(FLAVORS[flavor]).active / 1e9, tokens / 1e9, 8), abs=1e-9
    )
    assert "decode_flops" in solution.binds


def test_where_the_law_prefers_fewer_experts_the_difference_is_below_its_error():
    solution = solve(PUBLISHED, flavor_budget("L", 500e9))
    assert (solution.best.experts, solution.best.dims.d_model, solution.best.dims.n_layers) == (4, 1280, 32)
    eight = next(candidate for candidate in solution.by_experts if candidate.experts == 8)
    assert eight.dims == FLAVORS["L"]
    assert 0 < eight.predict_loss(PUBLISHED) - solution.loss < PUBLISHED.rmse
    assert any("does not tell them apart" in note for note in solution.notes)


def test_the_solution_is_the_best_of_all_candidates_by_brute_force():
    budget = Budget(memory=2e9, context=4096, kv_bits=16, weight_bits=4, decode_flops=1.2e9, train_flops=5e20)
    solution = solve(PUBLISHED, budget)
    best = None
    for candidate in list_candidates(budget, (1, 2, 4, 8, 16, 32), 8, True):
        dims, count = candidate.dims, count_parameters(candidate.dims)
        memory = count.total * 4 / 8 + 2 * 2 * dims.n_layers * 4 * 64 * 4096
        if memory <= 2e9 and 2 * count.active <= 1.2e9:
            tokens = 5e20 / 6 / count.active
            loss = predict_by_hand(count.active / 1e9, tokens / 1e9, candidate.experts)
            best = min(best or (loss, dims), (loss, dims), key=lambda pair: pair[0])
    assert best is not None
    assert (solution.loss, solution.best.dims) == (pytest.approx(best[0], abs=1e-9), best[1])
    assert 6 * solution.best.count.active * solution.best.tokens == pytest.approx(5e20)
    low, high = solution.interval
    assert low < solution.loss < high and high - low == pytest.approx(2 * 1.96 * 0.0076, rel=1e-6)


def test_a_limit_binds_if_the_loss_falls_without_it():
    tight = solve(PUBLISHED, Budget(memory=1e9, context=2048, train_flops=1e21))
    assert tight.binds == ("memory", "train_flops")
    assert tight.smaller_phone is not None
    memory, smaller = tight.smaller_phone
    assert memory == 0.75e9 and smaller.memory <= memory
    assert smaller.predict_loss(PUBLISHED) > tight.loss


def test_a_budget_that_nothing_fits_is_refused_with_the_nearest():
    with pytest.raises(RefusedInput, match=r"d_model 256, 6 layers, E = 1\) needs 0\.0\d+ GB"):
        solve(PUBLISHED, Budget(memory=1e7, context=100, tokens=1e9))


@pytest.mark.parametrize("wrong", [{}, {"tokens": 1e9, "train_flops": 1e20}, {"tokens": -1}, {"tokens": math.nan}])
def test_a_budget_needs_one_kind_of_training(wrong):
    with pytest.raises(RefusedInput, match="tokens"):
        Budget(memory=1e9, context=2048, **wrong)


def test_findings_are_computed_and_say_what_does_not_follow():
    follows = {finding.claim: finding.follows for finding in compute_findings()}
    assert follows["at equal active parameters and tokens, experts lower the loss"] is True
    assert follows["returns flatten at E = 8"] is True
    assert follows["the memory and active parameters of S give S"] is True
    assert follows["E = 8 is best under a phone's memory and a training compute"] is False
    assert follows["g = 16 gains less than 0.01 nats over g = 8 and costs 50% more time"] is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("3GB", 3e9), ("1.5GiB", 1.5 * 2**30), ("500B", 5e11), ("6T", 6e12), ("5e8", 5e8), ("900M", 9e8), ("64", 64)],
)
def test_sizes_are_read_as_people_write_them(text, number):
    assert parse_size(text, "--memory") == number


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "3 apples", "1.2.3", "nan", "inf", "3iB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(RefusedInput, match="--memory"):
        parse_size(text, "--memory")


def test_the_written_recipe_is_the_solution_and_can_be_loaded(tmp_path, capsys):
    from pipelines.commands.run import parse

    file = tmp_path / "phone.py"
    words = ["scaling-law", "solve", "--memory", "1GB", "--tokens", "200B", "--json", "--write-recipe", str(file)]
    assert main(words) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    recipe = parse([str(file), "--cluster.max-failures", "7"]).recipe
    assert dataclasses.asdict(recipe.model) == best["dimensions"]
    assert recipe.cluster.max_failures == 7
    stage = recipe.stages.pretrain
    assert stage.steps * stage.seq_len * stage.global_batch_size == pytest.approx(200e9, rel=1e-3)
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err


def test_solving_imports_neither_torch_nor_ray():
    code = (
        "import sys; from pipelines.cli import main; "
        "assert main(['scaling-law', 'solve', '--memory', '3GB', '--tokens', '100B']) == 0; "
        "print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_file_that_is_no_law_is_refused(tmp_path, capsys):
    (tmp_path / "law.json").write_text("[]")
    assert main(["scaling-law", "law", "--law", str(tmp_path / "law.json")]) == 2
    with pytest.raises(RefusedInput, match="not a law"):
        load_law(tmp_path / "absent.json")


def test_the_law_is_drawn(tmp_path):
    folder = tmp_path / "pictures"
    words = ["scaling-law", "law", "--active", "0.3B", "--tokens", "100B", "--figures", str(folder), "--json"]
    assert main(words) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["experts.png", "solutions.png", "tradeoffs.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in folder.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("law", "--experts", "0"), "--experts"),
        (("law", "--tokens", "many"), "--tokens 'many'"),
        (("law", "--law", "absent.json"), "--law absent.json"),
        (("law", "--figures", "/dev/null"), "--figures"),
        (("solve", "--memory", "0GB", "--tokens", "1B"), "--memory"),
        (("solve", "--memory", "3GB"), "give --train-flops or --tokens"),
        (("solve", "--memory", "3GB", "--tokens", "1B", "--context", "0"), "--context 0"),
        (("solve", "--memory", "3GB", "--tokens", "1B", "--kv-bits", "nan"), "--kv-bits nan"),
        (("solve", "--memory", "3GB", "--tokens", "1B", "--granularity", "0"), "granularity = 0"),
        (("solve", "--memory", "3GB", "--tokens", "1B", "--granularity", "7"), "granularity = 7"),
        (("solve", "--memory", "3GB", "--tokens", "1B", "--write-recipe", "x.txt"), "--write-recipe x.txt"),
        (("solve", "--memory", "3GB", "--tokens", "1B", "--write-recipe", "/proc/x.py"), "--write-recipe"),
        (("fit", "absent.csv"), "absent.csv"),
        (("fit", "absent.csv", "--out", "/dev/null"), "--out /dev/null"),
        (("sovle",), "Did you mean solve?"),
    ],
)
def test_what_the_command_cannot_use_is_refused_before_anything_is_written(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["scaling-law", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


WRONG_FILES = {
    "def recipe(:": "SyntaxError",
    "x = 1": "has no function `recipe`",
    "raise RuntimeError('broken')": "RuntimeError: broken in line 1",
    "def recipe():\n    return 1 / 0": "recipe() raised ZeroDivisionError: division by zero in line 2",
    "def recipe():\n    return 5": "returned a int",
    "recipe = 3": "has no function `recipe`",
}


@pytest.mark.parametrize("content", WRONG_FILES)
def test_a_recipe_file_that_gives_no_recipe_is_refused(content, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(content)
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 2
    assert WRONG_FILES[content] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_a_run_comes_back_with_overrides(tmp_path, capsys):
    from pipelines.commands.run import parse
    from pipelines.engine.manifest import Manifest

    recipe = dataclasses.replace(RECIPES["smoke"].build(), seed=7)
    Manifest(tmp_path).describe(recipe)
    assert parse(["--like", str(tmp_path)]).recipe == recipe
    assert parse(["--like", str(tmp_path), "--seed", "8"]).recipe == dataclasses.replace(recipe, seed=8)
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["recipe"]["model"]["wings"] = 2
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert main(["run", "--like", str(tmp_path)]) == 2
    assert "knows no field wings" in capsys.readouterr().err
    assert main(["run", "--like", str(tmp_path / "absent")]) == 2


def write_run(run, vocab_size, tokenizer, heldout=True):
    """Write what a run of the recipe `s` with 100 steps leaves after pre-training."""
    recipe = to_dict(RECIPES["s"].build())
    recipe["model"]["vocab_size"] = vocab_size
    recipe["data"]["tokenizer"]["path"] = tokenizer
    (run / "stages/1_pretrain").mkdir(parents=True)
    (run / "manifest.json").write_text(json.dumps({"recipe": recipe, "steps": {}}))
    if heldout:
        (run / "stages/1_pretrain/heldout.jsonl").write_text('{"step": 25000, "loss": 2.5}\n')


def test_the_report_shows_the_predicted_loss_beside_the_measured_one(tmp_path, capsys):
    write_run(tmp_path / "run", 128_256, "llama3")
    assert main(["report", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["scaling_law"]
    tokens = 25_000 * 2048 * 2048
    expected = predict_by_hand(count_parameters(FLAVORS["S"]).active / 1e9, tokens / 1e9, 8)
    assert found["comparable"] and found["predicted"] == pytest.approx(expected, abs=1e-9)
    assert (found["measured"], found["interval"]) == (
        2.5,
        pytest.approx([expected - 0.0149, expected + 0.0149], abs=1e-4),
    )
    page = (tmp_path / "run/report/report.md").read_text()
    assert f"predicts {expected:.4f} nats a token" in page and f"measured\\: 2.5000, {2.5 - expected:+.4f}" in page
    assert f"predicts {expected:.4f} nats a token" in (tmp_path / "run/report/report.html").read_text()


@pytest.mark.parametrize(
    ("vocab_size", "tokenizer", "reason"),
    [(4096, "llama3", "has 128,256 entries, this run"), (128_256, "", "this run trained one of its own")],
)
def test_a_run_of_another_vocabulary_gets_no_prediction(vocab_size, tokenizer, reason, tmp_path):
    write_run(tmp_path, vocab_size, tokenizer)
    found = predict_run(tmp_path)
    assert not found["comparable"] and found["predicted"] is None and reason in found["text"]


def test_a_law_of_the_same_vocabulary_predicts_a_run_of_its_own_tokenizer(tmp_path):
    write_run(tmp_path, 4096, "")
    assert predict_run(tmp_path, dataclasses.replace(PUBLISHED, vocab_size=4096))["comparable"]
    assert not predict_run(tmp_path, dataclasses.replace(PUBLISHED, vocab_size=None))["comparable"]


def test_a_run_without_a_held_out_loss_gets_no_line(tmp_path):
    write_run(tmp_path / "run", 128_256, "llama3", heldout=False)
    assert predict_run(tmp_path / "run") is None and predict_run(tmp_path) is None


def test_a_model_without_a_shared_expert_gets_no_recipe(tmp_path, capsys):
    words = ["--memory", "1GB", "--tokens", "200B", "--no-shared", "--write-recipe", str(tmp_path / "a.py")]
    assert main(["scaling-law", "solve", *words]) == 2
    assert "the released format, which has a shared expert" in capsys.readouterr().err
    assert not (tmp_path / "a.py").exists()
