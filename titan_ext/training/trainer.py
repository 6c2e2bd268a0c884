"""torchtitan's Trainer with a callback for each addition to its loop, and a guard that may skip an update."""

import dataclasses
import faulthandler
import os
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torchtitan.config import ParallelismConfig
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from core.errors import RefusedInput
from titan_ext.compat import clip_by, end_without_sleep
from titan_ext.loader.streaming_loader import StreamingLoader
from titan_ext.mobilemoe.model import MobileMoEModel
from titan_ext.mobilemoe.tied_embedding_pp import TIED_SCHEDULES, TiedEmbedding, broadcast_from_last_stage
from titan_ext.quantization.shards import RoundedShards
from titan_ext.training.callbacks import Callback, TiedEmbeddingCallback
from titan_ext.training.checkpoints import StageCheckpoints
from titan_ext.training.distillation import Distillation, Teacher
from titan_ext.training.metrics import StageMetrics, sum_over_ranks
from titan_ext.training.optimizers import SkippableOptimizers
from titan_ext.training.spike_guard import SpikeGuard

STDERR = 2
"""File descriptor to which a rank that hangs writes: launchers send it to the rank's log."""
LOOK_STEPS = 10
"""Number of steps after which the host waits for the device and looks at the decisions of the spike guard."""
_GUARD_STATE = "guard"
"""Key of the spike guard's state in checkpoints."""


class StageTrainer(Trainer):
    """Trains one stage; resumes from the newest checkpoint in its folder, as torchtitan does.

    torchtitan looks at the loss only when it logs, after the update. Here the spike guard judges loss and gradient norm
    of every step before the update, on the device, and the optimizers obey on the device. The host looks at its
    decisions every `LOOK_STEPS` steps, and when it logs or saves.

    Attributes:
        callbacks: additions to torchtitan's training loop; titan_ext/training/callbacks.py defines their hooks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        skip_spikes_sigma: float | None = None
        """Number of standard deviations above the mean of the last steps. A step above this limit is a spike, and its
        update is skipped. None skips no spike."""
        hang_seconds: float = 0.0
        """Time after the begin of a step by which the next one must have begun, or the stage have ended. A rank for
        which it has not ends with exit code 1, and the stacks of its threads on stderr. 0 waits for ever."""
        teacher: Annotated[MobileMoEModel.Config | None, tyro.conf.Suppress] = None
        """Unquantized model whose distribution QAT follows. It needs checkpoint.initial_load_path and a loss of class
        DistilledCrossEntropy."""

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
        _check_teacher_checkpoint(config)
        _check_expert_ranks(config.parallelism)
        super().__init__(_set_global_batch_size(config))
        assert isinstance(self.optimizers, SkippableOptimizers) and isinstance(self.metrics_processor, StageMetrics)
        assert isinstance(self.checkpointer, StageCheckpoints)
        self._has_started = False
        self._micro_batch_losses: list[torch.Tensor] = []
        self.rounded_shards = RoundedShards(self.model_parts, config.compile.backend if config.compile.enable else None)
        self.spike_guard = SpikeGuard(config.skip_spikes_sigma, self.device)
        self.callbacks: list[Callback] = [self.spike_guard]
        if self.parallel_dims.pp_enabled:
            self.tied_embedding = TiedEmbedding(self.model_parts, self.parallel_dims)
            self.callbacks.append(TiedEmbeddingCallback(self.tied_embedding))
        if config.teacher is not None:
            self.distillation = Distillation(
                Teacher(config.teacher, self.config, self.parallel_dims),
                config.checkpoint.initial_load_path,
                student=self.model_parts[0],
                loss_fn=self.loss_fn,
                train_context=self.train_context,
                parallel_dims=self.parallel_dims,
            )
            self.callbacks.append(self.distillation)
            self.fwd_bwd_fn = self.distillation.forward_backward

    def train(self) -> None:
        """Train as torchtitan does; at the end all ranks wait for each other, since rank 0 hosts their store."""
        with end_without_sleep():
            super().train()
        dist.barrier()

    def train_step(self, data_iterator: Any) -> None:
        """Train one optimizer step as torchtitan does, and call the callbacks' hooks."""
        if self.config.hang_seconds:
            # Its thread needs neither Python nor its lock, which native code that hangs may hold.
            faulthandler.dump_traceback_later(self.config.hang_seconds, exit=True, file=STDERR)
        if not self._has_started:
            self._start(first_step=self.step)
        with clip_by(self._clip_gradients), self.rounded_shards.rounded_once():
            super().train_step(data_iterator)
        assert not self._micro_batch_losses, "torchtitan did not clip the gradients, so nobody checked the update"
        for callback in self.callbacks:
            callback.after_update()
        if self.config.validator.enable and self.validator.should_validate(self.step):
            self.rounded_shards.round_now()

    def should_continue_training(self) -> bool:
        """Return whether a step is left and nobody asked to stop. The first call comes after the checkpoint is loaded,
        and starts the stage.

        torchtitan saves a step's checkpoint before it measures the held-out loss. A process that was killed in between
        measures it now.
        """
        if not self._has_started:
            self._start(first_step=self.step + 1)
            if self._lacks_heldout_loss():
                self.rounded_shards.round_now()
                self.validator.validate(self.model_parts, self.step)
        return not self.checkpointer.is_stopping and super().should_continue_training()

    def _lacks_heldout_loss(self) -> bool:
        """Return on every rank whether the held-out loss of the loaded step is due and was not measured."""
        is_due = self.step > 0 and self.config.validator.enable and self.validator.should_validate(self.step)
        missing = is_due and not self.metrics_processor.has_heldout_loss(self.step)
        answer = torch.tensor(float(missing), device=utils.device_type)  # rank 0's: it alone writes the file
        dist.broadcast(answer, src=0)
        return bool(answer)

    def _start(self, first_step: int) -> None:
        """Start metrics and callbacks; the checkpoint is loaded."""
        training = self.config.training
        self._set_learning_rates()
        self.metrics_processor.start_stage(
            first_step=first_step,
            last_step=training.steps,
            tokens_per_step=training.global_batch_size * training.seq_len,
            callbacks=self.callbacks,
            read_data_statistics=self.dataloader.statistics,
            hash_sequences=self.dataloader.hash_sequences,
        )
        for callback in self.callbacks:
            callback.before_first_step()
        self._has_started = True

    def _set_learning_rates(self) -> None:
        """Give the next step the rate of this schedule. The checkpoint's optimizer holds that of the one it was saved
        under.
        """
        for scheduler in self.lr_schedulers:
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        """Return the loss of a micro-batch; in a pipeline, the loss of all micro-batches of the step."""
        loss = broadcast_from_last_stage(super().forward_backward_step(**kwargs), self.parallel_dims)
        self._micro_batch_losses.append(loss.detach().clone())
        return loss

    def _clip_gradients(self, parameters: list[torch.Tensor], max_norm: float, **options: Any) -> torch.Tensor:
        """Clip the gradients of the step as torchtitan does, and decide whether the update is skipped.

        Every rank comes to the same decision: loss and gradient norm are reduced over all ranks.
        """
        for callback in self.callbacks:
            callback.after_backward()
        grad_norm = clip_grad_norm_(parameters, max_norm, **options)
        loss = sum_over_ranks(torch.stack(self._micro_batch_losses).sum(), self.parallel_dims)
        self._micro_batch_losses.clear()
        self.optimizers.skip = self.spike_guard.decide(self.step, loss, grad_norm)
        self.checkpointer.agree()
        is_saved = self.checkpointer.saves(self.step, last_step=self.step == self.config.training.steps)
        if is_saved or self.step % LOOK_STEPS == 0 or self.metrics_processor.should_log(self.step):
            self.spike_guard.look()
        return grad_norm

    def close(self) -> None:
        """End as torchtitan does. From now on nothing takes this rank for one that hangs."""
        faulthandler.cancel_dump_traceback_later()
        super().close()

    def state_dict(self) -> dict[str, Any]:
        """Return torchtitan's state of the trainer, with the state of the spike guard added."""
        return super().state_dict() | {_GUARD_STATE: self.spike_guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.spike_guard.load_state_dict(state_dict[_GUARD_STATE])


def _set_global_batch_size(config: StageTrainer.Config) -> StageTrainer.Config:
    """Return a copy whose loaders know the global batch, which the command line may have changed."""

    def set_in(loader: Any) -> Any:
        if not isinstance(loader, StreamingLoader.Config):
            return loader
        return dataclasses.replace(loader, global_batch_size=config.training.global_batch_size)

    validator = dataclasses.replace(config.validator, dataloader=set_in(config.validator.dataloader))
    # torchtitan ships no type information, so mypy does not know the fields.
    changes: dict[str, Any] = {"dataloader": set_in(config.dataloader), "validator": validator}
    return dataclasses.replace(config, **changes)


def _check_teacher_checkpoint(config: StageTrainer.Config) -> None:
    if config.teacher is not None and config.checkpoint.initial_load_path is None:
        raise RefusedInput(
            "stages.qat.distillation_weight is above 0 and checkpoint.initial_load_path is not set: the teacher is the "
            "checkpoint that the stage starts from; name it, or set distillation_weight to 0"
        )


def _check_expert_ranks(parallelism: ParallelismConfig) -> None:
    world, experts = int(os.environ["WORLD_SIZE"]), parallelism.expert_parallel_degree
    ranks = world // (parallelism.pipeline_parallel_degree * parallelism.data_parallel_replicate_degree)
    if ranks < 1 or ranks % experts:
        raise RefusedInput(
            f"parallelism.expert_parallel_degree = {experts}: the {ranks} ranks of a replica (WORLD_SIZE {world} / "
            "pipeline_parallel_degree / data_parallel_replicate_degree) must be a multiple of it; start another number "
            "of ranks (torchrun --nproc-per-node), or set --parallelism.expert_parallel_degree"
        )
