"""INT8 activations: a MobileMoE folder computed as the device does, and as QAT's own forward pass."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from core.errors import RefusedInput
from eval.hf_mobilemoe.modeling_mobilemoe import MobileMoEExperts, MobileMoEPreTrainedModel, MobileMoERouter
from titan_ext.quantization.qat import fake_quantize_activation


class RoundedExperts(MobileMoEExperts):
    """The routed experts, with the input of both products rounded to INT8, every token on its own grid."""

    def forward(self, x_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's K experts, [T, D]; arguments are those of the plain experts."""
        rounded_TD = fake_quantize_activation(x_TD)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in experts_TK.unique().tolist():
            tokens, slots = (experts_TK == expert).nonzero(as_tuple=True)
            gate, up = (rounded_TD[tokens] @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = fake_quantize_activation(F.silu(gate) * up) @ self.down_proj[expert]
            y_TD.index_add_(0, tokens, out.float() * weights_TK[tokens, slots][:, None])
        return y_TD.to(x_TD.dtype)


def round_activations(model: PreTrainedModel) -> None:
    """Make a MobileMoE model round the input of every linear layer and of the experts to INT8; the router's stays.

    Raises:
        RefusedInput: it is another model, whose INT8 form is not known here.
    """
    if not isinstance(model, MobileMoEPreTrainedModel):
        raise RefusedInput(
            f"--activations int8: {type(model).__name__} is no MobileMoE model; leave the option out for it"
        )
    for module in model.modules():
        if isinstance(module, MobileMoEExperts):
            module.__class__ = RoundedExperts  # its tensors stay where they are
        elif isinstance(module, nn.Linear) and not isinstance(module, MobileMoERouter):
            module.register_forward_pre_hook(lambda _, inputs: (fake_quantize_activation(inputs[0]),))
