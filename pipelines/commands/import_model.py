"""`mobilemoe import`: a released-format folder as a checkpoint to train from."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from pipelines.commands.command import emit_result


@dataclass(frozen=True)
class Import:
    """Turn a released-format folder, BF16 or INT4, into a checkpoint that training starts from."""

    folder: tyro.conf.Positional[Path]
    """Hugging Face folder with config.json and safetensors."""
    out: Path
    """DCP folder to write; must not exist."""
    json: bool = False
    """One JSON object on stdout."""


def import_model(arguments: Import) -> None:
    """Write the checkpoint and print the model's dimensions.

    Raises:
        RefusedInput: the folder does not hold such a model, or `out` exists.
    """
    from eval.export.import_hf import import_folder

    dims = import_folder(arguments.folder, arguments.out)
    result = {"out": str(arguments.out), "dimensions": asdict(dims)}
    emit_result(arguments.json, result, lambda: f"written: {arguments.out}\n{dims}")
