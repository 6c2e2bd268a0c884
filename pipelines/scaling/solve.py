"""Solve the law for a phone: the model of least predicted loss under budgets of memory, decoding and training.

    memory     M(N_total, T) = weights + b_kv/8 * 2 T layers n_kv head_dim <= memory           bytes
    decoding   2 N_act <= decode_flops                                                      FLOPs a token
    training   6 N_act D <= train_flops, or D is given                                            FLOPs

(arXiv 2605.27358). Every model that the design rules allow (`list_candidates`) is counted exactly, so the answer is
the best real model, not a rounded real number. Sizes come from the code that `mobilemoe info` prints.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

from core.errors import RefusedInput
from pipelines.scaling.dimensions import WIDTH_STEP, build_dims
from pipelines.scaling.law import Law
from titan_ext.config import ModelDims
from titan_ext.model_stats import ParameterCount, count_parameters, kv_cache_bytes

EXPERTS = (1, 2, 4, 8, 16, 32)
"""Numbers of coarse experts that are tried: those of the published sweep."""
LARGEST_WIDTH = 4096
RATIOS = (34.0, 46.0)
"""Smallest and largest d_model / layers that is tried; S, M and L have 38.4, 39.4 and 40."""
PHONE_MEMORIES = tuple(gigabytes * 1e9 for gigabytes in (0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 6, 8, 12))
"""Memories for a model, in bytes, between which `Solution.price` compares."""


@dataclass(frozen=True)
class Budget:
    """Limits of the phone and of the training."""

    memory: float
    """Bytes for weights and KV cache."""
    context: int
    """Positions of the KV cache, T."""
    kv_bits: float = 8
    """Bits of a value in the KV cache."""
    weight_bits: float | None = None
    """Bits of a weight. None counts the INT4 folder that export writes: 4 bits, and a float16 scale for 32 weights."""
    decode_flops: float = inf
    """FLOPs a token in decoding, 2 N_act."""
    train_flops: float | None = None
    """FLOPs of the training; the tokens follow from it."""
    tokens: float | None = None
    """Tokens of the training."""

    def __post_init__(self) -> None:
        if (self.train_flops is None) == (self.tokens is None):
            raise RefusedInput("give --train-flops or --tokens, and not both: one follows from the other")
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise RefusedInput(f"--{name.replace('_', '-')} {value}: must be above 0")


@dataclass(frozen=True)
class Candidate:
    """One model that the rules allow, with what it needs."""

    dims: ModelDims
    experts: int
    """Coarse experts E."""
    tokens: float
    """Training tokens D."""
    memory: float
    """Bytes of weights and KV cache."""

    @cached_property
    def count(self) -> ParameterCount:
        """Parameters of the model."""
        return count_parameters(self.dims)

    @property
    def decode_flops(self) -> float:
        """FLOPs a token, 2 N_act."""
        return 2.0 * self.count.active

    def predict_loss(self, law: Law) -> float:
        """Return the loss in nats a token that the law predicts."""
        return float(law.coefficients.predict_loss(self.count.active, self.tokens, self.experts))


@dataclass(frozen=True)
class Solution:
    """The best model for a budget, and what surrounds it."""

    best: Candidate
    loss: float
    interval: tuple[float, float]
    """95% interval of the predicted loss."""
    binds: tuple[str, ...]
    """Limits without which a lower loss would be reachable."""
    by_experts: tuple[Candidate, ...]
    """The best model for every number of experts that fits, in the order of the numbers."""
    smaller_phone: tuple[float, "Candidate"] | None
    """Next smaller memory of PHONE_MEMORIES in which a model fits, and the best model there."""
    notes: tuple[str, ...]
    """Sentences about extrapolation and ties."""


def list_candidates(budget: Budget, experts: Sequence[int], granularity: int, shared: bool) -> Iterator[Candidate]:
    """Yield every model of the design rules: widths in steps of 256, an even number of layers, d_model / layers about
    40, and each number of experts.
    """
    for d_model in range(WIDTH_STEP, LARGEST_WIDTH + 1, WIDTH_STEP):
        for n_layers in range(2, int(d_model / RATIOS[0]) + 1, 2):
            if not RATIOS[0] <= d_model / n_layers <= RATIOS[1]:
                continue
            for number in experts:
                dims = build_dims(
                    d_model, number, granularity=granularity, shared=shared, n_layers=n_layers,
                    max_seq_len=max(budget.context, 8192),
                )  # fmt: skip
                yield _measure(dims, number, budget)


def _measure(dims: ModelDims, experts: int, budget: Budget) -> Candidate:
    from eval.export.sizes import int4_bytes

    count = count_parameters(dims)
    weights = int4_bytes(dims) if budget.weight_bits is None else count.total * budget.weight_bits / 8
    cache = kv_cache_bytes(dims, budget.context, budget.kv_bits / 8)
    tokens = budget.tokens if budget.tokens is not None else (budget.train_flops or 0) / (6 * count.active)
    return Candidate(dims, experts, tokens, memory=weights + cache)


def solve(
    law: Law, budget: Budget, *, experts: Sequence[int] = EXPERTS, granularity: int = 8, shared: bool = True
) -> Solution:
    """Return the model of least predicted loss within the budget.

    Args:
        experts: numbers of coarse experts to choose from.
        granularity, shared: the architecture; the law must have been fitted for it.

    Raises:
        RefusedInput: no model fits; states the one that comes nearest and what it needs.
    """
    candidates = list(list_candidates(budget, experts, granularity, shared))
    fitting = [candidate for candidate in candidates if _fits(candidate, budget)]
    if not fitting:
        raise RefusedInput(_describe_nearest(candidates, budget))
    best = min(fitting, key=lambda candidate: candidate.predict_loss(law))
    loss = best.predict_loss(law)
    by_experts = tuple(
        min((c for c in fitting if c.experts == number), key=lambda candidate: candidate.predict_loss(law))
        for number in sorted({candidate.experts for candidate in fitting})
    )
    return Solution(
        best=best,
        loss=loss,
        interval=law.predict_interval(best.count.active, best.tokens, best.experts),
        binds=tuple(_find_binding(law, candidates, budget, loss)),
        by_experts=by_experts,
        smaller_phone=_find_smaller_phone(law, candidates, budget),
        notes=tuple(_write_notes(law, best, by_experts)),
    )


def _fits(candidate: Candidate, budget: Budget) -> bool:
    return candidate.memory <= budget.memory and candidate.decode_flops <= budget.decode_flops


def _find_binding(law: Law, candidates: list[Candidate], budget: Budget, loss: float) -> Iterator[str]:
    """Yield the limits without which a lower loss would be reachable. More training always lowers the loss."""
    for name, relaxed in (
        ("memory", replace(budget, memory=inf)), ("decode_flops", replace(budget, decode_flops=inf)),
    ):  # fmt: skip
        fitting = (candidate for candidate in candidates if _fits(candidate, relaxed))
        if min(candidate.predict_loss(law) for candidate in fitting) < loss:
            yield name
    yield "train_flops" if budget.tokens is None else "tokens"


def _find_smaller_phone(law: Law, candidates: list[Candidate], budget: Budget) -> tuple[float, Candidate] | None:
    for memory in sorted((size for size in PHONE_MEMORIES if size < budget.memory), reverse=True):
        fitting = [candidate for candidate in candidates if _fits(candidate, replace(budget, memory=memory))]
        if fitting:
            return memory, min(fitting, key=lambda candidate: candidate.predict_loss(law))
    return None


def _describe_nearest(candidates: list[Candidate], budget: Budget) -> str:
    def excess(candidate: Candidate) -> float:
        return max(candidate.memory / budget.memory, candidate.decode_flops / budget.decode_flops)

    nearest = min(candidates, key=excess)
    return (
        f"no model of the design rules fits --memory {budget.memory / 1e9:g}GB and --decode-flops "
        f"{budget.decode_flops:.4g} at --context {budget.context}; the nearest (d_model {nearest.dims.d_model}, "
        f"{nearest.dims.n_layers} layers, E = {nearest.experts}) needs {nearest.memory / 1e9:.3g} GB and "
        f"{nearest.decode_flops:.4g} FLOPs a token: raise the limits to these, or shorten --context"
    )


def _write_notes(law: Law, best: Candidate, by_experts: tuple[Candidate, ...]) -> Iterator[str]:
    yield from law.describe_extrapolation(best.count.active, best.tokens, best.experts)
    loss = best.predict_loss(law)
    ties = [c.experts for c in by_experts if c is not best and c.predict_loss(law) - loss < law.rmse]
    if ties:
        yield (
            f"E = {', '.join(map(str, ties))} come within the law's error (RMSE {law.rmse:g}) of E = {best.experts}: "
            "the law does not tell them apart"
        )


def describe_candidate(candidate: Candidate, law: Law) -> dict[str, Any]:
    """Return a candidate as a JSON-ready dictionary: dimensions, parameters, needs and predicted loss."""
    return {
        "dimensions": asdict(candidate.dims),
        "experts": candidate.experts,
        "active": candidate.count.active,
        "total": candidate.count.total,
        "tokens": candidate.tokens,
        "memory_bytes": candidate.memory,
        "decode_flops": candidate.decode_flops,
        "train_flops": 6 * candidate.count.active * candidate.tokens,
        "loss": candidate.predict_loss(law),
    }
