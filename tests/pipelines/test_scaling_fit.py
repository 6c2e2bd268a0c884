"""Fitting the law: known coefficients come back, Chinchilla's too, and a degenerate sweep is refused."""

import csv
import json

import numpy as np
import pytest
from scipy.optimize import check_grad

from core.errors import RefusedInput
from pipelines.cli import main
from pipelines.scaling.fit import (
    GRID,
    HUBER_DELTA,
    build_design,
    evaluate_fit,
    fit_law,
    list_starts,
)
from pipelines.scaling.law import PUBLISHED, load_law
from pipelines.scaling.points import Point, read_points

NOISE = 2e-3
"""Standard deviation of log loss: two runs of one recipe with other seeds differ by about as much."""


def draw_points(number, seed, noise=NOISE, law=PUBLISHED.coefficients.predict_loss):
    rng = np.random.default_rng(seed)
    grid = [
        (n, d, e) for n in (0.1e9, 0.3e9, 0.9e9, 2e9) for d in (20e9, 60e9, 200e9, 600e9) for e in (1, 2, 4, 8, 16, 32)
    ]
    chosen = [grid[index % len(grid)] for index in range(number)]
    return [Point(n, d, e, float(law(n, d, e)) * float(np.exp(noise * rng.standard_normal()))) for n, d, e in chosen]


def test_the_gradient_is_that_of_the_loss():
    design = build_design(draw_points(30, 0), with_experts=True)
    for start in list_starts(5, with_experts=True):
        error = check_grad(lambda t: evaluate_fit(t, design)[0], lambda t: evaluate_fit(t, design)[1], start)
        assert error < 1e-4 * np.linalg.norm(evaluate_fit(start, design)[1])


def test_the_loss_is_the_sum_of_huber_losses_of_log_residuals():
    points = draw_points(12, 0)
    design = build_design(points, with_experts=True)
    theta = list_starts(3, with_experts=True)[1]
    names = list(GRID)
    value = dict(zip(names, theta, strict=True))
    expected = 0.0
    for point in points:
        e = float(1 / (1 / (point.experts - 1 + 1 / (1 - 1 / 32)) + 1 / 32))
        n, d = point.active / 1e9, point.tokens / 1e9
        loss = (
            np.exp(value["log A"]) * e ** value["delta"] * n ** (value["alpha"] + value["gamma"] * np.log(e))
            + np.exp(value["log B"]) * e ** value["omega"] * d ** (value["beta"] + value["zeta"] * np.log(e))
            + np.exp(value["log c"])
        )
        residual = abs(np.log(loss) - np.log(point.loss))
        small = residual <= HUBER_DELTA
        expected += 0.5 * residual**2 if small else HUBER_DELTA * (residual - HUBER_DELTA / 2)
    assert evaluate_fit(theta, design)[0] * HUBER_DELTA**2 == pytest.approx(expected, rel=1e-9)


def test_points_without_noise_give_the_coefficients_back():
    points = draw_points(96, 0, noise=0)
    found = fit_law(points, num_starts=100, num_draws=0)
    for name, value in vars(PUBLISHED.coefficients).items():
        assert getattr(found.law.coefficients, name) == pytest.approx(value, rel=2e-3), name
    assert found.law.rmse < 1e-6 and found.form == "joint"


def test_noisy_points_come_back_within_the_noise_and_the_coefficients_within_their_intervals():
    covered = dict.fromkeys(vars(PUBLISHED.coefficients), 0)
    draws = 5
    for seed in range(draws):
        points = draw_points(96, seed)
        found = fit_law(points, num_starts=10, num_draws=40)
        assert np.std(found.residuals) == pytest.approx(NOISE, rel=0.25)
        truth = np.log(
            PUBLISHED.coefficients.predict_loss(
                [p.active for p in points], [p.tokens for p in points], [p.experts for p in points]
            )
        )
        design = build_design(points, with_experts=True)
        coefficients = found.law.coefficients
        predicted = np.log(
            coefficients.predict_loss(
                [p.active for p in points], [p.tokens for p in points], [p.experts for p in points]
            )
        )
        assert np.sqrt(np.mean((predicted - truth) ** 2)) < 2 * NOISE * np.sqrt(9 / 96)
        assert len(design.log_loss_P) == 96
        for name, (low, high) in found.intervals.items():
            covered[name] += low <= getattr(PUBLISHED.coefficients, name) <= high
    assert all(count >= draws - 2 for count in covered.values()), covered


def test_outliers_pull_little():
    points = draw_points(96, 1)
    spoiled = [Point(p.active, p.tokens, p.experts, p.loss * (1.2 if i % 20 == 0 else 1)) for i, p in enumerate(points)]
    found = fit_law(spoiled, num_starts=50, num_draws=0).law.coefficients
    clean = fit_law(points, num_starts=50, num_draws=0).law.coefficients
    at = (0.5e9, 200e9, 8)
    assert float(found.predict_loss(*at)) == pytest.approx(float(clean.predict_loss(*at)), rel=2e-3)


CHINCHILLA = {"c": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
"""Coefficients of the replication of Chinchilla's fit (arXiv 2404.10102), with N and D as plain numbers."""


def test_chinchillas_coefficients_come_back_from_points_of_one_number_of_experts():
    rng = np.random.default_rng(0)

    def measure(n, d):
        size, data = CHINCHILLA["A"] / n ** CHINCHILLA["alpha"], CHINCHILLA["B"] / d ** CHINCHILLA["beta"]
        return (CHINCHILLA["c"] + size + data) * np.exp(1e-4 * rng.standard_normal())

    points = [Point(n, d, 1, measure(n, d)) for n in np.geomspace(5e7, 1.6e10, 9) for d in np.geomspace(2e9, 5e11, 8)]
    found = fit_law(points, num_starts=100, num_draws=40)
    assert found.form == "chinchilla" and set(found.intervals) == {"A", "alpha", "B", "beta", "c"}
    c = found.law.coefficients
    assert c.alpha == pytest.approx(-CHINCHILLA["alpha"], abs=0.01)
    assert c.beta == pytest.approx(-CHINCHILLA["beta"], abs=0.01)
    assert c.c == pytest.approx(CHINCHILLA["c"], abs=0.01)
    assert pytest.approx(CHINCHILLA["A"] * 1e9 ** -CHINCHILLA["alpha"], rel=0.05) == c.A
    assert pytest.approx(CHINCHILLA["B"] * 1e9 ** -CHINCHILLA["beta"], rel=0.05) == c.B


def test_points_held_out_and_scales_left_out_are_predicted():
    points, heldout = draw_points(96, 2), draw_points(24, 3)
    found = fit_law(points, num_starts=30, num_draws=0, heldout=heldout)
    assert found.heldout_rmse == pytest.approx(NOISE, rel=0.6)
    assert {"active = 1e+08", "tokens = 6e+11", "experts = 32"} <= set(found.left_out)
    assert all(error < 10 * NOISE for error in found.left_out.values())


DEGENERATE = [
    (lambda p: p.tokens == 20e9, "three different numbers of tokens; there are 1"),
    (lambda p: p.active == 0.3e9, "two sizes and three numbers of experts; there are 1 and 6"),
    (lambda p: p.active in (0.3e9, 0.9e9) and p.experts in (1, 2), "there are 2 and 2"),
    (lambda p: p.experts == 8 and p.active in (0.3e9, 0.9e9), "three different sizes; there are 2"),
    (lambda p: p.experts == 8 and p.active == p.tokens / 200, "points"),
]


@pytest.mark.parametrize(("keep", "missing"), DEGENERATE)
def test_a_degenerate_sweep_is_refused_with_what_is_missing(keep, missing):
    with pytest.raises(RefusedInput, match=missing):
        fit_law([point for point in draw_points(96, 0) if keep(point)], num_starts=2, num_draws=0)


def test_points_of_two_architectures_are_refused():
    points = draw_points(96, 0)
    mixed = [Point(p.active, p.tokens, p.experts, p.loss, granularity=8 if i % 2 else 16) for i, p in enumerate(points)]
    with pytest.raises(RefusedInput, match="one architecture"):
        fit_law(mixed, num_starts=2, num_draws=0)


def write_csv(path, points):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["experts", "active", "loss", "tokens", "comment"])
        writer.writerows([p.experts, p.active, p.loss, p.tokens, "x"] for p in points)


def test_csv_and_json_lines_give_the_same_points(tmp_path):
    points = draw_points(5, 0)
    write_csv(tmp_path / "a.csv", points)
    rows = [{"active": p.active, "tokens": p.tokens, "experts": p.experts, "loss": p.loss} for p in points]
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert read_points([tmp_path / "a.csv"]) == read_points([tmp_path / "b.jsonl"]) == points


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("active,tokens,experts\n1,2,3\n", "loss are missing"),
        ("active,tokens,experts,loss\n1,2,3,nan\n", "line 2, loss = 'nan'"),
        ("active,tokens,experts,loss\n1,2,3,-1\n", "must be a positive number"),
        ("active,tokens,experts,loss\n1,2,,2\n", "no value for experts"),
        ("", "are missing"),
    ],
)
def test_points_that_cannot_be_used_are_refused_with_file_and_line(tmp_path, content, message):
    file = tmp_path / "points.csv"
    file.write_text(content)
    with pytest.raises(RefusedInput, match=message) as refusal:
        read_points([file])
    assert str(file) in str(refusal.value)


def test_the_command_writes_a_law_that_solve_reads(tmp_path, capsys):
    write_csv(tmp_path / "points.csv", draw_points(96, 0))
    law = tmp_path / "law.json"
    words = ["scaling-law", "fit", str(tmp_path / "points.csv"), "--out", str(law), "--starts", "20", "--draws", "10"]
    assert main([*words, "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert fitted["form"] == "joint" and fitted["points"] == 96
    assert len(load_law(law).draws) == 10
    assert main(["scaling-law", "solve", "--memory", "3GB", "--tokens", "200B", "--law", str(law), "--json"]) == 0
    solved = json.loads(capsys.readouterr().out)
    assert solved["law"] == "fit of 96 points" and 2 < solved["best"]["loss"] < 2.5
    assert main([*words, "--starts", "0"]) == 2
