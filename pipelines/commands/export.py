"""`mobilemoe export`: one checkpoint in another format, in this process, without Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from core.errors import RefusedInput
from eval.config import DeviceConfig, ExportConfig
from pipelines.commands.command import emit_result
from titan_ext.config import ModelDims, RopeScaling


@dataclass(frozen=True)
class Export:
    """Turn a checkpoint of a run, a Hugging Face folder or an imported one into bf16, INT4 or an ExecuTorch program."""

    checkpoint: tyro.conf.Positional[Path]
    """Step folder inside a run, for example RUN/stages/3_sft/checkpoint/step-60; a Hugging Face folder, INT4 or BF16;
    or what `mobilemoe import` wrote. The numbers of a model that is or was INT4 are kept bit for bit."""
    format: Literal["bf16", "int4", "executorch"]
    out: Path
    """Folder to write; must not exist."""
    device: Annotated[DeviceConfig, tyro.conf.arg(name="")]
    """Options of the ExecuTorch program."""
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint inside a run, with what only the run's recipe says about it."""

    path: Path
    model: ModelDims
    tokenizer: Path
    export: ExportConfig
    precision: str
    """Dtype that the model was trained in."""


def export(arguments: Export) -> None:
    """Write the checkpoint in the format asked for.

    Raises:
        RefusedInput: options of executorch with another format; the checkpoint is none; `out` exists.
    """
    if arguments.format != "executorch" and arguments.device != DeviceConfig():
        raise RefusedInput(
            f"--format {arguments.format} has no KV cache and no expert op; those options are executorch's"
        )
    if arguments.format == "executorch":
        export_program(arguments.checkpoint, arguments.out, arguments.device)
    else:
        export_folder(arguments.checkpoint, arguments.format, arguments.out)
    result = {"out": str(arguments.out), "format": arguments.format}
    emit_result(arguments.json, result, lambda: f"written: {arguments.out}")


def export_folder(checkpoint: Path, layout: str, out: Path) -> None:
    """Write a checkpoint as a Hugging Face folder, BF16 or INT4.

    Dimensions, tokenizer and groups of a checkpoint inside a run are those of its run. Those of a Hugging Face folder,
    or of a checkpoint imported from one, lie in it. A model that came from INT4 keeps its grid.

    Raises:
        RefusedInput: the checkpoint is none, or lies in no run and was not imported; or `out` exists.
    """
    inside = None if describes_itself(checkpoint) else read_run_checkpoint(checkpoint)
    _require_new(out)
    if inside is None:
        from eval.export.int4 import bf16_folder, quantize_folder

        (bf16_folder if layout == "bf16" else quantize_folder)(checkpoint, out)
        return
    from eval.export import checkpoint as exporter

    if layout == "bf16":
        exporter.export_bf16(inside.path, inside.model, inside.tokenizer, out, inside.export)
    else:
        exporter.export_int4(inside.path, inside.model, inside.tokenizer, out, inside.export, inside.precision)


def export_program(checkpoint: Path, out: Path, device: DeviceConfig) -> None:
    """Write a checkpoint of a run, a Hugging Face folder or an imported checkpoint as an ExecuTorch program.

    Raises:
        RefusedInput: the checkpoint is none of them, the fused op cannot take it, or `out` exists.
    """
    inside = None if describes_itself(checkpoint) else read_run_checkpoint(checkpoint)
    _require_new(out)
    from eval.device.executorch_export import export_moe
    from eval.device.weights import open_folder
    from eval.export import checkpoint as exporter

    if inside is None:
        export_moe(open_folder(checkpoint, device.expert_group_size), checkpoint, out, device)
    else:
        weights = exporter.device_weights(
            inside.path, inside.model, inside.export, inside.precision, device.expert_group_size
        )
        export_moe(weights, inside.tokenizer, out, device)


def describes_itself(checkpoint: Path) -> bool:
    """Return whether the folder says which model it holds: a Hugging Face folder, or one imported outside of a run.

    A checkpoint imported inside a run (stages/0_initial) has a config.json too, but follows the run's recipe.
    """
    if not (checkpoint / "config.json").is_file():
        return False
    return not (checkpoint / ".metadata").is_file() or _find_run(checkpoint) is None


def _find_run(checkpoint: Path) -> Path | None:
    return next((folder for folder in checkpoint.absolute().parents if (folder / "manifest.json").is_file()), None)


def read_run_checkpoint(checkpoint: Path) -> RunCheckpoint:
    """Read what the run of a DCP checkpoint says about it.

    Raises:
        RefusedInput: it is no DCP checkpoint, or lies in no run.
    """
    if not (checkpoint / ".metadata").is_file():
        raise RefusedInput(
            f"{checkpoint}: no .metadata, so no DCP checkpoint, and no config.json, so no Hugging Face folder; give "
            "one of them, for example RUN/stages/3_sft/checkpoint/step-60"
        )
    run = _find_run(checkpoint)
    if run is None:
        raise RefusedInput(
            f"{checkpoint}: no manifest.json in a folder above, so its model is unknown; give one inside a run, "
            "or one that `mobilemoe import` wrote"
        )
    from pipelines.engine.manifest import Manifest

    recipe = Manifest(run).content["recipe"]
    return RunCheckpoint(
        checkpoint, _build_dims(recipe["model"]), run / "data" / "tokenizer", ExportConfig(**recipe["export"]),
        recipe["parallel"]["precision"],
    )  # fmt: skip


def _build_dims(dims: dict[str, Any]) -> ModelDims:
    return ModelDims(**(dims | {"rope_scaling": RopeScaling(**dims["rope_scaling"])}))


def _require_new(out: Path) -> None:
    if out.exists():
        raise RefusedInput(f"--out {out}: exists; name a folder that does not")
