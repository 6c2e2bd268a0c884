"""The step `package`: the run's artifacts in the formats of other programs, as `export.formats` names them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from core.progress import Progress
from eval.config import DeviceConfig
from eval.export.formats import FORMATS, ExportOptions
from pipelines.recipe import Recipe
from pipelines.steps.context import Context


def list_outputs(recipe: Recipe) -> dict[str, str]:
    """Return format -> folder below the run folder."""
    return {name: f"artifacts/{FORMATS[name].artifact}" for name in recipe.export.formats}


def choose_device(recipe: Recipe) -> DeviceConfig:
    """Return the options of the run's ExecuTorch program: the usual context, as far as the model has it."""
    return DeviceConfig(context=min(DeviceConfig.context, recipe.model.max_seq_len))


def package_artifacts(context: Context) -> None:
    """Write every format that is not there yet. One that fails ends the step, after the others are written."""
    recipe = context.recipe
    options = replace(ExportOptions(), export=recipe.export, device=choose_device(recipe))
    missing = [name for name, output in list_outputs(recipe).items() if not (context.run / output).exists()]
    arguments = (context.run, missing, options, context.progress("package"))
    context.run_job("package", package_on_worker, arguments, cpus=recipe.cluster.cpus_per_task)


def package_on_worker(run: Path, formats: Sequence[str], options: ExportOptions, progress: Progress) -> None:
    """Write formats one after the other, in one process, because loading the libraries takes longer than most of them.

    Raises:
        RuntimeError: some of them failed; names each, and the folders of the others are complete.
    """
    from eval.export.source import open_folder

    failures: list[tuple[str, Exception]] = []
    for i, name in enumerate(formats):
        progress(name, i, len(formats))
        entry = FORMATS[name]
        try:
            entry.write(open_folder(run / "artifacts" / entry.of), run / "artifacts" / entry.artifact, options)
        except Exception as error:  # each library has exception types of its own
            failures.append((name, error))
    progress("formats", len(formats), len(formats))
    if failures:
        named = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failures)
        raise RuntimeError(f"{len(failures)} of {len(formats)} formats failed: {named}") from failures[0][1]
