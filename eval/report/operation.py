"""How a run went: interruptions, changes on the way, the share of time that trained, and what it cost."""

import re
from pathlib import Path
from typing import Any

from core.stages import STAGES

FAILURE = re.compile(r"^\d{4}-\d\d-\d\dT[\d:]+$", re.MULTILINE)
"""First line of an entry of a stage's log of failures."""


def describe_operation(run: Path, manifest: dict[str, Any], stages: list[dict]) -> list[dict[str, Any]]:
    """Return one row a training stage that has begun.

    A row has `attempts` (starts of the step by a driver), how many of them were `killed`, `restarts` (of its workers,
    within an attempt), `wall_seconds` (all attempts whose end is known), `training_seconds` (of the steps in the log,
    each once), `effective` (their ratio) and `worker_hours` (wall time of all workers).

    Args:
        stages: `collect_stages(run)`.
    """
    recipe, rows = manifest.get("recipe", {}), []
    workers = recipe.get("parallel", {}).get("world_size")
    for name, stage in zip(STAGES, stages, strict=True):
        entry = manifest.get("steps", {}).get(name, {})
        attempts = entry.get("attempts", [])
        if not attempts:
            continue
        wall = sum(attempt["seconds"] or 0.0 for attempt in attempts)
        training = measure_training(stage["metrics"])
        failures = run / "logs" / f"{name}.failures.log"
        rows.append(
            {
                "title": stage["title"],
                "attempts": len(attempts),
                "killed": sum(attempt["seconds"] is None for attempt in attempts),
                "restarts": len(FAILURE.findall(failures.read_text(encoding="utf-8"))) if failures.exists() else 0,
                "wall_seconds": wall,
                "training_seconds": training,
                "effective": training / wall if wall else None,
                "worker_hours": wall * workers / 3600 if workers else None,
            }
        )
    return rows


def list_changes(manifest: dict[str, Any], titles: dict[str, str]) -> list[dict[str, Any]]:
    """Return title, step, time, field, from and to of each field that was changed on the way of a training stage.

    A stage that went back to a checkpoint without a change has a row whose field is None.

    Args:
        titles: stage -> its title.
    """
    rows = []
    for name, title in titles.items():
        for change in manifest.get("steps", {}).get(name, {}).get("changes", []):
            point = {"title": title, "step": change["step"], "time": change["time"]}
            rows += [point | item for item in change["changed"] or [{"field": None, "from": None, "to": None}]]
    return rows


def measure_training(metrics: list[dict]) -> float:
    """Return the seconds that the logged optimizer steps took, from their tokens and their speed."""
    seconds, before = 0.0, 0
    for record in metrics:
        if record["tokens_per_second"]:
            seconds += (record["tokens"] - before) / record["tokens_per_second"]
        before = record["tokens"]
    return seconds
