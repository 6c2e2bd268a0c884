"""Rules for the model's dimensions, the parallelism and the four training stages."""

import dataclasses
import math
from collections.abc import Iterator

from core.stages import SHARD_FOLDERS
from eval.config import N_ANSWER
from eval.export.formats import FORMATS, PACKAGED
from pipelines.recipe import Recipe
from pipelines.validation.problems import Problem, divides, find_nonpositive, list_divisors
from titan_ext.cards import CARDS
from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.quantization.config import FLOAT8_MULTIPLE, QuantizationConfig

MIXTURE_TOLERANCE = 1e-6
"""Largest distance from 1 of a sum of shares; decimal fractions do not add up exactly."""
DEGREES = ("pipeline_parallel", "data_parallel_replicate", "tensor_parallel", "context_parallel")
"""Degrees of ParallelConfig whose product must divide the world size."""


def find_model_problems(model: ModelDims) -> Iterator[Problem]:
    """Yield the broken rules of the model's dimensions."""
    yield from find_nonpositive("model", model, ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "top_k"))
    yield from find_nonpositive("model", model, ("expert_hidden", "n_experts", "vocab_size", "max_seq_len"))
    if model.shared_hidden < 0:
        yield Problem(
            "model.shared_hidden", model.shared_hidden, "must not be negative", "set the width, or 0 for none"
        )
    yield from find_nonpositive("model", model, ("rope_theta", "norm_eps", "route_scale"))
    scaling = model.rope_scaling
    yield from find_nonpositive(
        "model.rope_scaling", scaling, tuple(field.name for field in dataclasses.fields(scaling))
    )
    if model.top_k > model.n_experts:
        rule = f"cannot choose more experts than model.n_experts = {model.n_experts}"
        yield Problem("model.top_k", model.top_k, rule, f"set it to at most {model.n_experts}")
    if not divides(model.n_kv_heads, model.n_heads):
        rule = f"model.n_heads = {model.n_heads} must be a multiple of it"
        yield Problem("model.n_kv_heads", model.n_kv_heads, rule, f"choose one of {list_divisors(model.n_heads)}")
    if model.head_dim % 2:
        yield Problem("model.head_dim", model.head_dim, "RoPE rotates pairs, so it must be even", "set an even number")


def find_release_problems(model: ModelDims) -> Iterator[Problem]:
    """Yield a problem if the released checkpoint format, in which a run exports its model, cannot hold the model."""
    if model.shared_hidden == 0:
        rule = "the released format has a shared expert in every layer; models without one train in a sweep only"
        yield Problem("model.shared_hidden", 0, rule, "set a width, model.expert_hidden x 4, say")


def find_parallel_problems(model: ModelDims, parallel: ParallelConfig) -> Iterator[Problem]:
    """Yield the broken rules of the parallelism, on its own and for this model."""
    ep, world = parallel.expert_parallel or 1, parallel.world_size  # what is left open is chosen to keep the rules
    if not divides(ep, model.n_experts):
        rule = f"model.n_experts = {model.n_experts} must be a multiple of it"
        yield Problem("parallel.expert_parallel", ep, rule, f"choose one of {list_divisors(model.n_experts)}")
    if not divides(parallel.tensor_parallel, model.n_kv_heads):
        rule = f"model.n_kv_heads = {model.n_kv_heads} must be a multiple of it"
        yield Problem(
            "parallel.tensor_parallel",
            parallel.tensor_parallel,
            rule,
            f"choose one of {list_divisors(model.n_kv_heads)}",
        )
    if parallel.pipeline_stages > model.n_layers:
        rule = f"{parallel.pipeline_schedule} makes {parallel.pipeline_stages} stages of model.n_layers = "
        rule += f"{model.n_layers}, and each needs a layer"
        most = model.n_layers * parallel.pipeline_parallel // parallel.pipeline_stages
        yield Problem("parallel.pipeline_parallel", parallel.pipeline_parallel, rule, f"set it to at most {most}")
    split = math.prod(getattr(parallel, degree) or 1 for degree in DEGREES)
    copies = parallel.pipeline_parallel * (parallel.data_parallel_replicate or 1)
    if split > 1 and not divides(split, world):
        rule = f"must be a multiple of {' x '.join(DEGREES)} = {split}"
        yield Problem("parallel.world_size", world, rule, f"set it to {math.ceil(world / split) * split}, say")
    elif not divides(ep, replica := world // max(copies, 1)):
        rule = f"the {replica} ranks of a replica (world_size / pipeline_parallel / data_parallel_replicate) must be a "
        way_out = f"choose one of {list_divisors(replica)}, or another world size"
        yield Problem("parallel.expert_parallel", ep, rule + "multiple of it", way_out)


def find_stage_problems(name: str, stage: StageConfig, recipe: Recipe) -> Iterator[Problem]:
    """Yield the broken rules of one training stage, on its own and for the recipe's model and parallelism."""
    prefix, model, parallel = f"stages.{name}", recipe.model, recipe.parallel
    if stage.seq_len > model.max_seq_len:
        rule = f"longer than model.max_seq_len = {model.max_seq_len}"
        yield Problem(f"{prefix}.seq_len", stage.seq_len, rule, "shorten it, or raise model.max_seq_len")
    parts = parallel.tensor_parallel * (2 * parallel.context_parallel if parallel.context_parallel > 1 else 1)
    if not divides(parts, stage.seq_len):
        rule = f"must be a multiple of {parts}, for tensor and twice context parallelism split it"
        yield Problem(f"{prefix}.seq_len", stage.seq_len, rule, f"set it to {math.ceil(stage.seq_len / parts) * parts}")
    micro_batch = stage.local_batch_size * parallel.data_parallel
    if not divides(micro_batch, stage.global_batch_size):
        rule = (
            f"must be a multiple of local_batch_size x ranks that read data = {stage.local_batch_size} x "
            f"{parallel.data_parallel} = {micro_batch}"
        )
        multiple = max(1, math.ceil(stage.global_batch_size / micro_batch)) * micro_batch
        yield Problem(f"{prefix}.global_batch_size", stage.global_batch_size, rule, f"set it to {multiple}, say")
    elif micro_batch > 0:
        yield from _find_micro_batch_problems(f"{prefix}.global_batch_size", stage, parallel)
    if stage.warmup_steps >= stage.steps > 0:
        rule = f"must be below {prefix}.steps = {stage.steps}"
        yield Problem(f"{prefix}.warmup_steps", stage.warmup_steps, rule, f"set it to {stage.steps // 10}, say")
    yield from _find_decay_problems(prefix, stage)
    if stage.capacity_factor is not None and stage.capacity_factor < 1:
        rule = "below 1 tokens are dropped even where the routing is balanced"
        yield Problem(f"{prefix}.capacity_factor", stage.capacity_factor, rule, "set 1.5, or None to drop nothing")
    if stage.skip_spikes_sigma is not None and stage.skip_spikes_sigma <= 0:
        rule = "is a number of standard deviations, so it must be above 0"
        yield Problem(f"{prefix}.skip_spikes_sigma", stage.skip_spikes_sigma, rule, "set 6, or None to skip nothing")
    yield from _find_checkpoint_problems(prefix, stage)
    yield from _find_mixture_problems(f"{prefix}.mixture", stage.mixture)
    if stage.shards not in SHARD_FOLDERS:
        rule = "is no folder that the data step writes"
        yield Problem(f"{prefix}.shards", stage.shards, rule, "choose pretrain, midtrain or sft")
    if stage.quantize and parallel.tensor_parallel > 1:
        rule = f"{prefix}.quantize rounds whole tokens to INT8, and tensor parallelism splits them"
        yield Problem("parallel.tensor_parallel", parallel.tensor_parallel, rule, "set it to 1")
    if stage.float8:
        yield from _find_float8_problems(prefix, stage, recipe)
    yield from _find_distillation_problems(prefix, stage, parallel)


def _find_float8_problems(prefix: str, stage: StageConfig, recipe: Recipe) -> Iterator[Problem]:
    """Yield the reasons for which a stage cannot compute its products in float8."""
    field, model, parallel, cluster = f"{prefix}.float8", recipe.model, recipe.parallel, recipe.cluster
    if stage.quantize:
        yield Problem(field, True, f"{prefix}.quantize rounds the same products to INT4 and INT8", "set it to False")
    if parallel.precision != "bfloat16":
        yield Problem("parallel.precision", parallel.precision, f"{field} gives bfloat16 products", "set bfloat16")
    if parallel.tensor_parallel > 1:
        rule = f"{field} scales whole rows, and tensor parallelism splits them"
        yield Problem("parallel.tensor_parallel", parallel.tensor_parallel, rule, "set it to 1")
    if cluster.gpus_per_worker and cluster.gpu in CARDS and CARDS[cluster.gpu].float8_peak is None:
        able = ", ".join(name for name, card in CARDS.items() if card.float8_peak is not None)
        rule = f"cluster.gpu = {cluster.gpu} has no grouped float8 products; {able} have"
        yield Problem(field, True, rule, "set it to False")
    if not cluster.gpus_per_worker and parallel.compile:
        rule = f"{field} is emulated on the CPU, by operations that do not compile"
        yield Problem("parallel.compile", True, rule, "set it to False")
    widths = {name: getattr(model, name) for name in ("d_model", "expert_hidden", "shared_hidden")}
    widths |= {f"{name} x head_dim": getattr(model, name) * model.head_dim for name in ("n_heads", "n_kv_heads")}
    for name, width in widths.items():
        if width % FLOAT8_MULTIPLE:
            rule = f"model.{name} = {width} is no multiple of {FLOAT8_MULTIPLE}, which float8 products need"
            yield Problem(field, True, rule, "set it to False, or change the model")


def _find_checkpoint_problems(prefix: str, stage: StageConfig) -> Iterator[Problem]:
    """Yield the broken rules of when a stage saves, and of the benchmarks that need what it saved."""
    interval = stage.checkpoint_interval
    if interval == 0 and stage.checkpoint_minutes == 0:
        rule = f"with {prefix}.checkpoint_minutes = 0 it leaves no checkpoint before the last step"
        yield Problem(f"{prefix}.checkpoint_interval", interval, rule, "set one of them: 10 minutes, say")
    if interval > 0 and stage.benchmark_interval % interval:
        rule = f"must be a multiple of {prefix}.checkpoint_interval = {interval}, whose files it scores"
        multiple = math.ceil(stage.benchmark_interval / interval) * interval
        yield Problem(f"{prefix}.benchmark_interval", stage.benchmark_interval, rule, f"set it to {multiple}, or 0")
    elif interval == 0 and stage.benchmark_interval > 0:
        rule = f"scores checkpoints of known steps, and {prefix}.checkpoint_interval = 0 saves by time"
        way_out = f"set {prefix}.checkpoint_interval to it as well, or it to 0"
        yield Problem(f"{prefix}.benchmark_interval", stage.benchmark_interval, rule, way_out)


def _find_distillation_problems(prefix: str, stage: StageConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Yield the broken rules of a stage's teacher: its share of the loss, and where it can be."""
    field, weight = f"{prefix}.distillation_weight", stage.distillation_weight
    if not 0 <= weight <= 1:
        rule = "is the teacher's share of the loss, so it must lie between 0 and 1"
        yield Problem(field, weight, rule, "set 0.5, say, or 0 for no teacher")
    if weight > 0 and not stage.quantize:
        rule = "the teacher is the unquantized model, so only the stage that quantizes has one"
        yield Problem(field, weight, rule, "set it to 0")
    if weight > 0 and parallel.pipeline_parallel > 1:
        rule = f"{field} is above 0, and a teacher is not split into pipeline stages"
        yield Problem("parallel.pipeline_parallel", parallel.pipeline_parallel, rule, f"set it to 1, or {field} to 0")


def _find_micro_batch_problems(field: str, stage: StageConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """Yield a problem if the micro-batches leave a rank of the pipeline idle, or torch refuses their number."""
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


def _find_decay_problems(prefix: str, stage: StageConfig) -> Iterator[Problem]:
    if stage.steps <= 0 or not 0 < stage.decay_fraction < 1:
        return
    decay = round(stage.steps * stage.decay_fraction)
    if decay < 1:
        rule = f"leaves no step of {stage.steps} to decay in"
        yield Problem(f"{prefix}.decay_fraction", stage.decay_fraction, rule, f"set {1 / stage.steps:.3g} at least")
    if stage.warmup_steps + decay > stage.steps:
        rule = f"warm-up ({stage.warmup_steps}) and decay ({decay}) are more than the {stage.steps} steps"
        yield Problem(f"{prefix}.decay_fraction", stage.decay_fraction, rule, "lower it, or set 1 for no plateau")


def _find_mixture_problems(field: str, mixture: dict[str, float]) -> Iterator[Problem]:
    """Yield the broken rules of a mixture: shares between 0 and 1 that sum to 1."""
    for domain, share in mixture.items():
        if not 0 <= share <= 1:
            yield Problem(f"{field}.{domain}", share, "a share lies between 0 and 1", "set such a share")
    total = math.fsum(mixture.values())
    if abs(total - 1) > MIXTURE_TOLERANCE:
        way_out = f"change a share of {', '.join(mixture)} by {1 - total:+.6g}"
        yield Problem(field, round(total, 6), "the shares must sum to 1", way_out)


def find_order_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the broken rules between stages: growing context, and quantization in the last stage only."""
    pretrain, midtrain = recipe.stages.pretrain, recipe.stages.midtrain
    if midtrain.seq_len < pretrain.seq_len:
        rule = f"the context must not shrink after pre-training's {pretrain.seq_len}"
        yield Problem("stages.midtrain.seq_len", midtrain.seq_len, rule, f"set at least {pretrain.seq_len}")
    for name, stage in recipe.stages.items():
        if stage.quantize != (name == "qat"):
            rule = "the qat stage quantizes, and no other stage does"
            yield Problem(f"stages.{name}.quantize", stage.quantize, rule, f"set it to {name == 'qat'}")


def find_quantization_problems(quantization: QuantizationConfig, model: ModelDims) -> Iterator[Problem]:
    """Yield the broken rules of the INT4 groups: an axis, and sizes that divide the model's widths."""
    expert_widths = {"model.d_model": model.d_model, "model.expert_hidden": model.expert_hidden}
    widths = expert_widths | {
        "model.shared_hidden": model.shared_hidden,
        "model.n_heads x model.head_dim": model.n_heads * model.head_dim,
    }
    yield from _find_group_size_problems("quantization.group_size", quantization.group_size, widths)
    if quantization.expert_group_size is not None:
        field = "quantization.expert_group_size"
        yield from _find_group_size_problems(field, quantization.expert_group_size, expert_widths)
    if quantization.expert_group_axis not in ("in", "out"):
        field = "quantization.expert_group_axis"
        yield Problem(field, quantization.expert_group_axis, "names no axis", "choose in or out")


def find_format_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the formats of `export.formats` that are none, are named twice, or cannot hold the recipe's model, and
    contexts that leave no room for a prompt.
    """
    names = recipe.export.formats
    for i, name in enumerate(names):
        others = " ".join(["--export.formats", *(other for other in names if other != name)])
        if name not in PACKAGED:
            rule = f"names no format that a run makes beside bf16 and int4; they are {', '.join(PACKAGED)}"
            yield Problem("export.formats", name, rule, f"--export.formats {' '.join(PACKAGED)}")
        elif name in names[:i]:
            yield Problem("export.formats", name, "is named twice", "name it once")
        elif reason := FORMATS[name].explain_misfit(recipe.model, recipe.quantization):
            yield Problem("export.formats", name, reason, f"leave it out: {others}")
    for wanted in recipe.export.profile_contexts:
        if wanted <= N_ANSWER:
            rule = f"must be above {N_ANSWER}, the tokens that are decoded after the prompt"
            yield Problem("export.profile_contexts", wanted, rule, "set 512, or none")


def _find_group_size_problems(field: str, group_size: int, widths: dict[str, int]) -> Iterator[Problem]:
    if group_size <= 0 or group_size % 2:
        yield Problem(field, group_size, "INT4 values are packed in pairs, so it must be even and above 0", "set 32")
        return
    for name, width in widths.items():
        if width % group_size:
            rule = f"must divide {name} = {width}"
            fits = math.gcd(*widths.values())
            yield Problem(field, group_size, rule, f"choose an even divisor of {fits}, or another {name}")
