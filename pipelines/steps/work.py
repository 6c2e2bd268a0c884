"""What the steps run on Ray's workers: thin calls into data, titan_ext and eval, imported there and not before."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.config import DataConfig
from eval.config import EvaluationConfig, ExportConfig
from pipelines.engine.manifest import write_json
from pipelines.engine.progress_file import ProgressFile
from pipelines.engine.steps import whole
from titan_ext.config import ModelDims
from titan_ext.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    from titan_ext.training.stage_spec import StageRun


def prepare_items(packages: dict[str, Path], out: Path, report: ProgressFile, allow_missing: bool) -> dict:
    """Benchmark items into `out`; returns what items.json says."""
    from eval.benchmarks import items

    return items.prepare(packages, out, report, allow_missing)


def prepare_data(
    config: DataConfig,
    seed: int,
    packages: dict[str, Path],
    texts: Path,
    out: Path,
    executor: Literal["local", "ray"],
    report: ProgressFile,
) -> None:
    """Tokenizer and shards into `out`: datatrove over the processes of this node, or over the Ray cluster."""
    from data import pipeline

    pipeline.prepare(
        config, seed=seed, packages=packages, benchmark_texts=texts, out=out, report=report, executor=executor
    )


def import_model(folder: Path, out: Path) -> None:
    """A released-format folder as the checkpoint that training starts from."""
    from eval.export.import_hf import import_folder

    import_folder(folder, out)


def run_stage(run: "StageRun") -> None:
    """One rank of a training stage."""
    from titan_ext.training import train

    train.run_stage(run)


def export_bf16(
    checkpoint: Path, model: ModelDims, tokenizer: Path, out: Path, config: ExportConfig, report: ProgressFile
) -> None:
    """A DCP checkpoint as a BF16 Hugging Face folder."""
    from eval.export.dcp_checkpoint import read_checkpoint
    from eval.export.hf_folder import write_hf_folder

    report("bf16", 0, 1)
    tensors = read_checkpoint(checkpoint, model)
    write_hf_folder(tensors, model, tokenizer, out, max_shard_bytes=config.max_shard_bytes)
    report("bf16", 1, 1)


def export_int4(
    checkpoint: Path,
    model: ModelDims,
    tokenizer: Path,
    out: Path,
    config: ExportConfig,
    quantization: QuantizationConfig,
    precision: str,
    report: ProgressFile,
) -> None:
    """A DCP checkpoint as an INT4 Hugging Face folder (`mobilemoe-int4-g32`)."""
    from eval.export.int4 import export_int4
    from eval.export.source import open_run_checkpoint

    report("int4", 0, 1)
    source = open_run_checkpoint(checkpoint, model, tokenizer, quantization, precision)
    export_int4(source, out, max_shard_bytes=config.max_shard_bytes)
    report("int4", 1, 1)


def heldout(
    model: Path, folder: Path, config: EvaluationConfig, context: int, out: Path, report: ProgressFile
) -> dict[str, Any]:
    """Held-out loss over text and over conversations, nats a token; kept in `out` for a step cut off."""
    from eval.benchmarks.heldout import heldout_loss

    def loss(shards: str) -> dict[str, Any]:
        return heldout_loss(
            model,
            folder / shards,
            max_tokens=config.heldout_tokens,
            context=context,
            batch_size=config.batch_size,
            report=report,
        )

    if not out.exists():
        write_whole_json(out, {"text": loss("pretrain"), "sft": loss("sft")})
    return json.loads(out.read_text())


def benchmarks(model: Path, items: Path, out: Path, config: EvaluationConfig, report: ProgressFile) -> None:
    """The suite's benchmarks; results of single benchmarks survive a crash in the partial folder."""
    from eval.benchmarks.harness import evaluate

    if not out.exists():
        with whole(out, keep=True) as partial:
            evaluate(model, items=items, out=partial, config=config, report=report)


def write_report(run: Path) -> None:
    """The report of a run folder."""
    from eval.report.run_report import write_report

    write_report(run)


def write_whole_json(path: Path, value: object) -> None:
    """A JSON file, whole or not at all, its folder made where it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)
