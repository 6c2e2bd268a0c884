"""The results of a run, collected from its folder and judged against chance.

Everything is computed from the run folder; what a run has not made yet is None, or named under `missing`. Fractions
stay fractions here and become percent in print; losses are nats a token, sizes bytes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.json_lines import read_json_lines
from core.stages import STAGE_FOLDERS, STAGES
from eval.benchmarks.baselines import BASELINES, PUBLISHED_QAT_COST
from eval.benchmarks.suites import get_suite
from eval.export.sizes import int4_bytes
from eval.report import heldout_tables, operation, scores
from titan_ext.config import FLAVORS, ModelDims, RopeScaling
from titan_ext.model_stats import count_parameters


@dataclass(frozen=True)
class StageTitle:
    """Print forms of a stage, and the held-out set it is measured on."""

    title: str
    short: str
    heldout: str
    """Key of the held-out set in data_manifest.json's `unigram_entropy_nats`."""


STAGE_TITLES = {
    "pretrain": StageTitle("1 Pre-training", "PT", "heldout_text"),
    "midtrain": StageTitle("2 Mid-training", "MT", "heldout_text"),
    "sft": StageTitle("3 Instruction tuning", "SFT", "heldout_sft"),
    "qat": StageTitle("4 INT4 quantization-aware training", "QAT", "heldout_sft"),
}
MAX_POINTS = 2000
"""Number of records of a curve that are enough for a picture."""
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".pte")
"""Endings of the files whose bytes are weights, but for a small header."""


def collect_results(run: Path, stages: list[dict]) -> dict[str, Any]:
    """Return everything the report says, ready for JSON.

    Args:
        run: run folder.
        stages: `collect_stages(run)`.
    """
    manifest = _read_json(run / "manifest.json")
    evaluation = manifest.get("recipe", {}).get("evaluation", {})
    suite = evaluation.get("suite", "foundational")
    model = describe_model(manifest.get("recipe", {}))
    rows = scores.collect_benchmarks(run, get_suite(suite, evaluation.get("benchmarks", ())))
    results = {
        "run": run.resolve().name,
        "suite": suite,
        "created": manifest.get("created"),
        "git_commit": manifest.get("git_commit"),
        "versions": manifest.get("versions", {}),
        "steps": [
            {"name": name, "state": entry["state"], "seconds": entry.get("seconds")}
            for name, entry in manifest.get("steps", {}).items()
        ],
        "stages": [summarize_stage(stage) for stage in stages],
        "benchmarks": rows,
        "averages": scores.average_scores(rows),
        "average_differences": scores.average_differences(rows),
        "categories": scores.average_categories(rows),
        "published_models": [
            asdict(model) | {"int4_bytes": model.int4_bytes} for model in BASELINES.values() if model.base is not None
        ],
        "published_qat_cost": PUBLISHED_QAT_COST,
        "chance": {model: scores.describe_chance(rows, model) for model in scores.MODELS},
        "mostly_chance": scores.is_mostly_chance(rows),
        "truncated": scores.list_truncated(rows),
        "heldout": heldout_tables.collect_heldout(run),
        "artifacts": measure_artifacts(run, model["total"] if model else None),
        "published_sizes": measure_published(),
        "profile": _read_json(run / "profile/profile.json") or None,
        "computed_in": list_dtypes(run),
        "data": collect_data(run),
        "operation": operation.describe_operation(run, manifest, stages),
        "changes": operation.list_changes(manifest, {name: title.title for name, title in STAGE_TITLES.items()}),
        "model": model,
        "items": _read_json(run / "items/items.json"),
    }
    return results | {"missing": list_missing(results)}


def collect_stages(run: Path) -> list[dict[str, Any]]:
    """Return the four stages with their records; the lists are empty where a stage has not run."""
    entropies = _read_json(run / "data/data_manifest.json").get("unigram_entropy_nats", {})
    stages = []
    for name in STAGES:
        folder, title = run / STAGE_FOLDERS[name], STAGE_TITLES[name]
        records = {log: list(read_json_lines(folder / f"{log}.jsonl")) for log in ("metrics", "heldout", "benchmarks")}
        entropy = entropies.get(title.heldout, {}).get("overall")
        stages.append(
            {"key": folder.name, "title": title.title, "short": title.short, "unigram_entropy": entropy}
            | records
            | read_expert_load(folder / "expert_load.jsonl")
        )
    return stages


def read_expert_load(path: Path) -> dict[str, Any]:
    """Return what the report shows of a stage's expert load, without holding the file, which has gigabytes in the end.

    Returns:
        `expert_load`: at most some MAX_POINTS records, evenly spread, with step and of each layer `max_over_mean` and
        `dead`; the last one is the last record. `last_load`: step and layers of shares of the newest record that has
        them, None where there is none.
    """
    kept: list[dict] = []
    last, whole, every = None, None, 1
    for number, record in enumerate(read_json_lines(path)):
        last = {
            "step": record["step"],
            "layers": [{key: layer[key] for key in ("max_over_mean", "dead")} for layer in record["layers"]],
        }
        if "load" in record["layers"][0]:
            whole = {"step": record["step"], "layers": [layer["load"] for layer in record["layers"]]}
        if number % every == 0:
            kept.append(last)
        if len(kept) > 2 * MAX_POINTS:
            kept, every = kept[::2], 2 * every
    if last is not None and kept[-1] is not last:
        kept.append(last)
    return {"expert_load": kept, "last_load": whole}


def summarize_stage(stage: dict) -> dict[str, Any]:
    """Return a stage's row of the table: where it stands at its last record."""
    last = stage["metrics"][-1] if stage["metrics"] else {}
    load = stage["expert_load"][-1]["layers"] if stage["expert_load"] else []
    heldout = stage["heldout"][-1]["loss"] if stage["heldout"] else None
    row = {key: last.get(key) for key in ("step", "tokens", "loss", "tokens_per_second", "seconds")}
    return {"key": stage["key"], "title": stage["title"]} | row | {
        "heldout_loss": heldout,
        "unigram_entropy": stage["unigram_entropy"],
        "max_over_mean": max((layer["max_over_mean"] for layer in load), default=None),
        "dead_experts": sum(layer["dead"] for layer in load) if load else None,
    }  # fmt: skip


def list_dtypes(run: Path) -> list[str]:
    """Return the dtypes that the models computed in for the held-out losses: one, unless machines differed."""
    measured = heldout_tables.read_heldout(run)
    found = {result[kind].get("dtype") for result in measured.values() for kind in heldout_tables.HELDOUT_SETS}
    return sorted(dtype for dtype in found if dtype)


def measure_artifacts(run: Path, parameters: int | None) -> list[dict[str, Any]]:
    """Return bytes and number of files of every artifact, its largest file, and the bits that a parameter takes.

    Args:
        parameters: number of the model's parameters; None where it is not known.
    """
    sizes = []
    for folder in sorted(path for path in run.glob("artifacts/*") if path.is_dir()):
        files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: -file.stat().st_size)
        if files:
            total = sum(file.stat().st_size for file in files)
            weights = sum(file.stat().st_size for file in files if file.suffix in WEIGHT_SUFFIXES)
            largest = {"name": str(files[0].relative_to(folder)), "bytes": files[0].stat().st_size}
            bits = 8 * weights / parameters if weights and parameters else None
            sizes.append({"name": folder.name, "bytes": total, "files": len(files), "largest": largest, "bits": bits})
    return sizes


def measure_published() -> list[dict[str, Any]]:
    """Return the bytes of the published INT4 checkpoints and the bits that a parameter takes there."""
    sizes = {name: (int4_bytes(FLAVORS[name]), count_parameters(FLAVORS[name]).total) for name in ("S", "M", "L")}
    return [{"name": f"MobileMoE-{name}", "bytes": n, "bits": 8 * n / total} for name, (n, total) in sizes.items()]


def describe_model(recipe: dict[str, Any]) -> dict[str, int] | None:
    """Return parameters (`active`, `total`) and INT4 bytes of a recipe's model, None where it states none."""
    values = recipe.get("model")
    if values is None:
        return None
    dims = ModelDims(**values | {"rope_scaling": RopeScaling(**values["rope_scaling"])})
    count = count_parameters(dims)
    return {"active": count.active, "total": count.total, "int4_bytes": int4_bytes(dims)}


def collect_data(run: Path) -> dict[str, Any]:
    """Return documents and tokens by stage and domain, the corpora with their licences, and what was left out."""
    manifest = _read_json(run / "data/data_manifest.json")
    rows = [
        {"split": split, "stage": stage, "domain": domain} | counts
        for split in ("shards", "heldout")
        for stage, domains in manifest.get(split, {}).items()
        for domain, counts in domains.items()
    ]
    contaminated = {b: sum(hits.values()) for b, hits in manifest.get("decontamination", {}).get("hits", {}).items()}
    corpora = [{"name": name} | entry for name, entry in manifest.get("corpora", {}).items()]
    return {"rows": rows, "corpora": corpora, "missing": manifest.get("missing", []), "contaminated": contaminated}


def list_missing(results: dict) -> list[str]:
    """Return, in words, the parts that a finished run has and this one has not."""
    missing = [f"stage {stage['title']}" for stage in results["stages"] if stage["step"] is None]
    for model, title in scores.MODELS.items():
        absent = [row["title"] for row in results["benchmarks"] if not row["scores"][model]]
        if absent:
            names = "all benchmarks" if len(absent) == len(results["benchmarks"]) else ", ".join(absent)
            missing.append(f"{title}: {names}")
    places = {benchmark.key: benchmark.items.place for benchmark in get_suite(results["suite"])}
    without = [places[row["key"]] for row in results["benchmarks"] if row["key"] in results["items"].get("missing", ())]
    if n := without.count("package"):
        missing.append(f"the items of {n} benchmarks: {results['items']['package']} could not be fetched")
    if n := without.count("folder"):
        missing.append(f"the items of {n} benchmarks, which no registry has: give evaluation.items_folder")
    missing += [f"held-out loss {row['title']}" for row in results["heldout"][0]["rows"] if not row["result"]]
    for key, title in (("artifacts", "artifacts"), ("versions", "manifest.json")):
        missing += [] if results[key] else [title]
    return missing + ([] if results["data"]["rows"] else ["data/data_manifest.json"])


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
