"""The report of a run: what is in its folder, gathered, judged against chance, and printed.

Everything in it is computed from the run folder; what a run has not made yet is shown as missing. Fractions are kept in
results.json and turned into percent in print; losses are nats a token, sizes bytes.
"""

import base64
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from core.errors import RefusedInput
from eval.benchmarks.suites import FOUNDATIONAL, PUBLISHED_AVERAGES, PUBLISHED_QAT_COST
from eval.report import figures

STAGES = (
    # folder, title, short title, held-out text its entropy belongs to
    ("1_pretrain", "1 Pre-training", "PT", "heldout_text"),
    ("2_midtrain", "2 Mid-training", "MT", "heldout_text"),
    ("3_sft", "3 Instruction tuning", "SFT", "heldout_sft"),
    ("4_qat", "4 INT4 quantization-aware training", "QAT", "heldout_sft"),
)
MODELS = {"sft_bf16": "SFT, BF16", "int4": "QAT, INT4"}
HELDOUT = {
    "pretrain": "after pre-training",
    "midtrain": "after mid-training",
    "sft": "after SFT, BF16",
    "sft_int4_rounded": "SFT rounded to INT4",
    "qat_int4": "after QAT, INT4",
}
HELDOUT_KINDS = {"text": "Held-out text", "sft": "Held-out conversations, the assistant's tokens"}
CHANCE_ERRORS = 2
"""A score closer to the random-guess level than this many standard errors is not told from a guess."""


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _lines(path: Path) -> list[dict]:
    """Records of a JSON-lines file that may be growing: a last line without its end is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def collect_stages(run: Path) -> list[dict]:
    """The four stages with their records; empty lists where a stage has not run."""
    entropies = _json(run / "data/data_manifest.json").get("unigram_entropy_nats", {})
    stages = []
    for folder, title, short, text in STAGES:
        records = {
            name: _lines(run / "stages" / folder / f"{name}.jsonl") for name in ("metrics", "heldout", "expert_load")
        }
        entropy = entropies.get(text, {}).get("overall")
        stages.append({"key": folder, "title": title, "short": short, "unigram_entropy": entropy} | records)
    return stages


def stage_row(stage: dict) -> dict:
    """What the table of stages says: where the stage stands now."""
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


def verdict(value: float, stderr: float | None, chance: float) -> str | None:
    """`chance` within two standard errors of the random-guess level, else `above` or `below`; None if not known."""
    if stderr is None:
        return None
    if abs(value - chance) <= CHANCE_ERRORS * stderr:
        return "chance"
    return "above" if value > chance else "below"


def benchmark_rows(run: Path) -> list[dict]:
    """One row a benchmark: what is known of it, and each model's result with its verdict (None: not run)."""
    rows = []
    for benchmark in FOUNDATIONAL:
        row = asdict(benchmark)
        for model in MODELS:
            result = _json(run / "eval" / model / f"{benchmark.key}.json") or None
            if result:
                result["verdict"] = verdict(result["value"], result["stderr"], result["chance"])
            row[model] = result
        both = row["sft_bf16"] and row["int4"]
        row["difference"] = row["int4"]["value"] - row["sft_bf16"]["value"] if both else None
        rows.append(row)
    return rows


def averages(rows: list[dict]) -> dict[str, float | None]:
    """Mean of the rows a model has, None unless it has all of them."""
    values = {model: [row[model]["value"] for row in rows if row[model]] for model in MODELS}
    return {model: sum(v) / len(v) if len(v) == len(rows) else None for model, v in values.items()}


def chance_sentence(rows: list[dict], model: str) -> str:
    """In words: how many of a model's scores can be told from a guess."""
    judged = {row["title"]: row[model]["verdict"] for row in rows if row[model] and row[model]["verdict"]}
    if not judged:
        return f"{MODELS[model]}: no benchmark has been scored yet."
    groups = {kind: [title for title, v in judged.items() if v == kind] for kind in ("chance", "above", "below")}
    sentence = (
        f"{MODELS[model]}: {len(groups['chance'])} of {len(judged)} scores lie within two standard errors of the "
        "random-guess level"
    )
    for kind in ("above", "below"):
        if groups[kind]:
            sentence += f"; {kind} it: {', '.join(groups[kind])}"
    if 2 * len(groups["chance"]) > len(judged):
        sentence += ". Most of this table is chance: it shows that the evaluation works, not what the model knows"
    return sentence + "."


def heldout_tables(run: Path) -> list[dict]:
    """Of text and of conversations: losses of the five models, their domains, what INT4 costs with and without QAT."""
    measured = _json(run / "eval/heldout.json")
    return [
        heldout_table(kind, title, {key: result[kind] for key, result in measured.items()})
        for kind, title in HELDOUT_KINDS.items()
    ]


def heldout_table(kind: str, title: str, found: dict[str, dict]) -> dict:
    """One of the two tables; `found`: model -> loss, tokens, by_domain."""
    loss = {key: found[key]["loss"] if key in found else None for key in HELDOUT}

    def difference(after: str, before: str) -> float | None:
        return None if loss[after] is None or loss[before] is None else loss[after] - loss[before]

    return {
        "kind": kind,
        "title": title,
        "rows": [{"key": key, "title": model, "result": found.get(key)} for key, model in HELDOUT.items()],
        "domains": sorted({domain for result in found.values() for domain in result["by_domain"]}),
        "rounding_cost": difference("sft_int4_rounded", "sft"),
        "qat_cost": difference("qat_int4", "sft"),
        "qat_against_rounding": difference("qat_int4", "sft_int4_rounded"),
    }


def artifact_sizes(run: Path) -> list[dict]:
    """Bytes and files of every artifact, largest file named."""
    sizes = []
    for folder in sorted(path for path in run.glob("artifacts/*") if path.is_dir()):
        files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: -file.stat().st_size)
        if files:
            total = sum(file.stat().st_size for file in files)
            largest = {"name": str(files[0].relative_to(folder)), "bytes": files[0].stat().st_size}
            sizes.append({"name": folder.name, "bytes": total, "files": len(files), "largest": largest})
    return sizes


def data_table(run: Path) -> dict:
    """Documents and tokens a stage and domain, corpora with their licences, and what was left out."""
    manifest = _json(run / "data/data_manifest.json")
    rows = [
        {"split": split, "stage": stage, "domain": domain} | counts
        for split in ("shards", "heldout")
        for stage, domains in manifest.get(split, {}).items()
        for domain, counts in domains.items()
    ]
    contaminated = {b: sum(hits.values()) for b, hits in manifest.get("decontamination", {}).get("hits", {}).items()}
    corpora = [{"name": name} | entry for name, entry in manifest.get("corpora", {}).items()]
    return {"rows": rows, "corpora": corpora, "missing": manifest.get("missing", []), "contaminated": contaminated}


def collect(run: Path, stages: list[dict]) -> dict:
    """Everything the report says, ready for JSON."""
    manifest = _json(run / "manifest.json")
    rows = benchmark_rows(run)
    results = {
        "run": run.resolve().name,
        "created": manifest.get("created"),
        "git_commit": manifest.get("git_commit"),
        "versions": manifest.get("versions", {}),
        "steps": [
            {"name": name, "state": entry["state"], "seconds": entry.get("seconds")}
            for name, entry in manifest.get("steps", {}).items()
        ],
        "stages": [stage_row(stage) for stage in stages],
        "benchmarks": rows,
        "averages": averages(rows),
        "published_averages": {name: asdict(model) for name, model in PUBLISHED_AVERAGES.items()},
        "published_qat_cost": PUBLISHED_QAT_COST["MobileMoE-S"],
        "chance": {model: chance_sentence(rows, model) for model in MODELS},
        "heldout": heldout_tables(run),
        "artifacts": artifact_sizes(run),
        "data": data_table(run),
        "items": _json(run / "items/items.json"),
    }
    return results | {"missing": missing_pieces(results)}


def missing_pieces(results: dict) -> list[str]:
    """What a finished run would have and this one has not, in words."""
    missing = [f"stage {stage['title']}" for stage in results["stages"] if stage["step"] is None]
    for model, title in MODELS.items():
        absent = [row["title"] for row in results["benchmarks"] if not row[model]]
        if absent:
            names = "all benchmarks" if len(absent) == len(results["benchmarks"]) else ", ".join(absent)
            missing.append(f"{title}: {names}")
    if without := results["items"].get("missing"):
        missing.append(f"the items of {len(without)} benchmarks: {results['items']['package']} could not be fetched")
    missing += [f"held-out loss {row['title']}" for row in results["heldout"][0]["rows"] if not row["result"]]
    for key, title in (("artifacts", "artifacts"), ("versions", "manifest.json")):
        missing += [] if results[key] else [title]
    return missing + ([] if results["data"]["rows"] else ["data/data_manifest.json"])


def draw(results: dict, stages: list[dict], folder: Path) -> dict[str, str]:
    """Write the pictures there is something to draw for; name -> file name."""
    drawn = {}
    if any(stage["metrics"] for stage in stages):
        figures.loss_curves(stages, folder / "loss.png")
        drawn["loss"] = "loss.png"
    if any(stage["expert_load"] for stage in stages):
        figures.expert_load(stages, folder / "expert_load.png")
        drawn["expert_load"] = "expert_load.png"
    if any(row[model] for row in results["benchmarks"] for model in MODELS):
        figures.benchmarks(results["benchmarks"], folder / "benchmarks.png")
        drawn["benchmarks"] = "benchmarks.png"
    return drawn


def _or_missing(template: str, scale: float = 1.0):
    """A jinja filter that prints a number, and a dash where there is none."""
    return lambda value: "–" if value is None else template.format(scale * value)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _or_missing("{:.1f}", 100),
        "points": _or_missing("{:+.1f}", 100),
        "nats": _or_missing("{:.4f}"),
        "change": _or_missing("{:+.4f}"),
        "count": _or_missing("{:,.0f}"),
        "ratio": _or_missing("{:.2f}"),
        "bytes": _bytes,
        "duration": _duration,
    }
    return environment


def write_report(run: Path) -> dict:
    """Write `run/report/` (report.md, report.html, results.json, PNGs) from what the run folder holds.

    A run that is not finished gets a report of what there is; the folder is replaced whole. Returns what results.json
    holds. Raises RefusedInput if `run` is no folder.
    """
    if not run.is_dir():
        raise RefusedInput(f"report: {run} is not a run folder")
    stages = collect_stages(run)
    results = collect(run, stages)
    partial = run / "report.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    pictures = draw(results, stages, partial)
    embedded = {
        name: "data:image/png;base64," + base64.b64encode((partial / file).read_bytes()).decode()
        for name, file in pictures.items()
    }
    environment = _environment()
    for template, images in (("report.html.j2", embedded), ("report.md.j2", pictures)):
        text = environment.get_template(template).render(**results, images=images, models=MODELS)
        (partial / template.removesuffix(".j2")).write_text(text)
    (partial / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    shutil.rmtree(run / "report", ignore_errors=True)
    os.replace(partial, run / "report")
    return results
