"""Held-out loss of quantization-aware training in variants, all from the SFT checkpoint of one run.

    python -m benchmarks.qat_variants RUN --out DIR [--variants "qat 32" "qat 32, distilled" ...] [--steps N]

Each variant trains the run's qat stage anew (experts in groups of 32, 64 and 128; with self-distillation) and is
exported and measured as INT4. Beside them: the SFT model as it is, rounded without training, and trained on for as many
steps without quantization, which tells what the steps alone do. Finished variants in DIR are not trained again.
Prints JSON: nats a token over text and over conversations, and the megabytes that the experts of flavor S take in a
program with groups of each size. Experts' widths must be multiples of the groups: a run of the smoke recipe needs
`--model.expert-hidden 128 --model.shared-hidden 512`.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from eval.benchmarks.heldout import heldout_loss
from eval.device.expert_blobs import blob_bytes
from eval.export.bf16 import export_bf16
from eval.export.int4 import export_int4
from eval.export.source import open_run_checkpoint
from titan_ext.config import FLAVORS, ModelDims, ParallelConfig, RopeScaling, StageConfig
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import StageSpec, find_final_checkpoint

ROUNDED = {f"sft, rounded {group}": group for group in (32, 64, 128)}
TRAINED = {
    "trained on, not quantized": (None, 0.0),
    "qat 32": (32, 0.0),
    "qat 64": (64, 0.0),
    "qat 128": (128, 0.0),
    "qat 32, distilled 0.5": (32, 0.5),
    "qat 32, distilled 1": (32, 1.0),
}
"""Variant -> group size of the experts (None trains without quantization) and weight of the distillation."""
VARIANTS = ("sft", *ROUNDED, *TRAINED)


class Run:
    """A run folder that has been trained up to SFT."""

    def __init__(self, folder: Path):
        recipe = json.loads((folder / "manifest.json").read_text())["recipe"]
        dims, stages = recipe["model"], recipe["stages"]
        self.model = ModelDims(**dims | {"rope_scaling": RopeScaling(**dims["rope_scaling"])})
        self.data = folder / "data"
        self.sft = find_final_checkpoint(folder / "stages" / "3_sft", stages["sft"]["steps"])
        self.stage, self.parallel = StageConfig(**stages["qat"]), ParallelConfig(**recipe["parallel"])
        self.seed: int = recipe["seed"]

    def train(self, expert_group: int | None, distillation_weight: float, steps: int, out: Path) -> Path:
        """Train the run's qat stage with these groups, or without quantization; return its last checkpoint."""
        stage = dataclasses.replace(
            self.stage, quantize=expert_group is not None, distillation_weight=distillation_weight, steps=steps,
            checkpoint_interval=steps, heldout_interval=steps, heldout_batches=1,
        )  # fmt: skip
        quantization = QuantizationConfig(expert_group_size=expert_group)
        spec = StageSpec("qat", self.model, stage, self.parallel, self.data, out, self.sft, self.seed, quantization)
        run_ranks(spec, out.with_name(f"{out.name}.logs"), timeout=1200)
        return find_final_checkpoint(out, steps)

    def export(self, checkpoint: Path, expert_group: int | None, out: Path) -> Path:
        """Write the checkpoint as an INT4 folder, or as a BF16 one without `expert_group`; return the folder."""
        tokenizer, quantization = self.data / "tokenizer", QuantizationConfig(expert_group_size=expert_group)
        source = open_run_checkpoint(checkpoint, self.model, tokenizer, quantization, self.parallel.precision)
        return (export_bf16 if expert_group is None else export_int4)(source, out)


def measure(run: Run, variant: str, steps: int, max_tokens: int, out: Path) -> dict[str, Any]:
    """Train the variant, if it trains, and return its held-out loss in nats a token."""
    checkpoint, group = run.sft, ROUNDED.get(variant)
    if variant in TRAINED:
        group, distillation_weight = TRAINED[variant]
        checkpoint = run.train(group, distillation_weight, steps, out / "stage")
    folder = run.export(checkpoint, group, out / "model")
    nats = {
        name: heldout_loss(
            folder, run.data / "heldout" / shards, max_tokens=max_tokens, batch_size=16,
            context=run.model.max_seq_len, progress=lambda phase, done, total: None,
        )["loss"]
        for name, shards in (("text", "pretrain"), ("conversations", "sft"))
    }  # fmt: skip
    return nats | {"steps": steps if variant in TRAINED else 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--steps", type=int, help="of each trained variant; the run's qat stage's if not given")
    parser.add_argument("--max-tokens", type=int, default=100_000)
    arguments = parser.parse_args()
    run = Run(arguments.run)
    for variant in arguments.variants:
        folder = arguments.out / variant.replace(", ", "-").replace(" ", "-")
        result = folder / "heldout.json"
        if not result.exists():
            nats = measure(run, variant, arguments.steps or run.stage.steps, arguments.max_tokens, folder)
            result.write_text(json.dumps({variant: nats}) + "\n")
    found = {
        name: nats
        for path in arguments.out.glob("*/heldout.json")
        for name, nats in json.loads(path.read_text()).items()
    }
    variants = {variant: found[variant] for variant in VARIANTS if variant in found}
    print(json.dumps({"experts_of_s_mb": experts_of_s_mb(), "variants": variants}, indent=2))


def experts_of_s_mb() -> dict[int, float]:
    """Group size -> megabytes of the packed experts of flavor S."""
    S = FLAVORS["S"]
    d, f = S.d_model, S.expert_hidden
    return {
        group: S.n_layers * S.n_experts * (blob_bytes(2 * f, d, group) + blob_bytes(d, f, group)) / 1e6
        for group in ROUNDED.values()
    }


if __name__ == "__main__":
    main()
