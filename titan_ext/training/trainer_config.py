"""From what a recipe says of a stage to torchtitan's Trainer.Config."""

from itertools import islice
from pathlib import Path

from core.errors import RefusedInput
from titan_ext.cpu import adaptations

adaptations.apply()

from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.config.configs import CommConfig, DebugConfig  # noqa: E402
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointingConfig, FullAC, SelectiveAC  # noqa: E402

from titan_ext.config import ModelDims, ParallelConfig, StageConfig  # noqa: E402
from titan_ext.loader.streaming_loader import StreamingLoader  # noqa: E402
from titan_ext.memory import LOSS_CHUNKS  # noqa: E402
from titan_ext.mobilemoe import MobileMoEModel, model_config, model_spec  # noqa: E402
from titan_ext.model_stats import layers_of_stages  # noqa: E402
from titan_ext.quantization.config import QuantizationConfig  # noqa: E402
from titan_ext.quantization.qat import convert_to_qat  # noqa: E402
from titan_ext.training.distillation import DistilledCrossEntropy  # noqa: E402
from titan_ext.training.metrics import HeldoutValidator, StageMetrics  # noqa: E402
from titan_ext.training.trainer import StageTrainer  # noqa: E402

CHECKPOINTS_KEPT = 2
"""torchtitan's minimum: the last one may be in the middle of being written."""


def trainer_config(
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
) -> StageTrainer.Config:
    """The complete training configuration of one stage.

    Args:
        shards, heldout: folders (or, for shards, a remote address) with one MDS folder a domain; no held-out folder, no
            validation.
        tokenizer: Hugging Face tokenizer folder.
        out: the stage's folder: checkpoints, TensorBoard and metrics go there.
        initial_checkpoint: absolute path of the DCP step folder whose model the stage starts from; ignored when `out`
            holds a checkpoint already.
        quantization: grid of a stage with `quantize`; other stages ignore it.
        pad_token_id: token that fills sequences which no further conversation fits.

    Raises:
        RefusedInput: QAT under tensor parallelism, a teacher or fewer layers than stages in a pipeline, or no held-out
            shards of any domain.
    """
    if stage.quantize and parallel.tensor_parallel > 1:
        raise RefusedInput(
            f"parallel.tensor_parallel = {parallel.tensor_parallel}: it splits tokens, and quantization-aware "
            "training gives a whole token one INT8 range; set it to 1"
        )
    return StageTrainer.Config(
        model_spec=model_spec(_model_config(model, stage, quantization), flavor),
        hf_assets_path=tokenizer,
        dump_folder=out,
        loss=ChunkedLossWrapper.Config(num_chunks=LOSS_CHUNKS, loss_fn=_loss_config(model, stage)),
        teacher=_plain_model_config(model, stage) if _distills(stage) else None,
        optimizer=default_adamw(lr=stage.learning_rate, betas=(0.9, stage.beta2), weight_decay=stage.weight_decay),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=stage.warmup_steps, decay_type=stage.schedule, min_lr_factor=stage.min_lr_factor
        ),
        dataloader=StreamingLoader.Config(
            shards=shards,
            mixture=dict(stage.mixture),
            seed=seed,
            pad_token_id=pad_token_id,
        ),
        training=TrainingConfig(
            local_batch_size=_sequences_at_once(stage, parallel),
            global_batch_size=stage.global_batch_size,
            seq_len=stage.seq_len,
            max_norm=stage.max_grad_norm,
            steps=stage.steps,
            mixed_precision_param=parallel.precision,
            # Expert parallelism over all-to-all synchronises with the host, which CUDA graphs forbid.
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(
            data_parallel_replicate_degree=parallel.data_parallel_replicate,
            expert_parallel_degree=parallel.expert_parallel,
            tensor_parallel_degree=parallel.tensor_parallel,
            context_parallel_degree=parallel.context_parallel,
            context_parallel_load_balancer=adaptations.CONTEXT_PARALLEL_LOAD_BALANCER,
            pipeline_parallel_degree=parallel.pipeline_parallel,
            pipeline_parallel_schedule=parallel.pipeline_schedule,
            pipeline_parallel_microbatch_size=stage.local_batch_size if parallel.pipeline_parallel > 1 else 1,
            module_fqns_per_model_part=_modules_of_stages(model, parallel),
            spmd_backend=adaptations.SPMD_BACKEND,
        ),
        # By default on a GPU alone: on the CPU neither pays at the sizes trained there.
        compile=CompileConfig(enable=not adaptations.IS_CPU if parallel.compile is None else parallel.compile),
        activation_checkpoint=_activation_checkpoint(parallel),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=stage.checkpoint_interval,
            keep_latest_k=CHECKPOINTS_KEPT,
            last_save_model_only=False,
            initial_load_path=initial_checkpoint,
            initial_load_model_only=True,
        ),
        metrics=StageMetrics.Config(
            log_freq=stage.log_interval,
            enable_tensorboard=True,
            disable_color_printing=True,
        ),
        validator=_heldout_config(stage, parallel, heldout, pad_token_id, seed),
        skip_spikes_sigma=stage.skip_spikes_sigma,
        comm=CommConfig(train_timeout_seconds=300),
        debug=DebugConfig(seed=seed, deterministic=parallel.deterministic, enable_structured_logging=False),
    )


def _activation_checkpoint(parallel: ParallelConfig) -> ActivationCheckpointingConfig | None:
    chosen = parallel.activation_checkpoint or ("none" if adaptations.IS_CPU else "selective")
    return {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}[chosen]


def _sequences_at_once(stage: StageConfig, parallel: ParallelConfig) -> int:
    """What torchtitan calls the local batch: with a pipeline all micro-batches of a step, so that it drains once."""
    if parallel.pipeline_parallel == 1:
        return stage.local_batch_size
    return stage.global_batch_size // parallel.data_parallel


def _modules_of_stages(model: ModelDims, parallel: ParallelConfig) -> list[list[str]] | None:
    if parallel.pipeline_parallel == 1:
        return None
    layers = iter(range(model.n_layers))
    stages = [[f"layers.{i}" for i in islice(layers, n)] for n in layers_of_stages(model, parallel.pipeline_stages)]
    return [["tok_embeddings", *stages[0]], *stages[1:-1], [*stages[-1], "norm", "lm_head"]]


def _model_config(model: ModelDims, stage: StageConfig, quantization: QuantizationConfig) -> MobileMoEModel.Config:
    config = _plain_model_config(model, stage)
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
    stage: StageConfig, parallel: ParallelConfig, heldout: str | None, pad_token_id: int, seed: int
) -> HeldoutValidator.Config:
    if heldout is None:
        return HeldoutValidator.Config(enable=False)
    return HeldoutValidator.Config(
        enable=True,
        freq=stage.heldout_interval,
        # In micro-batches of all ranks, so that every layout measures on the same sequences.
        steps=stage.heldout_batches
        * stage.global_batch_size
        // (_sequences_at_once(stage, parallel) * parallel.data_parallel),
        dataloader=StreamingLoader.Config(
            shards=heldout,
            mixture=_shares_present(stage.mixture, Path(heldout)),
            seed=seed,
            pad_token_id=pad_token_id,
        ),
    )


def _shares_present(mixture: dict[str, float], folder: Path) -> dict[str, float]:
    """The stage's mixture over the domains that have held-out documents, scaled to 1."""
    present = {domain: share for domain, share in mixture.items() if (folder / domain / "index.json").exists()}
    if not present:
        raise RefusedInput(f"{folder}: no held-out shards of any of {sorted(mixture)}; run the data step again")
    return {domain: share / sum(present.values()) for domain, share in present.items()}
