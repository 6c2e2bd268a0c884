"""Opening the checkpoint that a command names: one inside a run, a Hugging Face folder, or an imported one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import RefusedInput
from core.run_folder import find_run
from eval.config import ExportConfig
from titan_ext.config import ModelDims, RopeScaling
from titan_ext.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    from eval.export.source import Source


def find_opener(checkpoint: Path) -> Callable[[], tuple["Source", ExportConfig]]:
    """Return the function that opens a checkpoint, with the sizes that its run states or the default ones.

    Nothing is read yet but what says which kind of checkpoint it is.

    Raises:
        RefusedInput: it is no DCP checkpoint and no Hugging Face folder, or it lies in no run.
    """
    if describes_itself(checkpoint):
        return partial(_open_folder, checkpoint)
    return partial(open_checkpoint_of_run, find_run_of_checkpoint(checkpoint), checkpoint)


def _open_folder(checkpoint: Path) -> tuple["Source", ExportConfig]:
    from eval.export.source import open_folder

    return open_folder(checkpoint), ExportConfig()


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
    return not (checkpoint / ".metadata").is_file() or find_run(checkpoint) is None


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
    run = find_run(checkpoint)
    if run is None:
        raise RefusedInput(
            f"{checkpoint}: no manifest.json in a folder above, so its model is unknown; give one inside a run, "
            "or one that `mobilemoe import` wrote"
        )
    return run


def _build_dims(dims: dict[str, Any]) -> ModelDims:
    return ModelDims(**(dims | {"rope_scaling": RopeScaling(**dims["rope_scaling"])}))
