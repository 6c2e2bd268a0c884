"""Training with products in float8 (e4m3), scaled row by row: torchao's, in torchtitan's seams for them.

Every product of a block but the router's rounds both of its operands, along the dimension that it sums over, and sums
in float32; the same holds for the two products of the backward pass. Weights, gradients and everything between the
products stay as they are. The output projection stays bfloat16, as in torchtitan's own float8 models.

torchtitan's converters are not called, its classes are: `Float8LinearConverter` refuses a machine without a GPU, and
emulates another recipe (one scale a tensor). `Float8GroupedExpertsConverter` replaces the dispatcher by one that adds
with scatters and drops no tokens; `Float8Experts` calls the same product of torchao.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torchtitan.components.quantization import Float8Linear
from torchtitan.models.common import Linear

from core.errors import RefusedInput
from titan_ext import compat
from titan_ext.cpu.device import IS_CPU
from titan_ext.cpu.float8 import emulate_grouped_product
from titan_ext.mobilemoe.group_padding import pad_groups_to
from titan_ext.mobilemoe.model import MobileMoEModel
from titan_ext.mobilemoe.moe import Experts, RouterGate
from titan_ext.quantization.config import FLOAT8_MULTIPLE

OUTPUT_PROJECTION = "lm_head"
CAPABILITIES = (9, 10)
"""CUDA's major compute capabilities on which torch._scaled_grouped_mm runs: Hopper and Blackwell."""


class Float8Experts(Experts):
    """Routed experts whose grouped products are float8; their rows are padded to multiples of 16 for each expert."""

    @dataclass(kw_only=True, slots=True)
    class Config(Experts.Config):
        pass

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """Return the experts' outputs [R, D]; the arguments are those of `Experts`."""
        padding = pad_groups_to(FLOAT8_MULTIPLE, num_tokens_per_expert_E, x_RD.shape[0])
        return padding.remove(super().forward(padding.add(x_RD), padding.counts_E))

    def _grouped_mm(self, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """Return the product of torchtitan's seam for low precision."""
        multiply = emulate_grouped_product if IS_CPU else compat.multiply_grouped_in_float8
        return multiply(A, B_t, offs)


def convert_to_float8(config: MobileMoEModel.Config) -> MobileMoEModel.Config:
    """Replace, in place, the config of every linear of a block but the router's, and of the experts, by a float8 one.

    On the CPU the products are emulated, by torchao's functions.

    Returns:
        `config` itself.

    Raises:
        RefusedInput: the GPU here has no float8 grouped product.
    """
    refuse_card_without_float8()
    recipe = compat.describe_float8_rows(emulate=IS_CPU)
    for name, old, parent, attribute in list(config.traverse(Linear.Config)):
        if name != OUTPUT_PROJECTION and not isinstance(old, RouterGate.Config):
            options = {field: getattr(old, field) for field in ("in_features", "out_features", "bias", "param_init")}
            _replace(parent, attribute, Float8Linear.Config(**options, _torchao_config=recipe))
    for _, old, parent, attribute in list(config.traverse(Experts.Config)):
        _replace(parent, attribute, Float8Experts.Config(**{f.name: getattr(old, f.name) for f in fields(old)}))
    return config


def refuse_card_without_float8() -> None:
    """Check the GPU of this rank.

    Raises:
        RefusedInput: torch's grouped float8 product does not run on it.
    """
    if not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    if major not in CAPABILITIES:
        raise RefusedInput(
            f"float8 = True: {torch.cuda.get_device_name()} has compute capability {major}.{minor}, and float8 grouped "
            "products run on 9 and 10 (H100, H200, B200); set it to False"
        )


def _replace(parent: Any, attribute: Any, new: Any) -> None:
    if isinstance(parent, list):
        parent[attribute] = new
    else:
        setattr(parent, attribute, new)
