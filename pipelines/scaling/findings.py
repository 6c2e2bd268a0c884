"""Compute the published findings from the published coefficients, and say where one does not follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.scaling.law import PUBLISHED, Law
from pipelines.scaling.solve import EXPERTS, Budget, solve
from titan_ext.config import FLAVORS, ModelDims
from titan_ext.model_stats import count_parameters, kv_cache_bytes

SIZES = (0.3e9, 0.5e9, 0.9e9)
"""Active parameters of the published sweep."""
TOKENS = (100e9, 200e9, 300e9, 400e9, 500e9)
"""Tokens of the published sweep."""
MEMORIES = (1.5e9, 3e9, 5e9)
"""Bytes of weights and KV cache that a phone may have for a model."""
TRAINING = (1e20, 3e20, 9e20, 2.7e21)
"""Training FLOPs; 6 x 0.5B x 300B tokens, the middle of the published sweep, are 9e20."""
PUBLISHED_FLAVORS = ("S", "M", "L")
CONTEXT = 8192


@dataclass(frozen=True)
class Finding:
    """One published claim, and what the coefficients say of it."""

    claim: str
    follows: bool | None
    """None where the coefficients say nothing about it."""
    evidence: str


def tabulate_losses(
    law: Law, sizes: Sequence[float], tokens: Sequence[float], experts: Sequence[float]
) -> list[dict[str, float]]:
    """Return a row of `active`, `tokens` and the loss by number of experts (`E=8`) for every size and length."""
    return [
        {"active": size, "tokens": length}
        | {f"E={number:g}": float(law.coefficients.predict_loss(size, length, number)) for number in experts}
        for size in sizes
        for length in tokens
    ]


def compute_findings(law: Law = PUBLISHED) -> list[Finding]:
    """Return the findings of arXiv 2605.27358 on the scaling law, computed from the law."""
    findings = [_compare_with_dense(law), _find_flattening(law), _fix_memory(law)]
    return [*findings, *_land_on_flavors(law), _compare_granularity()]


def _compare_with_dense(law: Law) -> Finding:
    cells = [(n, d) for n in SIZES for d in TOKENS]
    better = sum(all(_predict(law, n, d, number) < _predict(law, n, d, 1) for number in EXPERTS[1:]) for n, d in cells)
    return Finding(
        "at equal active parameters and tokens, experts lower the loss",
        better == len(cells),
        f"every E of {', '.join(map(str, EXPERTS[1:]))} is below the dense model in {better} of {len(cells)} cells",
    )


def _find_flattening(law: Law) -> Finding:
    """Compare the gain from each doubling of E up to 8 with that from 8 to 32."""
    cells = [(n, d) for n in SIZES for d in TOKENS]
    gains = [_predict(law, n, d, 1) - _predict(law, n, d, 8) for n, d in cells]
    beyond = [_predict(law, n, d, 8) - _predict(law, n, d, 32) for n, d in cells]
    best = [min((_predict(law, n, d, number), number) for number in EXPERTS)[1] for n, d in cells]
    return Finding(
        "returns flatten at E = 8",
        max(beyond) < law.rmse,
        f"E = 8 gains {min(gains):.4f} to {max(gains):.4f} nats over the dense model; 32 experts in place of 8 change "
        f"the loss by {-max(beyond):+.4f} to {-min(beyond):+.4f}, with an RMSE of {law.rmse:g}. The best E is "
        f"{max(best)} at the fewest tokens and {min(best)} at the most: the term of the data vanishes, and that of the "
        "size grows with E",
    )


def _fix_memory(law: Law) -> Finding:
    """Compare the best numbers of experts under a memory and a training compute, where decoding has no limit."""
    best = {
        (memory, compute): solve(law, Budget(memory=memory, context=CONTEXT, train_flops=compute)).best.experts
        for memory in MEMORIES
        for compute in TRAINING
    }
    cells = [f"{memory / 1e9:g} GB, {compute:.0e}: {number}" for (memory, compute), number in best.items()]
    return Finding(
        "E = 8 is best under a phone's memory and a training compute",
        set(best.values()) == {8},
        "only where the memory leaves room for 8 experts of the size that the training can use. With more training or "
        "less memory fewer and larger experts win, if decoding has no limit. Best E by memory and training FLOPs: "
        + "; ".join(cells),
    )


def _land_on_flavors(law: Law) -> list[Finding]:
    """Solve for the published memory and active parameters of S, M and L, at every length of the sweep."""
    return [_land_on_flavor(law, name, FLAVORS[name]) for name in PUBLISHED_FLAVORS]


def _land_on_flavor(law: Law, name: str, dims: ModelDims) -> Finding:
    from eval.export.sizes import int4_bytes

    memory = int4_bytes(dims) + kv_cache_bytes(dims, CONTEXT, 1)
    landed, parted, worst = [], [], 0.0
    for tokens in TOKENS:
        budget = Budget(
            memory=memory, context=CONTEXT, decode_flops=2.0 * count_parameters(dims).active, tokens=tokens
        )  # fmt: skip
        solution = solve(law, budget)
        if solution.best.dims == dims:
            landed.append(tokens)
            continue
        of_eight = next(candidate for candidate in solution.by_experts if candidate.experts == 8)
        assert of_eight.dims == dims, "with 8 experts the budgets of a flavor give the flavor"
        worst = max(worst, of_eight.predict_loss(law) - solution.loss)
        parted.append(f"E = {solution.best.experts} at {tokens / 1e9:g}B tokens")
    evidence = f"solving gives exactly {name} at {', '.join(f'{tokens / 1e9:g}B' for tokens in landed) or 'no length'}"
    if parted:
        evidence += (
            f"; {', '.join(parted)}, in the same widths and layers and at most {worst:.4f} nats better, within the "
            f"law's RMSE of {law.rmse:g}"
            if worst < law.rmse
            else f"; {', '.join(parted)}, at most {worst:.4f} nats better"
        )
    return Finding(f"the memory and active parameters of {name} give {name}", bool(landed), evidence)


def _compare_granularity() -> Finding:
    return Finding(
        "g = 16 gains less than 0.01 nats over g = 8 and costs 50% more time",
        None,
        "the published coefficients belong to one architecture: granularity and shared expert have no term in them. "
        "`scaling-law sweep` measures both",
    )


def _predict(law: Law, active: float, tokens: float, experts: float) -> float:
    return float(law.coefficients.predict_loss(active, tokens, experts))
