"""The share of an H100's bfloat16 peak that the published stages would reach by the roofline: computed, not run.

    python -m benchmarks.gpu.share_of_peak

One rank, eight micro-batches a step, compiled blocks, and the recomputation that the recipes settle on: none for S and
M, selective for L.
"""

from dataclasses import replace

from titan_ext.cards import Card
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.model_stats import training_flops_per_token
from titan_ext.roofline import estimate_tokens_per_second
from titan_ext.training.schedules import published_stages

RECOMPUTATION = {"S": "none", "M": "none", "L": "selective"}
MICRO_BATCHES = 8


def compute_share(flavor: str, stage_name: str) -> tuple[float, float]:
    """Return the tokens a second of a stage, and their FLOPs as a share of the measured peak of `Card`."""
    stage = published_stages()[stage_name]
    stage = replace(stage, global_batch_size=stage.local_batch_size * MICRO_BATCHES)
    parallel = ParallelConfig(world_size=1, activation_checkpoint=RECOMPUTATION[flavor], compile=True)
    rate = estimate_tokens_per_second(FLAVORS[flavor], stage, parallel)
    assert rate is not None
    return rate, rate * training_flops_per_token(FLAVORS[flavor], stage.seq_len) / Card().peak


def main() -> None:
    """Print the table."""
    print("| stage | tokens a sequence | S | M | L |\n|---|--:|--:|--:|--:|")
    for name, stage in published_stages().items():
        shares = [compute_share(flavor, name) for flavor in RECOMPUTATION]
        cells = [f"{rate:,.0f}, {share:.1%}" for rate, share in shares]
        print(f"| {name} | {stage.seq_len:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
