"""`mobilemoe data`: make the data set of a recipe, for the run that needs it and for others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from core.errors import RefusedInput
from core.progress import print_progress
from pipelines.commands import inputs
from pipelines.commands.command import Address, emit_result, parse_arguments
from pipelines.commands.recipe_argument import choose_recipe
from pipelines.commands.run import run_recipe
from pipelines.recipe import Recipe

LAST_STEP = "data"


@dataclass(frozen=True)
class Data:
    """Make the data set of a recipe, on processors alone, for `run --data`. The same command continues."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Address | None = None
    """Folder, or address such as s3://bucket/data, that gets the data set."""
    work: Path | None = None
    """Folder to work in where --out is an address; data-sets/RECIPE if not given. It is kept, so that corpora that stay
    the same are not made again."""
    json: bool = False
    """Print what was made as one JSON object on stdout at the end."""


def parse(words: Sequence[str]) -> Data:
    """Parse RECIPE, as `run` does, and the options.

    Raises:
        RefusedInput: there is no such recipe, or --out is missing.
        UsageShown: no recipe is named.
        SystemExit: a wrong option, or --help after RECIPE.
    """
    recipe, title, rest = choose_recipe("data", "--out ADDRESS [--work DIR] [--json]", words)
    arguments = parse_arguments(Data, rest, f"data {title}", Data(recipe=recipe))
    if arguments.out is None:
        raise RefusedInput("--out: give the folder or the address that gets the data set")
    return arguments


def make_data(arguments: Data) -> None:
    """Make a data set and send it to its address.

    Raises:
        RefusedInput, StepFailed, KeyboardInterrupt: as `run_recipe`.
        TransferFailed: sending was cut off.
    """
    from pipelines.commands.transfer import find_local_path, name_failures, open_for_writing
    from pipelines.shared_data import open_shared_data, send_data

    assert arguments.out is not None, "`parse` refuses that"
    local = find_local_path(arguments.out)
    if local is not None:
        if arguments.work is not None:
            raise RefusedInput(f"--work {arguments.work}: the work is done in the folder --out; leave --work away")
        work = local.absolute()
    else:
        open_for_writing(arguments.out)  # refuses an address that cannot be written to before days of work
        work = (arguments.work or Path("data-sets") / arguments.recipe.name).absolute()
        inputs.require_output_folder("--work", work)
    run_recipe(arguments.recipe, work, until=LAST_STEP, restart_from=None)
    if local is None:
        with name_failures(arguments.out):
            send_data(work / "data", arguments.out, print_progress)
    shared = open_shared_data(arguments.out)
    made = {"address": arguments.out, **summarize(shared.manifest)}
    emit_result(arguments.json, made, lambda: format_summary(made))


def summarize(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens and the bytes of a data set by stage and domain."""
    return {
        top: {
            stage: {
                domain: {key: entry[key] for key in ("documents", "tokens", "shards", "compressed_bytes")}
                for domain, entry in domains.items()
            }
            for stage, domains in manifest[top].items()
        }
        for top in ("shards", "heldout")
    }


def format_summary(made: dict[str, Any]) -> str:
    """Return what was made, a line for each stage's domain."""
    lines = [f"data set {made['address']}"]
    for top in ("shards", "heldout"):
        for stage, domains in made[top].items():
            for domain, entry in domains.items():
                lines.append(f"  {top}/{stage}/{domain}: {entry['tokens']:,} tokens, {entry['shards']:,} shards")
    return "\n".join(lines)
