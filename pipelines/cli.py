"""The `mobilemoe` command.

Exit codes: 0 done; 2 refused input, nothing started; 1 a step failed, resumable; 130 interrupted, resumable.
torch and Ray are imported only after the input has been accepted, so help and refusals come at once.
"""

import difflib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from core.errors import RefusedInput
from eval.config import DeviceConfig, EvaluationConfig
from eval.export.formats import FORMATS
from pipelines.commands.artifact_commands import Fetch, Profile, Publish
from pipelines.recipe import Recipe
from titan_ext.config import FLAVORS, ModelDims

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
WATCH_SECONDS = 2.0
StepName = Literal["fetch", "items", "data", "pretrain", "midtrain", "sft", "qat", "export", "eval", "report"]


@dataclass(frozen=True)
class Run:
    """Run a recipe the whole way, or part of it. The same command again continues where it stopped."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path | None = None
    """Run folder; runs/RECIPE if not given."""
    until: StepName | None = None
    """Stop after this step."""
    from_: Annotated[StepName | None, tyro.conf.arg(name="from")] = None
    """Compute this step and those after it anew."""
    json: bool = False
    """Print the run's status as one JSON object on stdout at the end."""


@dataclass(frozen=True)
class Status:
    """Steps, progress, tokens, loss and time left of a run; works while it runs."""

    run: tyro.conf.Positional[Path]
    json: bool = False
    """One JSON object on stdout."""
    watch: bool = False
    """Refresh until the driver has ended."""


@dataclass(frozen=True)
class Report:
    """Write the report of a run again, from what is there."""

    run: tyro.conf.Positional[Path]
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True)
class Recipes:
    """List the recipes and what each needs."""

    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True)
class Eval:
    """Run a benchmark suite on a Hugging Face model folder."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder with config.json, safetensors and tokenizer, for example RUN/artifacts/int4."""
    suite: str = EvaluationConfig.suite
    out: Path | None = None
    """Folder of the results; CHECKPOINT-SUITE beside the checkpoint if not given."""
    limit: int | None = None
    """Items a task; all if not given."""
    batch_size: int = EvaluationConfig.batch_size
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True)
class Export:
    """Turn a checkpoint of a run, a Hugging Face folder or an imported one into bf16, INT4 or an ExecuTorch program."""

    checkpoint: tyro.conf.Positional[Path]
    """Step folder inside a run, for example RUN/stages/3_sft/checkpoint/step-60; a Hugging Face folder, INT4 or BF16;
    or what `mobilemoe import` wrote. The numbers of a model that is or was INT4 are kept bit for bit."""
    format: Annotated[
        Literal[tuple(FORMATS)],
        tyro.conf.arg(help="; ".join(f"{name}: {entry.description}" for name, entry in FORMATS.items())),
    ]
    out: Path
    """Folder to write; must not exist."""
    device: Annotated[DeviceConfig, tyro.conf.arg(name="")]
    """For executorch."""
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True)
class Import:
    """Turn a released-format folder, BF16 or INT4, into a checkpoint that training starts from."""

    folder: tyro.conf.Positional[Path]
    """Hugging Face folder with config.json and safetensors."""
    out: Path
    """DCP folder to write; must not exist."""
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True)
class Info:
    """Sizes and costs of a flavor (S, M, L, tiny), or of any dimensions, beside the published ones."""

    model: Annotated[ModelDims, tyro.conf.arg(name="")]
    context: int | None = None
    """Positions of the KV cache, and of the attention in inference; 2048, or what the model has, if not given."""
    seq_len: int | None = None
    """Tokens of a training sequence; 2048, or what the model has, if not given."""
    json: bool = False
    """One JSON object on stdout."""


COMMANDS = {
    "run": Run, "status": Status, "report": Report, "recipes": Recipes, "info": Info, "eval": Eval, "export": Export,
    "import": Import, "profile": Profile, "publish": Publish, "fetch": Fetch,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do, and answer with the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return DONE if arguments else REFUSED
        name, *rest = arguments
        _require_known("command", name, COMMANDS)
        return HANDLERS[name](rest)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command continues", INTERRUPTED)
    except ValueError as error:
        return _complain(f"refused: {error}", REFUSED)


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:8} {(kind.__doc__ or '').splitlines()[0]}" for name, kind in COMMANDS.items()]
    return "\n".join(["usage: mobilemoe COMMAND ...  (mobilemoe COMMAND --help says more)", "", *lines])


def _complain(text: str, code: int) -> int:
    Console(stderr=True, soft_wrap=True).print(escape(text), highlight=False)
    return code


def _require_known(kind: str, name: str, choices: Any) -> None:
    if name not in choices:
        close = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise RefusedInput(f"{name!r} is no {kind}; choose one of {', '.join(choices)}.{hint}")


def _parse(kind: type, arguments: Sequence[str], name: str, default: Any = tyro.MISSING_NONPROP) -> Any:
    """tyro's parser; a wrong option makes it print the closest ones and exit with 2."""
    return tyro.cli(
        kind, args=arguments, default=default, prog=f"mobilemoe {name}", description=kind.__doc__,
        config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip


def _answer(as_json: bool, value: dict[str, Any], show: Callable[[], Any]) -> None:
    if as_json:
        print(json.dumps(value))
    else:
        Console(soft_wrap=False).print(show())


def _run(arguments: Sequence[str]) -> int:
    from pipelines.recipes import RECIPES

    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: mobilemoe run RECIPE [--out DIR] [--until STEP] [--from STEP] [overrides]\n\n"
            f"RECIPE: {', '.join(RECIPES)}; mobilemoe run RECIPE --help lists every override"
        )
        return DONE if arguments else REFUSED
    name, *rest = arguments
    _require_known("recipe", name, RECIPES)
    command = _parse(Run, rest, f"run {name}", Run(recipe=RECIPES[name].build()))

    from pipelines.commands.driver import run_recipe
    from pipelines.engine.steps import StepFailed
    from pipelines.progress import table

    out = (command.out or Path("runs") / name).absolute()
    try:
        status = run_recipe(command.recipe, out, until=command.until, restart_from=command.from_)
    except StepFailed as error:
        return _complain(f"step {error.step} failed: {error}\nlogs: {out / 'logs'}; the same command continues", FAILED)
    _answer(command.json, status.to_dict(), lambda: table(status))
    return DONE


def _status(arguments: Sequence[str]) -> int:
    command = _parse(Status, arguments, "status")
    from pipelines.progress import read_status, table

    status = read_status(command.run)
    if command.watch:
        if command.json:
            raise RefusedInput("--watch --json: a watch has no single answer; drop one of them")
        with Live(table(status), console=Console()) as live:
            while status.driver:
                time.sleep(WATCH_SECONDS)
                status = read_status(command.run)
                live.update(table(status))
        return DONE
    _answer(command.json, status.to_dict(), lambda: table(status))
    return DONE


def _report(arguments: Sequence[str]) -> int:
    command = _parse(Report, arguments, "report")
    if not (command.run / "manifest.json").exists():
        raise RefusedInput(
            f"{command.run}: no manifest.json, so no run; give the folder that `mobilemoe run --out` named"
        )
    from eval.report.run_report import write_report

    results = write_report(command.run)
    _answer(command.json, results, lambda: f"report written to {command.run / 'report'}")
    return DONE


def _recipes(arguments: Sequence[str]) -> int:
    command = _parse(Recipes, arguments, "recipes")
    from pipelines.recipes import RECIPES

    listed = {name: {"summary": entry.summary, "needs": entry.needs} for name, entry in RECIPES.items()}
    text = "\n".join(
        f"{name:6} {entry.summary}\n" + "".join(f"         needs {need}\n" for need in entry.needs.splitlines())
        for name, entry in RECIPES.items()
    )
    _answer(command.json, listed, lambda: escape(text))
    return DONE


def _eval(arguments: Sequence[str]) -> int:
    command = _parse(Eval, arguments, "eval")
    from eval.benchmarks.suites import SUITES

    _require_known("suite", command.suite, SUITES)
    if not (command.checkpoint / "config.json").is_file():
        raise RefusedInput(
            f"{command.checkpoint}: no config.json, so no Hugging Face model; turn a run's checkpoint into one with "
            "`mobilemoe export`"
        )
    config = EvaluationConfig(suite=command.suite, limit=command.limit, batch_size=command.batch_size)
    out = command.out or command.checkpoint.with_name(f"{command.checkpoint.name}-{command.suite}")
    from pipelines.commands.standalone import evaluate_folder

    results = evaluate_folder(command.checkpoint, out, config)
    lines = [
        f"{key:14} {100 * result['value']:6.1f}  ({result['metric']}, {result['shots']} shots)"
        for key, result in results.items()
    ]
    _answer(command.json, results, lambda: "\n".join([*lines, f"results in {out}"]))
    return DONE


def _export(arguments: Sequence[str]) -> int:
    command = _parse(Export, arguments, "export")
    if not FORMATS[command.format].takes_device_options and command.device != DeviceConfig():
        raise RefusedInput(
            f"--format {command.format} has no KV cache and no expert op; those options are executorch's"
        )
    from pipelines.commands.standalone import export_checkpoint

    export_checkpoint(command.checkpoint, command.format, command.out, command.device)
    _answer(command.json, {"out": str(command.out), "format": command.format}, lambda: f"written: {command.out}")
    return DONE


def _profile(arguments: Sequence[str]) -> int:
    command = _parse(Profile, arguments, "profile")
    texts = json.loads(command.prompts.read_text()) if command.prompts else None
    if texts is not None and not (isinstance(texts, dict) and all(isinstance(t, str) for t in texts.values())):
        raise RefusedInput(f"--prompts {command.prompts}: expected a JSON object, domain -> text")
    try:
        contexts = [int(n) for n in command.contexts.split(",")] if command.contexts else None
    except ValueError as error:
        raise RefusedInput(f"--contexts {command.contexts}: give numbers of tokens with commas, 512,1024") from error
    from eval.device import profile

    out = command.out or command.artifact.with_name(f"{command.artifact.name}-profile")
    result = profile.profile(
        command.artifact, out, texts=texts, contexts=contexts, repetitions=command.repetitions,
        threads=command.threads, progress=_tell,
    )  # fmt: skip
    _answer(command.json, result, lambda: profile.table(result))
    return DONE


def _publish(arguments: Sequence[str]) -> int:
    command = _parse(Publish, arguments, "publish")
    from pipelines.commands.artifacts import publish

    addresses = publish(command.source, command.destination, _tell)
    _answer(command.json, {"published": addresses}, lambda: "published: " + ", ".join(addresses))
    return DONE


def _fetch(arguments: Sequence[str]) -> int:
    command = _parse(Fetch, arguments, "fetch")
    from pipelines.commands.artifacts import fetch

    fetch(command.source, command.folder, _tell)
    _answer(command.json, {"fetched": str(command.folder)}, lambda: f"fetched: {command.folder}")
    return DONE


def _tell(phase: str, done: int, total: int) -> None:
    print(f"{done}/{total} {phase}", file=sys.stderr)


def _import(arguments: Sequence[str]) -> int:
    command = _parse(Import, arguments, "import")
    from eval.export.import_hf import import_folder

    dims = import_folder(command.folder, command.out)
    _answer(
        command.json, {"out": str(command.out), "dimensions": asdict(dims)}, lambda: f"written: {command.out}\n{dims}"
    )
    return DONE


def _info(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: mobilemoe info [FLAVOR] [--context N] [--seq-len N] [--json] [dimensions]\n\n"
            f"FLAVOR: {', '.join(FLAVORS)}; mobilemoe info FLAVOR --help lists every dimension.\n"
            "Without FLAVOR the dimensions that differ from flavor to flavor must all be given"
        )
        return DONE if arguments else REFUSED
    if arguments[0].startswith("-"):
        name, command = "", _parse(Info, arguments, "info")
    else:
        given, *rest = arguments
        name = next((flavor for flavor in FLAVORS if flavor.lower() == given.lower()), given)
        _require_known("flavor", name, FLAVORS)
        command = _parse(Info, rest, f"info {name}", Info(model=FLAVORS[name]))
    from pipelines.commands.info import describe, table
    from pipelines.validate import check_model

    check_model(command.model)
    lengths = [min(2048, command.model.max_seq_len) if n is None else n for n in (command.context, command.seq_len)]
    described = describe(command.model, context=lengths[0], seq_len=lengths[1])
    title = name if command.model == FLAVORS.get(name) else f"{name}, changed" if name else "of these dimensions"
    _answer(command.json, described, lambda: table(title, described))
    return DONE


HANDLERS = {
    "run": _run, "status": _status, "report": _report, "recipes": _recipes, "info": _info, "eval": _eval,
    "export": _export, "import": _import, "profile": _profile, "publish": _publish, "fetch": _fetch,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
