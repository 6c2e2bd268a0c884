"""`mobilemoe export`: one checkpoint in another format, in this process, without Ray."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from core.errors import RefusedInput
from eval.config import DeviceConfig, ExportConfig, GgufConfig
from eval.export.formats import FORMATS, ExportOptions
from pipelines.commands import inputs
from pipelines.commands.command import emit_result
from titan_ext.config import ModelDims, RopeScaling
from titan_ext.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    from eval.export.source import Source


@dataclass(frozen=True)
class Export:
    """Turn a checkpoint of a run, a Hugging Face folder or an imported one into another format."""

    checkpoint: tyro.conf.Positional[Path]
    """Step folder inside a run, for example RUN/stages/3_sft/checkpoint/step-40; a Hugging Face folder, INT4 or BF16;
    or what `mobilemoe import` wrote. The numbers of a model that is or was INT4 are kept bit for bit."""
    format: Annotated[
        Literal[tuple(FORMATS)],  # type: ignore[valid-type]  # the choices follow from the table
        tyro.conf.arg(help="; ".join(f"{name}: {entry.description}" for name, entry in FORMATS.items())),
    ]
    out: Path
    """Folder to write; must not exist, and lies outside of the checkpoint."""
    device: Annotated[DeviceConfig, tyro.conf.arg(name="")]
    """Options of the ExecuTorch program."""
    gguf: Annotated[GgufConfig, tyro.conf.arg(name="")]
    """Options of the GGUF file."""
    json: bool = False
    """One JSON object on stdout."""


def export(arguments: Export) -> None:
    """Write the checkpoint in the format asked for.

    Dimensions, tokenizer and groups of a checkpoint inside a run are those of its run. Those of a Hugging Face folder,
    or of a checkpoint imported from one, lie in it. A model that came from INT4 keeps its grid.

    Raises:
        RefusedInput: options of one format with another; the checkpoint is none, lies in no run and was not
            imported, or cannot have this format; `out` exists, lies inside of it, or cannot be written.
    """
    checkpoint, out, chosen = arguments.checkpoint, arguments.out, FORMATS[arguments.format]
    options = ExportOptions(device=arguments.device, gguf=arguments.gguf)
    for name, entry in FORMATS.items():
        own = entry.own_options
        if own and name != arguments.format and getattr(options, own) != getattr(ExportOptions(), own):
            raise RefusedInput(
                f"--format {arguments.format}: {', '.join(_list_changed(getattr(options, own)))} is an option of "
                f"--format {name}; leave it out"
            )
    inputs.require_folder("CHECKPOINT", checkpoint)
    run = None if describes_itself(checkpoint) else find_run_of_checkpoint(checkpoint)
    inputs.require_new_folder("--out", out)
    inputs.require_apart("--out", out, "CHECKPOINT", checkpoint)
    if run is None:
        from eval.export.source import open_folder

        source = open_folder(checkpoint)
    else:
        source, config = open_checkpoint_of_run(run, checkpoint)
        options = replace(options, export=config)
    chosen.write(source, out, options)
    result = {"out": str(out), "format": arguments.format}
    emit_result(arguments.json, result, lambda: f"written: {out}")


def _list_changed(options: Any) -> list[str]:
    """Return the command's options of a dataclass whose values are not the default ones."""
    changed = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    return [f"--{name.replace('_', '-')}" for name in changed]


def open_checkpoint_of_run(run: Path, checkpoint: Path) -> tuple["Source", ExportConfig]:
    """Open a checkpoint of a run with the dimensions, tokenizer, groups and sizes that the run's recipe states.

    Raises:
        RefusedInput: an earlier version of this program wrote the run.
    """
    from pipelines.engine.manifest import Manifest

    recipe = Manifest(run).content["recipe"]
    if "quantization" not in recipe:
        raise RefusedInput(
            f"{run}: its recipe has no `quantization`, so an earlier version of this program wrote it; export its "
            "checkpoints with that version, or run the recipe again"
        )
    from eval.export.source import open_run_checkpoint

    source = open_run_checkpoint(
        checkpoint, _build_dims(recipe["model"]), run / "data" / "tokenizer",
        QuantizationConfig(**recipe["quantization"]), recipe["parallel"]["precision"],
    )  # fmt: skip
    return source, ExportConfig(**recipe["export"])


def describes_itself(checkpoint: Path) -> bool:
    """Return whether the folder says which model it holds: a Hugging Face folder, or one imported outside of a run.

    A checkpoint imported inside a run (stages/0_initial) has a config.json too, but follows the run's recipe.
    """
    if not (checkpoint / "config.json").is_file():
        return False
    return not (checkpoint / ".metadata").is_file() or _find_run(checkpoint) is None


def _find_run(checkpoint: Path) -> Path | None:
    return next((folder for folder in checkpoint.absolute().parents if (folder / "manifest.json").is_file()), None)


def find_run_of_checkpoint(checkpoint: Path) -> Path:
    """Return the folder of the run that a DCP checkpoint lies in.

    Raises:
        RefusedInput: it is no DCP checkpoint, or lies in no run.
    """
    if not (checkpoint / ".metadata").is_file():
        raise RefusedInput(
            f"{checkpoint}: no .metadata, so no DCP checkpoint, and no config.json, so no Hugging Face folder; give "
            "one of them, for example RUN/stages/3_sft/checkpoint/step-40"
        )
    run = _find_run(checkpoint)
    if run is None:
        raise RefusedInput(
            f"{checkpoint}: no manifest.json in a folder above, so its model is unknown; give one inside a run, "
            "or one that `mobilemoe import` wrote"
        )
    return run


def _build_dims(dims: dict[str, Any]) -> ModelDims:
    return ModelDims(**(dims | {"rope_scaling": RopeScaling(**dims["rope_scaling"])}))
