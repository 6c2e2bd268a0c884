"""What each export format cannot hold, from the dimensions alone. Imports neither torch nor transformers.

A recipe is checked with these rules before its run starts, and a checkpoint before anything is written.
"""

from titan_ext.config import ModelDims
from titan_ext.quantization.config import QuantizationConfig

INT4_BLOCK = 32
"""Number of values along the input axis that share a scale in all the formats of packed INT4."""


def explain_native_misfit(model: ModelDims, quantization: QuantizationConfig) -> str:
    """Return why transformers' `glm4_moe` has no such model, or an empty text."""
    if model.n_experts < 2:
        return f"glm4_moe's router chooses among two experts or more, and this model has {model.n_experts}"
    if not _is_shared_multiple(model):
        return (
            f"glm4_moe's shared expert is as wide as one or several routed ones, and here it is {model.shared_hidden} "
            f"wide and a routed one {model.expert_hidden}"
        )
    return ""


def explain_packed_native_misfit(model: ModelDims, quantization: QuantizationConfig) -> str:
    """Return why `glm4_moe` with compressed-tensors' packed linears has no such model, or an empty text."""
    return explain_native_misfit(model, quantization) or explain_block_misfit(model, quantization)


def explain_mlx_misfit(model: ModelDims, quantization: QuantizationConfig) -> str:
    """Return why MLX's `exaone_moe` has no such model in 4 bits, or an empty text."""
    if model.top_k == 1:
        return "MLX's exaone_moe does not normalize the weight of a single expert, and a token takes one here"
    if not _is_shared_multiple(model):
        return (
            f"MLX's shared expert is as wide as one or several routed ones, and here it is {model.shared_hidden} wide "
            f"and a routed one {model.expert_hidden}"
        )
    return explain_block_misfit(model, quantization)


def _is_shared_multiple(model: ModelDims) -> bool:
    """Return whether the shared expert is as wide as one or several routed ones."""
    shared, routed = model.shared_hidden, model.expert_hidden
    return shared >= routed > 0 and shared % routed == 0


def explain_block_misfit(model: ModelDims, quantization: QuantizationConfig) -> str:
    """Return why a model's INT4 groups are no blocks of 32 along the input axis, or an empty text."""
    sizes = sorted({quantization.group_size, quantization.expert_group_size or quantization.group_size})
    if quantization.expert_group_axis == "in" and not any(size % INT4_BLOCK for size in sizes):
        return ""
    return (
        f"its blocks are {INT4_BLOCK} values along the input axis, and the INT4 groups are {sizes} with the experts' "
        f"along axis {quantization.expert_group_axis!r}"
    )
