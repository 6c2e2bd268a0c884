"""This module adds self-distillation to QAT: the unquantized model that the stage starts from is the teacher.

    loss = (1 - w) cross entropy + w KL(teacher || student), per trained token

Up to the teacher's entropy, which is a constant, this is the cross entropy against the distribution
(1 - w) label + w teacher. Loss and gradient keep their size whatever w is, so learning rate, clipping and spike guard
need no change.

Shape suffixes: B batch, L sequence, D model dimension, V vocabulary.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
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

from titan_ext import compat
from titan_ext.mobilemoe.model import MobileMoEModel
from titan_ext.training.callbacks import Callback
from titan_ext.training.head_loss import HeadLoss
from titan_ext.training.metrics import sum_over_ranks


class DistilledCrossEntropy(CrossEntropyLoss):
    """Loss whose value is the cross entropy and whose gradient also has the divergence from the teacher.

    The divergence is returned as a metric. The value is the cross entropy alone, so that the logged loss compares with
    other stages and with held-out loss. Without `teacher_hidden` (validation) it is torchtitan's CrossEntropyLoss.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        weight: float = 0.0
        """Weight w of the divergence in the loss, from 0 to 1."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        super().__init__(config, compile_config=compile_config)
        self._weight = config.weight
        self._divergence = kl_divergence
        if compile_config is not None and compile_config.enable and "loss" in compile_config.components:
            self._divergence = torch.compile(kl_divergence, backend=compile_config.backend)
        self._teacher_head: torch.nn.Module | None = None

    def set_teacher_head(self, head: torch.nn.Module) -> None:
        """Set the teacher's output projection. Call it before the first loss with `teacher_hidden`."""
        self._teacher_head = head

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        teacher_hidden: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss (a scalar tensor) and the metrics of a chunk of the sequence.

        Args:
            pred: the student's logits [B, L, V].
            labels: int64 [B, L]; IGNORE_INDEX where nothing is trained.
            global_valid_tokens: number of trained tokens of the step over all ranks.
            teacher_hidden: input of the teacher's output projection [B, L, D]; None for the cross entropy alone.
        """
        cross_entropy, metrics = super().__call__(pred, labels, global_valid_tokens, **kwargs)
        if teacher_hidden is None:
            return cross_entropy, metrics
        assert self._teacher_head is not None and global_valid_tokens is not None
        with torch.no_grad():
            teacher_BLV = self._teacher_head(teacher_hidden)
        is_type_checking = spmd.is_type_checking()
        # torchtitan divides in the same way: the type checker does not know a quotient by a plain number.
        with spmd.no_typecheck():
            kl = self._divergence(pred, teacher_BLV, labels) / global_valid_tokens
            mixed = (1 - self._weight) * cross_entropy + self._weight * kl
            loss, kl = mixed + (cross_entropy - mixed).detach(), kl.detach()
            if is_type_checking:
                for value in (loss, kl):
                    spmd.assert_type(value, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, metrics | {"kl_mean": kl}


def kl_divergence(student_BLV: torch.Tensor, teacher_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) in nats, a scalar: the sum over the tokens whose label is not IGNORE_INDEX."""
    log_student_BLV, log_teacher_BLV = (F.log_softmax(x.float(), dim=-1) for x in (student_BLV, teacher_BLV))
    kl_BL = F.kl_div(log_student_BLV, log_teacher_BLV, log_target=True, reduction="none").sum(-1)
    return (kl_BL * (labels_BL != IGNORE_INDEX)).sum()


class Teacher:
    """Frozen unquantized model in the student's layout.

    Its weights are those of the checkpoint that the stage starts from. They are read at every start, also when the
    stage resumes, and are never saved. They are held in the computing dtype, since nothing updates them: FSDP2 gathers
    them without a cast.
    """

    def __init__(self, model: MobileMoEModel.Config, config: Trainer.Config, parallel_dims: ParallelDims):
        model = copy.deepcopy(model)  # update_from_config writes the layout into it
        model.update_from_config(config=config)
        with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            built = model.build()
        _hold_in(TORCH_DTYPE_MAP[config.training.mixed_precision_param], built)
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
        compat.return_hidden_states(self.model)

    def load(self, checkpoint: str) -> None:
        """Read the weights of a DCP step folder, written under any layout."""
        wrapper = ModelWrapper(self.model)
        state = wrapper.state_dict()
        dcp.load(state, checkpoint_id=checkpoint)
        wrapper.load_state_dict(state)

    @torch.no_grad()
    def compute_hidden(self, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the input of the output projection, [B, L, D]; the arguments are those of the student's forward."""
        return self.model(inputs, **kwargs)

    def reshard(self) -> None:
        """Free the gathered output projection, which is the embedding, until the next micro-batch."""
        if isinstance(self.model.lm_head, FSDPModule):
            self.model.lm_head.reshard()


def _hold_in(dtype: torch.dtype, model: MobileMoEModel) -> None:
    """Change the parameters' dtype to the computing dtype; the routers compute in float32."""
    for name, parameter in model.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.to(dtype)


class Distillation(Callback):
    """Runs the teacher before the student in every micro-batch and reports their divergence.

    Attributes:
        divergences: KL of every micro-batch of the current step, this rank's part of the mean in nats a token.
    """

    def __init__(
        self,
        teacher: Teacher,
        checkpoint: str,
        *,
        student: torch.nn.Module,
        loss_fn: HeadLoss,
        train_context: Callable[[], AbstractContextManager[None]],
        parallel_dims: ParallelDims,
    ):
        """Connect teacher and student.

        Args:
            checkpoint: DCP step folder of the teacher's weights.
            loss_fn: HeadLoss around a DistilledCrossEntropy.
            train_context: makes the context of forward and backward passes (Trainer.train_context).
        """
        self.teacher = teacher
        self.divergences: list[torch.Tensor] = []
        self._checkpoint = checkpoint
        self._student = student
        self._loss_fn = loss_fn
        self._train_context = train_context
        self._parallel_dims = parallel_dims
        self._step_divergence = torch.zeros(())
        loss_fn.loss_fn.set_teacher_head(teacher.model.lm_head)

    def before_first_step(self) -> None:
        """Load the teacher's weights."""
        self.teacher.load(self._checkpoint)

    def forward_backward(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor,
        extra_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return this rank's part of a micro-batch's mean loss, with gradients computed.

        torchtitan's trainer calls it in place of its own forward and backward pass (Trainer.fwd_bwd_fn).
        """
        with self._train_context():
            teacher_hidden = self.teacher.compute_hidden(inputs, **extra_kwargs)
            hidden = self._student(inputs, **extra_kwargs)
            loss, metrics = self._loss_fn(hidden, labels, global_valid_tokens, teacher_hidden=teacher_hidden)
            self.teacher.reshard()
            with spmd.no_typecheck():
                loss.backward()
        self.divergences.append(metrics["kl_mean"])
        return loss

    def after_backward(self) -> None:
        """Sum the divergences of the step's micro-batches."""
        self._step_divergence = torch.stack(self.divergences).sum()
        self.divergences.clear()

    def metrics(self) -> dict[str, float]:
        """Return the last step's KL(teacher || student), nats a token over all ranks."""
        return {"distillation/kl": float(sum_over_ranks(self._step_divergence, self._parallel_dims))}
