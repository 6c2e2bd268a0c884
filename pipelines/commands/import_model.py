"""`mobilemoe import`: a released-format folder as a checkpoint to train from."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from pipelines.commands import inputs
from pipelines.commands.command import emit_result


@dataclass(frozen=True)
class Import:
    """Turn a released-format folder, BF16 or INT4, into a checkpoint that training starts from."""

    folder: tyro.conf.Positional[Path]
    """Hugging Face folder with config.json and safetensors."""
    out: Path
    """DCP folder to write; must not exist, and lies outside of the folder."""
    json: bool = False
    """One JSON object on stdout."""


def import_model(arguments: Import) -> None:
    """Write the checkpoint and print the model's dimensions.

    Raises:
        RefusedInput: the folder does not hold such a model; `out` exists, lies inside of it, or cannot be written.
    """
    inputs.require_folder("FOLDER", arguments.folder)
    inputs.require_new_folder("--out", arguments.out)
    inputs.require_apart("--out", arguments.out, "FOLDER", arguments.folder)
    from eval.export.import_hf import import_folder

    dims = import_folder(arguments.folder, arguments.out)
    result = {"out": str(arguments.out), "dimensions": asdict(dims)}
    emit_result(arguments.json, result, lambda: f"written: {arguments.out}\n{dims}")
