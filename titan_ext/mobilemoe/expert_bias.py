"""The update of the expert bias: load balancing without an auxiliary loss (arXiv 2408.15664).

The router chooses the top-k experts by score + bias; the bias has no part in the weights of the chosen ones. Before
every optimizer step, in every MoE layer, with tokens_e the number of tokens of the whole step (all ranks and
micro-batches) that expert e was chosen for:

    delta_e = rate * sign(mean over experts of tokens - tokens_e)
    bias_e += delta_e - mean over experts of delta

So the bias of an expert with more tokens than the mean falls, and that of one with fewer rises. Subtracting the mean of
delta is torchtitan's addition to the paper. It changes no choice, because it moves all experts' biases by the same
amount. The rate is `titan_ext.config.StageConfig.expert_bias_update_rate`.

The code is torchtitan's: `_update_expert_bias` in torchtitan/components/optimizer/optimizer.py. It reads and clears
`tokens_per_expert_E`, which torchtitan's MoE counts in its forward pass, and adds to `expert_bias_E`.
"""

import torch.nn as nn
from torchtitan.components.optimizer import OptimizersContainer, register_moe_load_balancing_hook
from torchtitan.distributed import ParallelDims


def register_expert_bias_update(
    optimizers: OptimizersContainer, model_parts: list[nn.Module], parallel_dims: ParallelDims
) -> None:
    """Update the expert bias of all MoE layers before every optimizer step, as the module's docstring states."""
    register_moe_load_balancing_hook(optimizers, model_parts, parallel_dims)
