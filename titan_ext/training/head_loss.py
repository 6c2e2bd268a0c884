"""The output projection and its loss, an eighth of a sequence at a time, with one gradient of the projection.

torchtitan's wrapper goes back through the projection for every chunk, so FSDP2 makes a pass over a float32 gradient of
the whole matrix for each, and reduces it apart from the embedding's, to which it is tied. Here the products add to one
float32 sum by themselves, and autograd gets the sum once: FSDP2 reduces the matrix once a micro-batch.

Shape suffixes: B batch, L sequence, C chunk of a sequence, N = B C tokens, D model dimension, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend

from titan_ext.cpu.device import IS_CPU
from titan_ext.quantization.qat import QATLinear, fake_quantize_activation


class HeadLoss(ChunkedLossWrapper):
    """torchtitan's ChunkedLossWrapper with another backward pass of the projection; values and interface are the same.

    Under tensor parallelism, which splits the projection, and without gradients it is torchtitan's.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        super().__init__(config, compile_config=compile_config)
        self._round_input: Callable[[torch.Tensor], torch.Tensor] = fake_quantize_activation
        if not IS_CPU and compile_config is not None and compile_config.enable:  # the CPU's is compiled already
            self._round_input = torch.compile(fake_quantize_activation, backend=compile_config.backend, fullgraph=True)

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, a scalar tensor, and its metrics.

        Args:
            pred: input of the output projection [B, L, D]; L is a multiple of the number of chunks.
            labels: int64 [B, L].
            global_valid_tokens: number of trained tokens of the step over all ranks.
            loss_inputs: further tensors [B, L, ...] that the loss takes.
        """
        head = self.lm_head
        assert head is not None, "the trainer sets it"
        with spmd.no_typecheck():
            if isinstance(head, FSDPModule):
                head.unshard()
        if not pred.requires_grad or _is_tensor_parallel(pred, head.weight):
            return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)
        with spmd.local(), spmd.no_typecheck():
            loss, metrics, *gradients = self._go_both_ways(pred, head, labels, global_valid_tokens, loss_inputs)
            return _Gradients.apply(loss, pred, head.weight, *gradients), metrics

    @torch.no_grad()
    def _go_both_ways(
        self,
        hidden_BLD: torch.Tensor,
        head: Any,
        labels_BL: torch.Tensor,
        num_tokens: torch.Tensor | None,
        loss_inputs: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return loss, metrics, and the gradients of the hidden states and of the projection."""
        weight_VD = head.weight.detach()
        rounded_BLD = self._round_input(hidden_BLD) if isinstance(head, QATLinear) else hidden_BLD
        if isinstance(head, QATLinear):
            weight_VD = head.round_weight(weight_VD)
        grad_hidden_BLD = torch.empty_like(hidden_BLD)
        grad_weight_VD = torch.empty_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        total = hidden_BLD.new_zeros((), dtype=torch.float32)
        metrics: dict[str, torch.Tensor] = {}
        for i, chunk in enumerate(_split(hidden_BLD.shape[1], self.num_chunks)):
            x_ND = rounded_BLD[:, chunk].flatten(0, 1)
            labels_BC = labels_BL[:, chunk].contiguous()
            logits_BCV = (x_ND @ weight_VD.t()).unflatten(0, labels_BC.shape).requires_grad_()
            inputs = {name: value[:, chunk].contiguous() for name, value in loss_inputs.items()}
            with torch.enable_grad():
                loss, found = self.loss_fn(logits_BCV, labels_BC, num_tokens, **inputs)
            (grad_BCV,) = torch.autograd.grad(loss, logits_BCV)
            grad_NV = grad_BCV.flatten(0, 1)
            grad_hidden_BLD[:, chunk] = (grad_NV @ weight_VD).unflatten(0, labels_BC.shape)
            add_product(grad_weight_VD, grad_NV.t(), x_ND, is_first=i == 0)
            total = total + loss.detach()
            metrics = self._combine_chunk_metrics(metrics, found)
            del logits_BCV, loss, grad_BCV, grad_NV  # before the next chunk's are computed
        return total, metrics, grad_hidden_BLD, grad_weight_VD.to(weight_VD.dtype)


class _Gradients(torch.autograd.Function):
    """The function returns a loss whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        hidden_BLD: torch.Tensor,
        weight_VD: torch.Tensor,
        grad_hidden_BLD: torch.Tensor,
        grad_weight_VD: torch.Tensor,
    ) -> torch.Tensor:
        ctx.gradients = grad_hidden_BLD, grad_weight_VD
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor, None, None]:
        # The trainer goes back from the loss itself, whose gradient is 1. Nothing else holds the gradients any more,
        # so autograd keeps the projection's without a copy.
        grad_hidden_BLD, grad_weight_VD = ctx.gradients
        del ctx.gradients
        return None, grad_hidden_BLD, grad_weight_VD, None, None


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, is_first: bool) -> None:
    """Add the product of two matrices to `total`, float32 or wider; or set it to the product, if `is_first`.

    Where the device can, the product adds to `total` itself: nothing of its size is read or written apart from that.
    """
    beta = 0 if is_first else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def _split(length: int, parts: int) -> list[slice]:
    assert length % parts == 0, f"{length} tokens of a sequence are not divisible into {parts} chunks"
    size = length // parts
    return [slice(start, start + size) for start in range(0, length, size)]


def _is_tensor_parallel(*tensors: torch.Tensor) -> bool:
    is_split = any(isinstance(tensor, DTensor) for tensor in tensors)
    return is_split or (get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1)
