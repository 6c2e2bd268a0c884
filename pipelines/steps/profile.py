"""The step `profile`: speed and memory of the run's ExecuTorch program on a machine of the cluster, for the report."""

import os
from pathlib import Path

from core.atomic import atomic_write
from core.progress import Progress
from eval.config import N_ANSWER
from pipelines.recipe import Recipe
from pipelines.steps.context import Context
from pipelines.steps.package import choose_device, list_outputs

PROFILE = "profile"
"""Folder below the run folder."""


def list_profile_outputs(recipe: Recipe) -> tuple[str, ...]:
    """Return the step's output: none where the run makes no program, or none with room for a prompt and an answer, or
    measures it nowhere.
    """
    makes_program, wants_figures = "executorch" in recipe.export.formats, bool(recipe.export.profile_contexts)
    return (PROFILE,) if makes_program and wants_figures and choose_device(recipe).context > N_ANSWER else ()


def profile_program(context: Context) -> None:
    """Measure the program where the recipe wants it. Nothing else of the run is at work then."""
    recipe, run = context.recipe, context.run
    if not list_profile_outputs(recipe):
        return
    room = choose_device(recipe).context
    contexts = sorted({min(wanted, room) for wanted in recipe.export.profile_contexts})
    program, threads = run / list_outputs(recipe)["executorch"], recipe.cluster.cpus_per_task
    arguments = (program, run / PROFILE, contexts, threads, context.progress("profile"))
    context.run_job("profile", profile_on_worker, arguments, cpus=threads)


def profile_on_worker(program: Path, out: Path, contexts: list[int], threads: int, progress: Progress) -> None:
    """Measure a program on the prompts that come with `eval.device`, on at most `threads` threads.

    A profile that is there is that of this step, which was killed before it was recorded as done.
    """
    if out.exists():
        return
    from eval.device.profile import profile

    with atomic_write(out) as partial:
        partial.mkdir()
        profile(program, partial, contexts=contexts, threads=min(threads, os.cpu_count() or 1), progress=progress)
