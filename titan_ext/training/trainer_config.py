"""Translates a stage of a recipe to torchtitan's Trainer.Config."""

from itertools import islice
from pathlib import Path

from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CommConfig, DebugConfig
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointingConfig, FullAC

from core.errors import RefusedInput
from titan_ext.config import ModelDims, ParallelConfig, ShardCacheConfig, StageConfig
from titan_ext.cpu.device import CONTEXT_PARALLEL_LOAD_BALANCER, SPMD_BACKEND, find_machine
from titan_ext.layout import settle_layout
from titan_ext.loader.streaming_loader import StreamingLoader
from titan_ext.memory import LOSS_CHUNKS
from titan_ext.mobilemoe import MobileMoEModel, model_config, model_spec
from titan_ext.mobilemoe.recomputation import KeepProducts
from titan_ext.model_stats import split_layers
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.float8 import convert_to_float8
from titan_ext.quantization.qat import convert_to_qat
from titan_ext.training.checkpoints import StageCheckpoints
from titan_ext.training.distillation import DistilledCrossEntropy
from titan_ext.training.head_loss import HeadLoss
from titan_ext.training.metrics import HeldoutValidator, StageMetrics
from titan_ext.training.optimizers import SkippableOptimizers
from titan_ext.training.trainer import StageTrainer

DEFAULT_SHARD_CACHE = ShardCacheConfig()
COLLECTIVE_SECONDS = 300
"""Time after which a collective fails that another rank has not joined."""


def build_trainer_config(
    *,
    model: ModelDims,
    stage: StageConfig,
    parallel: ParallelConfig,
    shards: str,
    heldout: str | None,
    tokenizer: str,
    out: str,
    seed: int,
    quantization: QuantizationConfig,
    flavor: str = "custom",
    initial_checkpoint: str | None = None,
    pad_token_id: int = 0,
    shard_cache: ShardCacheConfig = DEFAULT_SHARD_CACHE,
    stop_file: str = "",
    continued_at: int | None = None,
    hang_seconds: float = 0.0,
) -> StageTrainer.Config:
    """Build the complete training configuration of one stage.

    Args:
        shards: folder or remote address with one MDS folder per domain.
        heldout: folder with one MDS folder per domain; with None no held-out loss is measured.
        tokenizer: Hugging Face tokenizer folder.
        out: the stage's folder, for checkpoints, TensorBoard and metrics.
        seed: seed of initial weights and order of documents.
        flavor: name of the model in torchtitan's logs.
        initial_checkpoint: absolute path of the DCP step folder whose model the stage starts from; ignored when `out`
            holds a checkpoint already.
        pad_token_id: token that fills the rest of a sequence if the next conversation does not fit into it.
        shard_cache: folder and size of the cache for unpacked shards.
        quantization: quantization grid of a stage with `quantize`; other stages ignore it.
        stop_file: file whose appearance asks the stage to write a checkpoint and to end; empty for none.
        continued_at: step whose checkpoint another mixture or other shards may follow.
        hang_seconds: time without a new step after which a rank ends by itself; 0 waits for ever.

    Raises:
        RefusedInput: QAT under tensor parallelism; a teacher in a pipeline; fewer layers than pipeline stages; no
            held-out shards of any domain; float8 on a GPU that lacks it.
    """
    if stage.quantize and parallel.tensor_parallel > 1:
        raise RefusedInput(
            f"parallel.tensor_parallel = {parallel.tensor_parallel}: it splits tokens, and quantization-aware "
            "training gives a whole token one INT8 range; set it to 1"
        )
    # The default is to compile on a GPU only. At the sizes trained on the CPU, to compile takes more than it saves.
    parallel = settle_layout(model, [stage], parallel, find_machine())
    return StageTrainer.Config(
        model_spec=model_spec(_model_config(model, stage, quantization), flavor),
        hf_assets_path=tokenizer,
        dump_folder=out,
        loss=HeadLoss.Config(num_chunks=LOSS_CHUNKS, loss_fn=_loss_config(model, stage)),
        teacher=_plain_model_config(model, stage) if _distills(stage) else None,
        # Before every update the spike guard decides; the optimizers skip the update if it says so.
        # The expert bias is no parameter: a hook of the optimizers updates it (titan_ext/mobilemoe/expert_bias.py).
        optimizer=_optimizer_config(stage),
        lr_scheduler=schedule_config(stage),
        dataloader=StreamingLoader.Config(
            shards=shards,
            mixture=dict(stage.mixture),
            seed=seed,
            pad_token_id=pad_token_id,
            local=shard_cache.folder,
            cache_bytes=shard_cache.size_bytes,
            realign_after=None if continued_at is None else continued_at * stage.global_batch_size,
        ),
        training=_training_config(stage, parallel),
        parallelism=_parallelism_config(model, stage, parallel),
        compile=CompileConfig(enable=bool(parallel.compile)),
        activation_checkpoint=_activation_checkpoint(parallel),
        checkpoint=StageCheckpoints.Config(
            enable=True,
            async_mode="async",
            interval=stage.checkpoint_interval or max(stage.steps, 1),
            minutes=stage.checkpoint_minutes,
            permanent_interval=stage.permanent_interval,
            keep_latest_k=stage.checkpoints_kept,
            stop_file=stop_file,
            last_save_model_only=False,
            initial_load_path=initial_checkpoint,
            initial_load_model_only=True,
        ),
        metrics=StageMetrics.Config(
            log_freq=stage.log_interval,
            enable_tensorboard=True,
            disable_color_printing=True,
        ),
        validator=_heldout_config(stage, parallel, heldout, pad_token_id, seed, shard_cache),
        skip_spikes_sigma=stage.skip_spikes_sigma,
        hang_seconds=hang_seconds,
        comm=CommConfig(train_timeout_seconds=COLLECTIVE_SECONDS),
        debug=DebugConfig(seed=seed, deterministic=parallel.deterministic, enable_structured_logging=False),
    )


def schedule_config(stage: StageConfig) -> LRSchedulersContainer.Config:
    """Return the learning-rate schedule of a stage, which torchtitan computes (LRSchedulersContainer).

    It is a linear warm-up, a plateau where `decay_fraction` is below 1, and then the decay by `decay_type` down to
    `min_lr_factor` at the last step. The values of every stage are in schedules.py.
    """
    return LRSchedulersContainer.Config(
        warmup_steps=stage.warmup_steps,
        decay_ratio=stage.decay_fraction if stage.decay_fraction < 1 else None,
        decay_type=stage.schedule,
        min_lr_factor=stage.min_lr_factor,
    )


def _training_config(stage: StageConfig, parallel: ParallelConfig) -> TrainingConfig:
    return TrainingConfig(
        local_batch_size=_local_batch_size(stage, parallel),
        global_batch_size=stage.global_batch_size,
        seq_len=stage.seq_len,
        max_norm=stage.max_grad_norm,
        steps=stage.steps,
        mixed_precision_param=parallel.precision,
        # Expert parallelism over all-to-all synchronises with the host, which CUDA graphs forbid.
        disable_cuda_graphs=True,
    )


def _parallelism_config(model: ModelDims, stage: StageConfig, parallel: ParallelConfig) -> ParallelismConfig:
    return ParallelismConfig(
        data_parallel_replicate_degree=parallel.replicas,
        expert_parallel_degree=parallel.expert_ranks,
        tensor_parallel_degree=parallel.tensor_parallel,
        context_parallel_degree=parallel.context_parallel,
        context_parallel_load_balancer=CONTEXT_PARALLEL_LOAD_BALANCER,
        pipeline_parallel_degree=parallel.pipeline_parallel,
        pipeline_parallel_schedule=parallel.pipeline_schedule,
        pipeline_parallel_microbatch_size=stage.local_batch_size if parallel.pipeline_parallel > 1 else 1,
        module_fqns_per_model_part=_split_modules(model, parallel),
        spmd_backend=SPMD_BACKEND,
    )


def _optimizer_config(stage: StageConfig) -> SkippableOptimizers.Config:
    adamw = default_adamw(lr=stage.learning_rate, betas=(0.9, stage.beta2), weight_decay=stage.weight_decay)
    return SkippableOptimizers.Config(param_groups=adamw.param_groups)


def _activation_checkpoint(parallel: ParallelConfig) -> ActivationCheckpointingConfig | None:
    assert parallel.activation_checkpoint is not None, "settle_layout has chosen"
    return {"none": None, "selective": KeepProducts.Config(), "full": FullAC.Config()}[parallel.activation_checkpoint]


def _local_batch_size(stage: StageConfig, parallel: ParallelConfig) -> int:
    """Return torchtitan's local batch size, in sequences.

    In a pipeline it covers all micro-batches of a step, so that the pipeline drains only once per step.
    """
    if parallel.pipeline_parallel == 1:
        return stage.local_batch_size
    return stage.global_batch_size // parallel.data_parallel


def _split_modules(model: ModelDims, parallel: ParallelConfig) -> list[list[str]] | None:
    if parallel.pipeline_parallel == 1:
        return None
    layers = iter(range(model.n_layers))
    stages = [[f"layers.{i}" for i in islice(layers, n)] for n in split_layers(model, parallel.pipeline_stages)]
    return [["tok_embeddings", *stages[0]], *stages[1:-1], [*stages[-1], "norm", "lm_head"]]


def _model_config(model: ModelDims, stage: StageConfig, quantization: QuantizationConfig) -> MobileMoEModel.Config:
    config = _plain_model_config(model, stage)
    assert not (stage.quantize and stage.float8), "the recipe's rules refuse it"
    if stage.float8:
        return convert_to_float8(config)
    return convert_to_qat(config, quantization) if stage.quantize else config


def _plain_model_config(model: ModelDims, stage: StageConfig) -> MobileMoEModel.Config:
    return model_config(
        model,
        z_loss_coefficient=stage.router_z_loss,
        expert_bias_update_rate=stage.expert_bias_update_rate,
        capacity_factor=stage.capacity_factor,
    )


def _distills(stage: StageConfig) -> bool:
    return stage.quantize and stage.distillation_weight > 0


def _loss_config(model: ModelDims, stage: StageConfig) -> CrossEntropyLoss.Config:
    if _distills(stage):
        return DistilledCrossEntropy.Config(global_vocab_size=model.vocab_size, weight=stage.distillation_weight)
    return CrossEntropyLoss.Config(global_vocab_size=model.vocab_size)


def _heldout_config(
    stage: StageConfig,
    parallel: ParallelConfig,
    heldout: str | None,
    pad_token_id: int,
    seed: int,
    shard_cache: ShardCacheConfig,
) -> HeldoutValidator.Config:
    if heldout is None:
        return HeldoutValidator.Config(enable=False)
    return HeldoutValidator.Config(
        enable=True,
        freq=stage.heldout_interval,
        # torchtitan counts micro-batches of all ranks. Every layout measures on the same sequences.
        steps=stage.heldout_batches
        * stage.global_batch_size
        // (_local_batch_size(stage, parallel) * parallel.data_parallel),
        dataloader=StreamingLoader.Config(
            shards=heldout,
            mixture=_select_heldout_domains(stage.mixture, Path(heldout)),
            seed=seed,
            pad_token_id=pad_token_id,
            local=shard_cache.folder,
            cache_bytes=shard_cache.size_bytes,
        ),
    )


def _select_heldout_domains(mixture: dict[str, float], folder: Path) -> dict[str, float]:
    """Return the mixture over the domains that have held-out documents, scaled to a sum of 1.

    Raises:
        RefusedInput: no domain of the mixture has held-out documents.
    """
    present = {domain: share for domain, share in mixture.items() if (folder / domain / "index.json").exists()}
    if not present:
        raise RefusedInput(f"{folder}: no held-out shards of any of {sorted(mixture)}; run the data step again")
    return {domain: share / sum(present.values()) for domain, share in present.items()}
