"""Turn width and number of experts into the dimensions of a MobileMoE, by the design rules of arXiv 2605.27358.

    d_ff = 4 d_model           a coarse expert is a SwiGLU of hidden width d_ff
    d_model / layers about 40  deep and thin; the number of layers is even, as in S, M and L
    head_dim 64, 4 KV heads    one query head for every 64 of d_model
    granularity g              a coarse expert is divided into g fine ones, of which a token takes g
    shared expert              one expert as wide as half of a token's fine experts takes their place

With E coarse experts, granularity g and a shared expert of s = g / 2 fine ones there are E g - s routed experts, of
which a token takes g - s. E = 8 and g = 8 give 60 routed experts, top 4 and a shared expert as wide as 4. Active and
total parameters are those of E coarse experts whatever g and the shared expert are, the router's apart.
"""

from math import sqrt

from core.errors import RefusedInput
from titan_ext.config import ModelDims

HEAD_DIM = 64
KV_HEADS = 4
FF_FACTOR = 4
"""d_ff / d_model."""
WIDTH_PER_LAYER = 40
"""d_model / layers."""
WIDTH_STEP = 256
"""Multiple of d_model: 4 KV heads of 64 divide the query heads, the experts' width d_model / 2 at g = 8 is a multiple
of 128, so INT4 groups of 32, grouped GEMM tiles and expert-parallel ranks divide it."""


PUBLISHED_ROUTE_SCALE, PUBLISHED_TOP_K = 2.5, 4


def choose_route_scale(n_experts: int, top_k: int) -> float:
    """Return the factor of the routed experts' sum, whose weights add up to 1.

    The published 2.5 is for 4 experts a token. The outputs of k different experts add up as the square root of k, so
    another k gets 2.5 sqrt(k / 4), which keeps the sum as large beside the shared expert. The only expert of a dense
    model has no choice to be weighed by: its factor is 1.
    """
    return 1.0 if n_experts == 1 else PUBLISHED_ROUTE_SCALE * sqrt(top_k / PUBLISHED_TOP_K)


def choose_layers(d_model: int) -> int:
    """Return the even number of layers nearest to d_model / 40, at least 2; 20, 26 and 32 for S, M and L."""
    return max(2, 2 * round(d_model / WIDTH_PER_LAYER / 2))


def build_dims(
    d_model: int,
    experts: int,
    *,
    granularity: int = 8,
    shared: bool = True,
    n_layers: int | None = None,
    max_seq_len: int = 8192,
    vocab_size: int = 128_256,
    head_dim: int = HEAD_DIM,
    kv_heads: int = KV_HEADS,
) -> ModelDims:
    """Return the dimensions of a model of `experts` coarse experts.

    Args:
        granularity: fine experts in a coarse one.
        shared: whether half of a token's fine experts are one shared expert. At granularity 1 the only expert of a
            token would be halved, so the shared expert then needs an even granularity.
        n_layers: `choose_layers(d_model)` if not given.

    Raises:
        RefusedInput: the numbers do not divide each other; states which and the way out.
    """
    for name, value in (("experts", experts), ("granularity", granularity), ("d_model", d_model)):
        if value < 1:
            raise RefusedInput(f"{name} = {value}: must be at least 1")
    if d_model % head_dim:
        raise RefusedInput(f"d_model = {d_model}: must be a multiple of head_dim = {head_dim}")
    if (FF_FACTOR * d_model) % granularity:
        raise RefusedInput(
            f"granularity = {granularity}: must divide d_ff = {FF_FACTOR} x d_model = {FF_FACTOR * d_model}"
        )
    if shared and granularity % 2:
        raise RefusedInput(
            f"granularity = {granularity} with a shared expert: the shared expert is half of a token's {granularity} "
            "fine experts; give an even granularity, or no shared expert"
        )
    fine = FF_FACTOR * d_model // granularity
    replaced = granularity // 2 if shared else 0
    n_experts, top_k = experts * granularity - replaced, granularity - replaced
    return ModelDims(
        d_model=d_model,
        n_layers=n_layers or choose_layers(d_model),
        n_heads=d_model // head_dim,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        expert_hidden=fine,
        shared_hidden=replaced * fine,
        n_experts=n_experts,
        top_k=top_k,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        route_scale=choose_route_scale(n_experts, top_k),
    )
