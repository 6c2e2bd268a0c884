"""Self-distillation in QAT: the model that the stage starts from, not quantized, teaches the quantized one.

    loss = (1 - w) cross entropy + w KL(teacher || student), per token that is trained on

Up to the teacher's entropy, a constant, this is the cross entropy against (1 - w) label + w teacher's distribution.
Loss and gradient keep their size whatever w is, and with them learning rate, clipping and the guard against spikes.

Shape suffixes: B batch, L sequence, D model dimension, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.components.loss import IGNORE_INDEX, CrossEntropyLoss
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from titan_ext.mobilemoe.model import MobileMoEModel


class DistilledCrossEntropy(CrossEntropyLoss):
    """Cross entropy in value; in its gradient also the divergence from the teacher, which is returned as a metric.

    The value is the cross entropy alone, so that the logged loss compares with other stages and with held-out loss.
    Without `teacher_hidden` (validation) it is torchtitan's CrossEntropyLoss.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        weight: float = 0.0
        """w above, from 0 to 1."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        super().__init__(config, compile_config=compile_config)
        self.weight = config.weight
        self.teacher_head: torch.nn.Module | None = None

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        teacher_hidden: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of a chunk; `teacher_hidden` is what the teacher's output projection takes, [B, L, D]."""
        cross_entropy, metrics = super().__call__(pred, labels, global_valid_tokens, **kwargs)
        if teacher_hidden is None:
            return cross_entropy, metrics
        assert self.teacher_head is not None and global_valid_tokens is not None
        with torch.no_grad():
            teacher_BLV = self.teacher_head(teacher_hidden)
        is_type_checking = spmd.is_type_checking()
        with spmd.no_typecheck():  # as torchtitan divides: its types do not know a quotient by a plain number
            kl = kl_divergence(pred, teacher_BLV, labels) / global_valid_tokens
            mixed = (1 - self.weight) * cross_entropy + self.weight * kl
            loss, kl = mixed + (cross_entropy - mixed).detach(), kl.detach()
            if is_type_checking:
                for value in (loss, kl):
                    spmd.assert_type(value, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, metrics | {"kl_mean": kl}


def kl_divergence(student_BLV: torch.Tensor, teacher_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats of the distributions of these logits, summed over tokens that have a label."""
    log_student_BLV, log_teacher_BLV = (F.log_softmax(x.float(), dim=-1) for x in (student_BLV, teacher_BLV))
    kl_BL = F.kl_div(log_student_BLV, log_teacher_BLV, log_target=True, reduction="none").sum(-1)
    return (kl_BL * (labels_BL != IGNORE_INDEX)).sum()


class Teacher:
    """The unquantized model in the student's layout, frozen; its weights are those the stage starts from.

    They are read from that checkpoint at every start, also of a stage that resumes, and are never saved.
    """

    def __init__(self, model: MobileMoEModel.Config, config: Trainer.Config, parallel_dims: ParallelDims):
        model.update_from_config(config=config)
        with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            built = model.build()
        self.model: MobileMoEModel = config.model_spec.parallelize_fn(
            built,
            parallel_dims=parallel_dims,
            training=config.training,
            parallelism=config.parallelism,
            compile_config=config.compile,
            ac_config=None,
            dump_folder=config.dump_folder,
        )
        self.model.to_empty(device="cpu" if config.training.enable_cpu_offload else utils.device_type)
        with torch.no_grad():
            self.model.init_weights(buffer_device=torch.device(utils.device_type))
        self.model.requires_grad_(False).eval()
        self.model._skip_lm_head = True

    def load(self, checkpoint: str) -> None:
        """Read the weights of a DCP step folder, written under any layout."""
        wrapper = ModelWrapper(self.model)
        state = wrapper.state_dict()
        dcp.load(state, checkpoint_id=checkpoint)
        wrapper.load_state_dict(state)

    @torch.no_grad()
    def hidden(self, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """What the output projection takes, [B, L, D]; arguments as the student's forward."""
        return self.model(inputs, **kwargs)

    def reshard(self) -> None:
        """Give the gathered output projection, which is the embedding, back until the next micro-batch."""
        if isinstance(self.model.lm_head, FSDPModule):
            self.model.lm_head.reshard()
