"""The step `export`: Hugging Face folders of the stages' last checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.progress import Progress
from eval.config import ExportConfig
from pipelines.steps.context import Context, Job
from pipelines.steps.train import output_checkpoint
from titan_ext.config import ModelDims
from titan_ext.quantization.config import QuantizationConfig

EXPORT_OUTPUTS = (
    "artifacts/bf16", "artifacts/int4",
    "eval/work/pretrain_bf16", "eval/work/midtrain_bf16", "eval/work/sft_int4_rounded",
)  # fmt: skip
"""Folders below the run folder: the SFT model, the QAT model, and three that only the evaluation reads."""


def export_models(context: Context) -> None:
    """Write all folders of EXPORT_OUTPUTS at once; those that exist already are kept."""
    recipe, run = context.recipe, context.run
    plan: dict[str, tuple[str, Callable[..., None]]] = {
        "artifacts/bf16": ("sft", export_bf16_on_worker),
        "artifacts/int4": ("qat", export_int4_on_worker),
        "eval/work/pretrain_bf16": ("pretrain", export_bf16_on_worker),
        "eval/work/midtrain_bf16": ("midtrain", export_bf16_on_worker),
        "eval/work/sft_int4_rounded": ("sft", export_int4_on_worker),
    }
    assert tuple(sorted(plan)) == tuple(sorted(EXPORT_OUTPUTS))
    jobs = []
    for output, (stage, function) in plan.items():
        if (run / output).exists():
            continue
        name, checkpoint = Path(output).name, output_checkpoint(recipe, run, stage)
        arguments: tuple[Any, ...] = (checkpoint, recipe.model, run / "data" / "tokenizer", run / output, recipe.export)
        if function is export_int4_on_worker:
            arguments = (*arguments, recipe.quantization, recipe.parallel.precision)
        jobs.append(Job(name, function, (*arguments, context.progress("export", name))))
    context.run_jobs("export", jobs, cpus=recipe.cluster.cpus_per_task)


def export_bf16_on_worker(
    checkpoint: Path, model: ModelDims, tokenizer: Path, out: Path, config: ExportConfig, progress: Progress
) -> None:
    """Write a DCP checkpoint as a BF16 Hugging Face folder."""
    from eval.export.dcp_checkpoint import CheckpointTensors
    from eval.export.hf_folder import write_hf_folder

    progress("bf16", 0, 1)
    tensors = CheckpointTensors(checkpoint, model)
    write_hf_folder(tensors, model, tokenizer, out, max_shard_bytes=config.max_shard_bytes)
    progress("bf16", 1, 1)


def export_int4_on_worker(
    checkpoint: Path,
    model: ModelDims,
    tokenizer: Path,
    out: Path,
    config: ExportConfig,
    quantization: QuantizationConfig,
    precision: str,
    progress: Progress,
) -> None:
    """Write a DCP checkpoint as an INT4 Hugging Face folder (`mobilemoe-int4-g32`).

    Args:
        precision: dtype that the stage was trained in; its forward pass rounded the weights to it before the grid.
    """
    from eval.export.int4 import export_int4
    from eval.export.source import open_run_checkpoint

    progress("int4", 0, 1)
    source = open_run_checkpoint(checkpoint, model, tokenizer, quantization, precision)
    export_int4(source, out, max_shard_bytes=config.max_shard_bytes)
    progress("int4", 1, 1)
