"""Makes a process of the CPU trace what a process of a GPU traces: the code beside `titan_ext.cpu` takes its GPU paths.

The tensors stay on the CPU, and so do the adaptations of `titan_ext.cpu` to gloo. Flex attention takes its own formula,
because the CPU has no kernel of its backward pass.
"""

import sys

import torch.nn.attention.flex_attention as flex
import torchtitan.distributed.compile as titan_compile
import torchtitan.models.common.attention as titan_attention

GPU_VALUES = {"IS_CPU": False, "SPMD_BACKEND": "spmd_types", "CONTEXT_PARALLEL_LOAD_BALANCER": "headtail"}
"""Names of `titan_ext.cpu.device` -> their values on a GPU."""


def pretend_gpu() -> None:
    """Change this process for good; call it in a process of its own."""
    for name, module in list(sys.modules.items()):
        if name.startswith("titan_ext.") and not name.startswith("titan_ext.cpu"):
            for attribute in GPU_VALUES.keys() & vars(module).keys():
                setattr(module, attribute, GPU_VALUES[attribute])
    flex._validate_device = lambda query, key, value: None  # refuses gradients on the CPU
    # Their compiled forms are kernels of inductor, which has no backward pass of flex attention for the CPU.
    titan_compile._maybe_regional_inductor_backend = lambda model, backend: backend
    titan_attention._compiled_create_block_mask = flex.create_block_mask
    titan_attention.FlexAttention._compiled_flex_attn = staticmethod(flex.flex_attention)
