"""Read the points of a sweep: one trained model each, from CSV, JSON lines or run folders."""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from core.errors import RefusedInput


@dataclass(frozen=True)
class Point:
    """One measurement of the sweep."""

    active: float
    """Active parameters, embedding included."""
    tokens: float
    """Tokens that the model was trained on."""
    experts: float
    """Coarse experts E; 1 is a dense model."""
    loss: float
    """Held-out loss in nats a token."""
    total: float | None = None
    """All parameters."""
    granularity: int | None = None
    """Fine experts in a coarse one, where the file states it."""
    shared_expert: bool | None = None
    train_flops: float | None = None
    step_seconds: float | None = None
    """Median time of an optimizer step."""
    peak_memory: float | None = None
    """Largest memory of a rank, in bytes: of its GPU, or resident on the CPU."""
    learning_rate_factor: float | None = None
    """Learning rate as a multiple of the sweep's rule."""
    name: str = ""
    """Name of the run; several tokens of one run share it."""


REQUIRED = ("active", "tokens", "experts", "loss")
FIELDS = tuple(field.name for field in fields(Point))


def read_points(paths: Iterable[Path]) -> list[Point]:
    """Read the points of all files and run folders.

    Raises:
        RefusedInput: a file cannot be read, lacks a column, or holds a value that is no positive number; names file,
            line and column.
    """
    points: list[Point] = []
    for path in paths:
        if path.is_dir():
            points.append(read_run(path))
        elif path.suffix == ".csv":
            points += _read_csv(path)
        elif path.suffix in (".jsonl", ".json"):
            points += _read_json_lines(path)
        else:
            raise RefusedInput(f"{path}: points are read from .csv, .jsonl and run folders; give one of these")
    return points


def select_architecture(points: Iterable[Point], granularity: int, shared_expert: bool) -> list[Point]:
    """Return the points of one architecture, with the dense ones, which belong to every architecture."""
    chosen = []
    for point in points:
        if point.experts == 1:
            chosen.append(replace(point, granularity=granularity, shared_expert=shared_expert))
        elif (point.granularity, bool(point.shared_expert)) == (granularity, shared_expert):
            chosen.append(replace(point, shared_expert=shared_expert))
    return chosen


def list_rule_points(points: Iterable[Point]) -> list[Point]:
    """Return the points that were trained with the rule's learning rate; others check the rule and enter no fit."""
    return [point for point in points if point.learning_rate_factor in (None, 1.0)]


SCALE_TOLERANCE = 1.1
"""Largest ratio of two sizes that count as one: models of one width differ by their routers' parameters."""


def group_scales(values: Iterable[float]) -> list[list[float]]:
    """Return the different values, those that are nearly equal together, in ascending order."""
    scales: list[list[float]] = []
    for value in sorted(set(values)):
        if scales and value <= scales[-1][0] * SCALE_TOLERANCE:
            scales[-1].append(value)
        else:
            scales.append([value])
    return scales


def _read_csv(path: Path) -> Iterator[Point]:
    with _open(path) as file:
        reader = csv.DictReader(file)
        _require_columns(path, reader.fieldnames or ())
        for row in reader:
            yield _make_point({key: value for key, value in row.items() if value}, f"{path}, line {reader.line_num}")


def _read_json_lines(path: Path) -> Iterator[Point]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RefusedInput(f"{path}, line {number}: no JSON ({error.msg}); one object a line") from error
                if not isinstance(row, dict):
                    raise RefusedInput(f"{path}, line {number}: no JSON object; one object a line")
                _require_columns(path, row)
                yield _make_point(row, f"{path}, line {number}")


def _open(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise RefusedInput(f"{path}: {error.strerror}; give a file of points") from error


def _require_columns(path: Path, columns: Iterable[str]) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise RefusedInput(f"{path}: the columns {', '.join(missing)} are missing; it has {', '.join(columns)}")


def _make_point(row: dict[str, Any], where: str) -> Point:
    values: dict[str, Any] = {}
    for name in FIELDS:
        if row.get(name) is None:
            continue
        value = row[name]
        if name == "name":
            values[name] = str(value)
        elif name == "shared_expert":
            values[name] = str(value).lower() in ("true", "1", "yes")
        else:
            values[name] = _read_number(value, f"{where}, {name}")
            if name == "granularity":
                if not values[name].is_integer():
                    raise RefusedInput(f"{where}, granularity = {value!r}: must be a whole number of fine experts")
                values[name] = int(values[name])
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise RefusedInput(f"{where}: no value for {', '.join(missing)}")
    return Point(**values)


def _read_number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise RefusedInput(f"{where} = {value!r}: must be a positive number")
    return number


def read_run(run: Path) -> Point:
    """Read the point of a run folder: its recipe's size, and the last held-out loss of its pre-training.

    Raises:
        RefusedInput: there is no run, or its pre-training has measured no held-out loss.
    """
    from core.stages import STAGE_FOLDERS
    from titan_ext.config import ModelDims, RopeScaling
    from titan_ext.model_stats import count_parameters

    recorded = run / "manifest.json"
    heldout = run / STAGE_FOLDERS["pretrain"] / "heldout.jsonl"
    if not recorded.is_file() or not heldout.is_file():
        raise RefusedInput(f"{run}: no run whose pre-training measured a held-out loss; give runs, .csv or .jsonl")
    recipe = json.loads(recorded.read_text(encoding="utf-8"))["recipe"]
    model = dict(recipe["model"])
    dims = ModelDims(**model | {"rope_scaling": RopeScaling(**model["rope_scaling"])})
    stage = recipe["stages"]["pretrain"]
    last = json.loads(heldout.read_text(encoding="utf-8").strip().splitlines()[-1])
    count = count_parameters(dims)
    granularity = 4 * dims.d_model / dims.expert_hidden
    shared = dims.shared_hidden / dims.expert_hidden
    return Point(
        active=count.active,
        tokens=last["step"] * stage["global_batch_size"] * stage["seq_len"],
        experts=(dims.n_experts + shared) / (dims.top_k + shared),
        loss=last["loss"],
        total=count.total,
        granularity=int(granularity) if granularity.is_integer() else None,
        shared_expert=dims.shared_hidden > 0,
        name=run.name,
    )
