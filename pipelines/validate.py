"""Refuse a recipe that cannot run, before anything starts: every problem at once, each with its way out."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import RefusedInput
from pipelines.recipe import Recipe
from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.quantization.config import QuantizationConfig

MIXTURE_TOLERANCE = 1e-6
_DEGREES = ("pipeline_parallel", "data_parallel_replicate", "tensor_parallel", "context_parallel")


@dataclass(frozen=True)
class Problem:
    """One broken rule: which field, what it holds, what must hold, what to do."""

    field: str
    value: Any
    rule: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.rule}; {self.way_out}"


class InvalidRecipe(RefusedInput):
    """The recipe breaks rules; `problems` holds them all."""

    def __init__(self, name: str, problems: list[Problem]):
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"recipe {name!r} cannot run, {len(problems)} problem(s):\n{lines}")


def validate(recipe: Recipe) -> None:
    """Check everything that can be known without running.

    Raises:
        InvalidRecipe (a RefusedInput): lists every problem found.
    """
    problems = list(find_problems(recipe))
    if problems:
        raise InvalidRecipe(recipe.name, problems)


def check_model(model: ModelDims) -> None:
    """Check dimensions on their own, as `mobilemoe info` takes them.

    Raises:
        RefusedInput: lists every problem found, by the options of that command.
    """
    if problems := [*_model(model), *_quantization(QuantizationConfig(), model)]:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        options = re.sub(r"\bmodel\.([a-z_.]+)", lambda field: "--" + field[1].replace("_", "-"), lines)
        raise RefusedInput(f"no model has these dimensions, {len(problems)} problem(s):\n{options}")


def find_problems(recipe: Recipe) -> Iterator[Problem]:
    """Every broken rule of the recipe, in the order of its fields."""
    yield from _model(recipe.model)
    yield from _positive("parallel", recipe.parallel, ("world_size", "expert_parallel", *_DEGREES))
    for name, stage in recipe.stages.items():
        numbers = ("seq_len", "global_batch_size", "local_batch_size", "learning_rate")
        yield from _positive(
            f"stages.{name}", stage, (*numbers, "checkpoint_interval", "heldout_interval", "log_interval")
        )
    yield from _parallel(recipe.model, recipe.parallel)
    for name, stage in recipe.stages.items():
        yield from _stage(name, stage, recipe)
    yield from _stage_order(recipe)
    yield from _start(recipe)
    yield from _data(recipe)
    yield from _evaluation(recipe)
    yield from _quantization(recipe.quantization, recipe.model)
    yield from _cluster(recipe)


def _positive(prefix: str, config: Any, names: tuple[str, ...]) -> Iterator[Problem]:
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            yield Problem(f"{prefix}.{name}", value, "must be above 0 and finite", "set a positive number")


def _divides(small: int, large: int) -> bool:
    """Whether large is a multiple of small; a zero is reported by `_positive`, not here."""
    return small <= 0 or large % small == 0


def _divisors(number: int, limit: int = 12) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)[: limit * 6]


def _model(model: ModelDims) -> Iterator[Problem]:
    yield from _positive("model", model, ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "top_k"))
    yield from _positive("model", model, ("expert_hidden", "shared_hidden", "n_experts", "vocab_size", "max_seq_len"))
    yield from _positive("model", model, ("rope_theta", "norm_eps", "route_scale"))
    scaling = model.rope_scaling
    yield from _positive("model.rope_scaling", scaling, tuple(field.name for field in dataclasses.fields(scaling)))
    if model.top_k > model.n_experts:
        rule = f"cannot choose more experts than model.n_experts = {model.n_experts}"
        yield Problem("model.top_k", model.top_k, rule, f"set it to at most {model.n_experts}")
    if not _divides(model.n_kv_heads, model.n_heads):
        rule = f"model.n_heads = {model.n_heads} must be a multiple of it"
        yield Problem("model.n_kv_heads", model.n_kv_heads, rule, f"choose one of {_divisors(model.n_heads)}")
    if model.head_dim % 2:
        yield Problem("model.head_dim", model.head_dim, "RoPE rotates pairs, so it must be even", "set an even number")


def _parallel(model: ModelDims, parallel: ParallelConfig) -> Iterator[Problem]:
    ep, world = parallel.expert_parallel, parallel.world_size
    if not _divides(ep, model.n_experts):
        rule = f"model.n_experts = {model.n_experts} must be a multiple of it"
        yield Problem("parallel.expert_parallel", ep, rule, f"choose one of {_divisors(model.n_experts)}")
    if not _divides(parallel.tensor_parallel, model.n_kv_heads):
        rule = f"model.n_kv_heads = {model.n_kv_heads} must be a multiple of it"
        yield Problem(
            "parallel.tensor_parallel", parallel.tensor_parallel, rule, f"choose one of {_divisors(model.n_kv_heads)}"
        )
    if parallel.pipeline_stages > model.n_layers:
        rule = f"{parallel.pipeline_schedule} makes {parallel.pipeline_stages} stages of model.n_layers = "
        rule += f"{model.n_layers}, and each needs a layer"
        most = model.n_layers * parallel.pipeline_parallel // parallel.pipeline_stages
        yield Problem("parallel.pipeline_parallel", parallel.pipeline_parallel, rule, f"set it to at most {most}")
    split = math.prod(getattr(parallel, degree) for degree in _DEGREES)
    copies = parallel.pipeline_parallel * parallel.data_parallel_replicate
    if split > 1 and not _divides(split, world):
        rule = f"must be a multiple of {' x '.join(_DEGREES)} = {split}"
        yield Problem("parallel.world_size", world, rule, f"set it to {math.ceil(world / split) * split}, say")
    elif not _divides(ep, replica := world // max(copies, 1)):
        rule = f"the {replica} ranks of a replica (world_size / pipeline_parallel / data_parallel_replicate) must be a "
        way_out = f"choose one of {_divisors(replica)}, or another world size"
        yield Problem("parallel.expert_parallel", ep, rule + "multiple of it", way_out)


def _stage(name: str, stage: StageConfig, recipe: Recipe) -> Iterator[Problem]:
    prefix, model, parallel = f"stages.{name}", recipe.model, recipe.parallel
    if stage.seq_len > model.max_seq_len:
        rule = f"longer than model.max_seq_len = {model.max_seq_len}"
        yield Problem(f"{prefix}.seq_len", stage.seq_len, rule, "shorten it, or raise model.max_seq_len")
    parts = parallel.tensor_parallel * (2 * parallel.context_parallel if parallel.context_parallel > 1 else 1)
    if not _divides(parts, stage.seq_len):
        rule = f"must be a multiple of {parts}, for tensor and twice context parallelism split it"
        yield Problem(f"{prefix}.seq_len", stage.seq_len, rule, f"set it to {math.ceil(stage.seq_len / parts) * parts}")
    micro_batch = stage.local_batch_size * parallel.data_parallel
    if not _divides(micro_batch, stage.global_batch_size):
        rule = (
            f"must be a multiple of local_batch_size x ranks that read data = {stage.local_batch_size} x "
            f"{parallel.data_parallel} = {micro_batch}"
        )
        multiple = max(1, math.ceil(stage.global_batch_size / micro_batch)) * micro_batch
        yield Problem(f"{prefix}.global_batch_size", stage.global_batch_size, rule, f"set it to {multiple}, say")
    elif micro_batch > 0:
        yield from _micro_batches(f"{prefix}.global_batch_size", stage, parallel)
    if stage.warmup_steps >= stage.steps > 0:
        rule = f"must be below {prefix}.steps = {stage.steps}"
        yield Problem(f"{prefix}.warmup_steps", stage.warmup_steps, rule, f"set it to {stage.steps // 10}, say")
    if stage.capacity_factor is not None and stage.capacity_factor < 1:
        rule = "below 1 tokens are dropped even where the routing is balanced"
        yield Problem(f"{prefix}.capacity_factor", stage.capacity_factor, rule, "set 1.5, or None to drop nothing")
    if stage.skip_spikes_sigma is not None and stage.skip_spikes_sigma <= 0:
        rule = "is a number of standard deviations, so it must be above 0"
        yield Problem(f"{prefix}.skip_spikes_sigma", stage.skip_spikes_sigma, rule, "set 6, or None to skip nothing")
    yield from _mixture(f"{prefix}.mixture", stage.mixture)
    if stage.shards not in ("pretrain", "midtrain", "sft"):
        rule = "is no folder that the data step writes"
        yield Problem(f"{prefix}.shards", stage.shards, rule, "choose pretrain, midtrain or sft")
    if stage.quantize and parallel.tensor_parallel > 1:
        rule = f"{prefix}.quantize rounds whole tokens to INT8, and tensor parallelism splits them"
        yield Problem("parallel.tensor_parallel", parallel.tensor_parallel, rule, "set it to 1")
    yield from _distillation(prefix, stage, parallel)


def _distillation(prefix: str, stage: StageConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    field, weight = f"{prefix}.distillation_weight", stage.distillation_weight
    if not 0 <= weight <= 1:
        rule = "is the teacher's share of the loss, so it must lie between 0 and 1"
        yield Problem(field, weight, rule, "set 0.5, say, or 0 for no teacher")
    if weight > 0 and not stage.quantize:
        rule = "the teacher is the unquantized model, so only the stage that quantizes has one"
        yield Problem(field, weight, rule, "set it to 0")
    if weight > 0 and parallel.pipeline_parallel > 1:
        rule = f"{field} is above 0, and a teacher is not split into pipeline stages"
        way_out = f"set it to 1, or {field} to 0"
        yield Problem("parallel.pipeline_parallel", parallel.pipeline_parallel, rule, way_out)


def _micro_batches(field: str, stage: StageConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """A pipeline's ranks all have work only if there is a micro-batch for each; torch counts the interleaved ones."""
    ranks, micro_batch = parallel.pipeline_parallel, stage.local_batch_size * parallel.data_parallel
    micro_batches = stage.global_batch_size // micro_batch
    if ranks > 1 and micro_batches < ranks:
        rule = f"makes {micro_batches} micro-batch(es) of local_batch_size = {stage.local_batch_size}, and "
        rule += f"parallel.pipeline_parallel = {ranks} needs one for each of its ranks"
        way_out = f"set it to at least {ranks * micro_batch}, or lower local_batch_size or pipeline_parallel"
        yield Problem(field, stage.global_batch_size, rule, way_out)
    elif parallel.pipeline_schedule == "Interleaved1F1B" and ranks > 1 and micro_batches % (micro_batches // ranks):
        rule = f"makes {micro_batches} micro-batches, which Interleaved1F1B cannot take in "
        rule += f"{micro_batches // ranks} equal rounds of parallel.pipeline_parallel = {ranks} or more"
        way_out = f"set it to {micro_batches // ranks * ranks * micro_batch}, say, or pipeline_schedule to 1F1B"
        yield Problem(field, stage.global_batch_size, rule, way_out)


def _mixture(field: str, mixture: dict[str, float]) -> Iterator[Problem]:
    for domain, share in mixture.items():
        if not 0 <= share <= 1:
            yield Problem(f"{field}.{domain}", share, "a share lies between 0 and 1", "set such a share")
    total = math.fsum(mixture.values())
    if abs(total - 1) > MIXTURE_TOLERANCE:
        way_out = f"change a share of {', '.join(mixture)} by {1 - total:+.6g}"
        yield Problem(field, round(total, 6), "the shares must sum to 1", way_out)


def _stage_order(recipe: Recipe) -> Iterator[Problem]:
    pretrain, midtrain = recipe.stages.pretrain, recipe.stages.midtrain
    if midtrain.seq_len < pretrain.seq_len:
        rule = f"the context must not shrink after pre-training's {pretrain.seq_len}"
        yield Problem("stages.midtrain.seq_len", midtrain.seq_len, rule, f"set at least {pretrain.seq_len}")
    for name, stage in recipe.stages.items():
        if stage.quantize != (name == "qat"):
            rule = "the qat stage quantizes, and no other stage does"
            yield Problem(f"stages.{name}.quantize", stage.quantize, rule, f"set it to {name == 'qat'}")


def _start(recipe: Recipe) -> Iterator[Problem]:
    """Where training starts: every stage trains, or the first ones pass on an initial model."""
    passes_on = bool(recipe.initial_model)
    for name, stage in recipe.stages.items():
        passes_on = passes_on and stage.steps == 0 and name != "qat"
        if stage.steps <= 0 and not passes_on:
            rule = "must be above 0; only the first stages, and never qat, may pass on an initial_model with 0 steps"
            yield Problem(f"stages.{name}.steps", stage.steps, rule, "set a positive number, or --initial-model FOLDER")
    if recipe.initial_model:
        yield from _initial_model(Path(recipe.initial_model), recipe)


def _initial_model(folder: Path, recipe: Recipe) -> Iterator[Problem]:
    if not recipe.data.tokenizer.path:
        rule = "a model that is trained already knows the tokens of its own tokenizer"
        yield Problem("data.tokenizer.path", "", rule, f"give the one it was trained with, {folder} if it is there")
    from eval.export.dimensions import dims_from_config
    from eval.export.tensor_files import read_config

    try:
        found = dataclasses.asdict(dims_from_config(read_config(folder)))
    except ValueError as error:
        yield Problem("initial_model", str(folder), str(error), "give a folder in the released format")
        return
    for name, wanted in dataclasses.asdict(recipe.model).items():
        if found[name] != wanted:
            rule = f"initial_model {folder} has {found[name]!r}"
            yield Problem(f"model.{name}", wanted, rule, "give the recipe the model's own dimensions")


def _quantization(quantization: QuantizationConfig, model: ModelDims) -> Iterator[Problem]:
    expert_widths = {"model.d_model": model.d_model, "model.expert_hidden": model.expert_hidden}
    widths = expert_widths | {
        "model.shared_hidden": model.shared_hidden,
        "model.n_heads x model.head_dim": model.n_heads * model.head_dim,
    }
    yield from _group("quantization.group_size", quantization.group_size, widths)
    if quantization.expert_group_size is not None:
        yield from _group("quantization.expert_group_size", quantization.expert_group_size, expert_widths)
    if quantization.expert_group_axis not in ("in", "out"):
        yield Problem(
            "quantization.expert_group_axis", quantization.expert_group_axis, "names no axis", "choose in or out"
        )


def _group(field: str, group_size: int, widths: dict[str, int]) -> Iterator[Problem]:
    if group_size <= 0 or group_size % 2:
        yield Problem(field, group_size, "INT4 values are packed in pairs, so it must be even and above 0", "set 32")
        return
    for name, width in widths.items():
        if width % group_size:
            rule = f"must divide {name} = {width}"
            fits = math.gcd(*widths.values())
            yield Problem(field, group_size, rule, f"choose an even divisor of {fits}, or another {name}")


def _data(recipe: Recipe) -> Iterator[Problem]:
    from data import validate_config

    try:
        validate_config.check(recipe.data)
    except ValueError as error:
        yield Problem("data", recipe.name, str(error), "correct the field named")
        return
    yield from _domains(recipe)
    if recipe.data.tokenizer.path:
        field, size = "data.tokenizer.path", tokenizer_size(Path(recipe.data.tokenizer.path))
        value: Any = recipe.data.tokenizer.path
    else:
        field, size = "data.tokenizer.train_vocab_size", recipe.data.tokenizer.train_vocab_size
        value = size
    if size > recipe.model.vocab_size:
        rule = f"the tokenizer has {size} entries, model.vocab_size = {recipe.model.vocab_size} has no row for them all"
        yield Problem(field, value, rule, f"choose a smaller tokenizer, or set --model.vocab-size {size}")
    if not recipe.data.tokenizer.path and size < recipe.model.vocab_size:
        rule = f"a tokenizer of {size} entries leaves rows of model.vocab_size = {recipe.model.vocab_size} unused"
        yield Problem(field, value, rule, "give --data.tokenizer.path, or give both the same value")


def _domains(recipe: Recipe) -> Iterator[Problem]:
    from data.catalogue.corpora import CATALOGUE

    corpora = [CATALOGUE[name] for name in recipe.data.corpora]
    for name, stage in recipe.stages.items():
        kind = "sft" if stage.shards == "sft" else "text"
        there = sorted({corpus.domain for corpus in corpora if corpus.kind == kind})
        for domain, share in stage.mixture.items():
            if share and domain not in there:
                rule = f"no corpus of data.corpora gives {kind} of this domain (they give {', '.join(there)})"
                yield Problem(f"stages.{name}.mixture.{domain}", share, rule, "add a corpus, or set the share to 0")


def tokenizer_size(path: Path) -> int:
    """Highest token id + 1 of a tokenizer.json, or of the one in a folder.

    Raises:
        RefusedInput: there is no such file, or it is no tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise RefusedInput(
            f"data.tokenizer.path = {str(path)!r}: {file} does not exist; give a folder with tokenizer.json"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        added = [token["id"] for token in content.get("added_tokens", [])]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RefusedInput(f"data.tokenizer.path: {file} is no Hugging Face tokenizer.json ({error!r})") from error
    ids = list(vocab.values()) if isinstance(vocab, dict) else range(len(vocab))
    return max([*ids, *added], default=-1) + 1


def _evaluation(recipe: Recipe) -> Iterator[Problem]:
    from eval.benchmarks.suites import SUITES

    config = recipe.evaluation
    if config.suite not in SUITES:
        yield Problem("evaluation.suite", config.suite, "is no suite", f"choose one of {', '.join(sorted(SUITES))}")
    if config.limit is not None and config.limit <= 0:
        yield Problem("evaluation.limit", config.limit, "must be above 0", "leave it out to take all items")
    yield from _positive("evaluation", config, ("batch_size", "heldout_tokens"))


def _cluster(recipe: Recipe) -> Iterator[Problem]:
    cluster = recipe.cluster
    yield from _positive("cluster", cluster, ("cpus_per_worker", "cpus_per_task"))
    if cluster.gpus_per_worker not in (0, 1):
        rule = "a rank drives one GPU or none"
        yield Problem("cluster.gpus_per_worker", cluster.gpus_per_worker, rule, "set 0 or 1")
    if cluster.max_failures < 0:
        yield Problem("cluster.max_failures", cluster.max_failures, "must not be negative", "set 0 for no restart")
