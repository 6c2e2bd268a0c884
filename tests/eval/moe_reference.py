"""A routed MoE layer with random INT4 weights, packed for the device, and what it should compute, in float64."""

import torch
import torch.nn.functional as F

from eval.device.expert_blobs import pack_blobs, pack_stock_blobs
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_int4
from titan_ext.quantization.formulas import int4_scale, quantize_int4, quantize_int8


class RandomExperts:
    def __init__(
        self, *, n_tokens=5, d_model=128, hidden=64, n_experts=8, top_k=3, group_size=32, use_bias=True, seed=0,
        input_size=1.0, weight_gain=1.0,
    ):  # fmt: skip
        """Draw tokens of standard deviation `input_size`, and multiply the gate and up weights by `weight_gain`.

        Tokens and down weights of 1 give products of about the square root of their number of columns. The router's
        logits have the size of `input_size`. `weight_gain` is a power of two, so that scales stay exact in float16.
        """
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator)

        self.sizes = (top_k, n_experts, hidden, d_model, group_size)
        self.x, self.gate = input_size * random(n_tokens, d_model), 0.2 * random(n_experts, d_model)
        self.bias = 0.1 * random(n_experts) if use_bias else None
        w13, w2 = random(n_experts, 2 * hidden, d_model), random(n_experts, d_model, hidden)
        s13, s2 = int4_scale(w13, 2, group_size), int4_scale(w2, 2, group_size)
        q13, q2 = quantize_int4(w13, s13, 2, group_size), quantize_int4(w2, s2, 2, group_size)
        s13 = s13 * weight_gain
        self.packed = pack_blobs(q13, s13), pack_blobs(q2, s2)
        self.stock_packed = pack_stock_blobs(q13, s13), pack_stock_blobs(q2, s2)
        self.w13 = dequantize_int4(q13, s13, 2, group_size).double()
        self.w2 = dequantize_int4(q2, s2, 2, group_size).double()

    def op_arguments(self, *, stock: bool = False) -> tuple:
        """Return the arguments of our op, or of ExecuTorch's."""
        bias = torch.empty(0) if self.bias is None else self.bias
        packed = self.stock_packed if stock else self.packed
        return self.x, self.gate, bias, *packed, *self.sizes, 4, "sigmoid", 2.5

    def reference(self, *, int8_activations: bool) -> torch.Tensor:
        """The layer's output in float64; with INT8 activations, rounded a token in front of both products."""
        top_k, hidden = self.sizes[0], self.sizes[2]
        rounded = round_to_int8 if int8_activations else torch.Tensor.double
        scores = (self.x.double() @ self.gate.double().T).sigmoid()
        chosen = (scores if self.bias is None else scores + self.bias.double()).topk(top_k).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * 2.5
        out = torch.zeros_like(self.x, dtype=torch.float64)
        for t, x in enumerate(rounded(self.x)):
            for e, weight in zip(chosen[t], weights[t], strict=True):
                gate_up = self.w13[e] @ x
                inner = F.silu(gate_up[:hidden]) * gate_up[hidden:]
                out[t] += weight * (self.w2[e] @ rounded(inner.float()[None])[0])
        return out


def round_to_int8(x: torch.Tensor) -> torch.Tensor:
    """Return training's INT8 values of every row, the products of value and scale in float64."""
    q, scale, zero_point = quantize_int8(x)
    return (q - zero_point).double() * scale.double()
