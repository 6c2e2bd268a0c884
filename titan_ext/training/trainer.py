"""torchtitan's Trainer with this project's stage metrics and a guard before every update."""

import os
from dataclasses import dataclass
from typing import Annotated, Any

import spmd_types as spmd
import torch
import torch.distributed as dist
import torchtitan.trainer
import tyro
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from core.errors import RefusedInput
from titan_ext.cpu import adaptations
from titan_ext.loader.streaming_loader import StreamingLoader
from titan_ext.mobilemoe.load_metrics import clear_load, record_load
from titan_ext.mobilemoe.model import MobileMoEModel
from titan_ext.mobilemoe.tied_embedding_pp import TIED_SCHEDULES, TiedStages, of_last_stage
from titan_ext.training.distillation import Teacher
from titan_ext.training.metrics import StageMetrics
from titan_ext.training.spike_guard import UpdateGuard

torchtitan.trainer.time = adaptations.TRAINER_CLOCK


class _GuardedOptimizers:
    """The trainer's optimizers, whose step does nothing when the trainer says so."""

    def __init__(self, trainer: "StageTrainer", optimizers: Any):
        self._trainer, self._optimizers = trainer, optimizers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizers, name)

    def step(self) -> None:
        if self._trainer.skip_reason is None:
            self._optimizers.step()
            if self._trainer.tied_stages is not None:
                self._trainer.tied_stages.take_values_from_owner()
        else:
            # In the metrics, but not in the next update of the expert bias, whose hook clears them after a step taken.
            record_load(self._trainer.model_parts)
            clear_load(self._trainer.model_parts)


class StageTrainer(Trainer):
    """Trains one stage; resumes from the newest checkpoint in its folder, as torchtitan does.

    torchtitan looks at the loss only when it logs, after the update. Here loss and gradient norm of every step are
    known before it (`titan_ext.training.spike_guard`), at the price of a second gradient norm and one wait for the device.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        skip_spikes_sigma: float | None = None
        """Skip the update of a step whose loss or gradient norm is this many deviations above the last steps'."""
        teacher: Annotated[MobileMoEModel.Config | None, tyro.conf.Suppress] = None
        """Unquantized model whose distribution QAT follows; needs checkpoint.initial_load_path and a loss that asks."""

        def __post_init__(self) -> None:
            Trainer.Config.__post_init__(self)
            ranks, schedule = self.parallelism.pipeline_parallel_degree, self.parallelism.pipeline_parallel_schedule
            if ranks > 1 and schedule not in TIED_SCHEDULES:
                raise RefusedInput(
                    f"parallelism.pipeline_parallel_schedule = {schedule}: embedding and output projection are tied "
                    f"over the first and the last rank of a pipeline; choose one of {', '.join(TIED_SCHEDULES)}"
                )
            if ranks > 1 and self.parallelism.module_fqns_per_model_part is None:
                raise RefusedInput(
                    f"parallelism.pipeline_parallel_degree = {ranks} and parallelism.module_fqns_per_model_part is not "
                    "set: torchtitan's own split may leave a stage without a layer; name every stage's modules, or "
                    "train by a recipe with parallel.pipeline_parallel, which splits the layers evenly"
                )
            if ranks > 1 and self.teacher is not None:
                raise RefusedInput(
                    f"parallel.pipeline_parallel = {ranks} and stages.qat.distillation_weight above 0: a teacher is "
                    "not split into pipeline stages; set the one to 1, or the other to 0"
                )

    def __init__(self, config: Config):
        self.guard = UpdateGuard(config.skip_spikes_sigma)  # the checkpointer asks for its state from the start
        if config.teacher is not None and config.checkpoint.initial_load_path is None:
            raise RefusedInput(
                "stages.qat.distillation_weight is above 0 and checkpoint.initial_load_path is not set: the teacher is "
                "the checkpoint that the stage starts from; name it, or set distillation_weight to 0"
            )
        _check_expert_ranks(config.parallelism)
        for loader in (config.dataloader, config.validator.dataloader):
            if isinstance(loader, StreamingLoader.Config):
                loader.global_batch_size = config.training.global_batch_size
        super().__init__(config)
        training = config.training
        self.metrics_processor.tokens_per_step = training.global_batch_size * training.seq_len
        self.metrics_processor.last_step = training.steps
        if config.validator.enable:
            self.validator.last_step = training.steps
        self.teacher: Teacher | None = None
        if config.teacher is not None:
            self.teacher = Teacher(config.teacher, config, self.parallel_dims)
            self.loss_fn.loss_fn.teacher_head = self.teacher.model.lm_head
        self.optimizers = _GuardedOptimizers(self, self.optimizers)
        self.tied_stages: TiedStages | None = None
        if self.parallel_dims.pp_enabled:
            self.tied_stages = TiedStages(self.model_parts, self.parallel_dims)
        self.started = False
        self.skip_reason: str | None = None
        self.losses: list[torch.Tensor] = []
        self.divergences: list[torch.Tensor] = []

    def train(self) -> None:
        if self.teacher is not None:
            self.teacher.load(self.config.checkpoint.initial_load_path)
        super().train()
        if adaptations.IS_CPU:
            dist.barrier()

    def train_step(self, data_iterator) -> None:
        assert isinstance(self.metrics_processor, StageMetrics)
        if not self.started:
            # Only here is it known at which step the loaded checkpoint left off.
            self.metrics_processor.start_after(self.step - 1)
            self.metrics_processor.data_statistics = self.dataloader.statistics
            if self.tied_stages is not None:  # of initial weights, or of a checkpoint that anyone may have written
                self.tied_stages.take_values_from_owner()
            self.started = True
        super().train_step(data_iterator)

    def forward_backward_step(self, **kwargs) -> torch.Tensor:
        loss = of_last_stage(super().forward_backward_step(**kwargs), self.parallel_dims)
        self.losses.append(loss.detach().clone())
        if len(self.losses) == self.gradient_accumulation_steps:
            if self.tied_stages is not None:
                self.tied_stages.give_gradient_to_owner()
            self._judge_step(torch.stack(self.losses).sum())
            self.losses.clear()
        return loss

    def _forward_backward_body(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor,
        extra_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """torchtitan's, with the teacher's forward pass before the student's."""
        if self.teacher is None:
            return super()._forward_backward_body(inputs, labels, global_valid_tokens, extra_kwargs)
        with self.train_context():
            teacher_hidden = self.teacher.hidden(inputs, **extra_kwargs)
            hidden = self.model_parts[0](inputs, **extra_kwargs)
            loss, metrics = self.loss_fn(hidden, labels, global_valid_tokens, teacher_hidden=teacher_hidden)
            self.teacher.reshard()
            with spmd.no_typecheck():
                loss.backward()
        self.divergences.append(metrics["kl_mean"])
        return loss

    def _judge_step(self, loss: torch.Tensor) -> None:
        """With all gradients there and none clipped: may this step be taken? Every rank comes to the same answer."""
        grad_norm = dist_utils.clip_grad_norm_(
            [p for part in self.model_parts for p in part.parameters()],
            max_norm=float("inf"),
            foreach=True,
            pp_mesh=self.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self.parallel_dims.ep_enabled,
        )
        self.skip_reason = self.guard.admit(self.step, self._over_ranks(loss), float(grad_norm))
        if self.teacher is not None:
            self.metrics_processor.kl = self._over_ranks(torch.stack(self.divergences).sum())
            self.divergences.clear()
        self.metrics_processor.num_skipped = self.guard.num_skipped
        if self.skip_reason is not None:
            logger.warning(f"step {self.step} is skipped: {self.skip_reason}")

    def _over_ranks(self, part: torch.Tensor) -> float:
        """The sum of what every rank's tokens contribute."""
        loss_mesh = self.parallel_dims.get_optional_mesh("loss")
        return float(part) if loss_mesh is None else dist_utils.dist_sum(part, loss_mesh)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"guard": self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.guard.load_state_dict(state_dict["guard"])


def _check_expert_ranks(parallelism: ParallelismConfig) -> None:
    world, experts = int(os.environ["WORLD_SIZE"]), parallelism.expert_parallel_degree
    ranks = world // (parallelism.pipeline_parallel_degree * parallelism.data_parallel_replicate_degree)
    if ranks < 1 or ranks % experts:
        raise RefusedInput(
            f"parallelism.expert_parallel_degree = {experts}: the {ranks} ranks of a replica (WORLD_SIZE {world} / "
            "pipeline_parallel_degree / data_parallel_replicate_degree) must be a multiple of it; start another number "
            "of ranks (torchrun --nproc-per-node), or set --parallelism.expert_parallel_degree"
        )
