"""`mobilemoe export`: one checkpoint in another format, in this process, without Ray."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from core.errors import RefusedInput
from eval.config import DeviceConfig, GgufConfig
from eval.export.formats import FORMATS, ExportOptions
from pipelines.commands import inputs
from pipelines.commands.checkpoints import find_opener
from pipelines.commands.command import emit_result

if TYPE_CHECKING:
    pass


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
    opener = find_opener(checkpoint)
    inputs.require_new_folder("--out", out)
    inputs.require_apart("--out", out, "CHECKPOINT", checkpoint)
    source, config = opener()
    chosen.write(source, out, replace(options, export=config))
    result = {"out": str(out), "format": arguments.format}
    emit_result(arguments.json, result, lambda: f"written: {out}")


def _list_changed(options: Any) -> list[str]:
    """Return the command's options of a dataclass whose values are not the default ones."""
    changed = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    return [f"--{name.replace('_', '-')}" for name in changed]
