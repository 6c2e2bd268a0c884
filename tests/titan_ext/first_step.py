"""What a rank of a layout computes in its first step, under either of torchtitan's backends."""

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torchtitan.trainer import Trainer

from titan_ext.training.stage_spec import StageSpec
from titan_ext.training.train import build_stage_config


def save_first_step(spec: StageSpec) -> None:
    """Write on rank 0 the gradients of one micro-batch, and each layer's expert bias after the update.

    The name of the stage is torchtitan's backend.
    """
    dist.all_to_all = exchange_by_single_tensors
    config = build_stage_config(spec)
    config.parallelism.spmd_backend = spec.name
    config.checkpoint.enable = config.validator.enable = False
    trainer = config.build()
    inputs, labels = next(iter(trainer.dataloader))
    Trainer.forward_backward_step(
        trainer,
        input_dict=inputs,
        labels=labels,
        global_valid_tokens=torch.tensor(spec.stage.global_batch_size * spec.stage.seq_len),
    )
    (model,) = trainer.model_parts
    found = {name: gather(parameter.grad) for name, parameter in model.named_parameters() if "lm_head" not in name}
    trainer.optimizers.step()
    found |= {f"layers.{i}.expert_bias": gather(block.moe.expert_bias_E) for i, block in model.layers.items()}
    if dist.get_rank() == 0:
        save_file(found, spec.out / "first_step.safetensors")
    trainer.close()
    dist.destroy_process_group()


def gather(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()


def exchange_by_single_tensors(
    arriving: list[torch.Tensor], sent: list[torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Stand in for `torch.distributed.all_to_all`, which gloo lacks; only `spmd_types` calls it."""
    rows = torch.cat([tensor.flatten() for tensor in arriving])
    sizes = [[tensor.numel() for tensor in tensors] for tensors in (arriving, sent)]
    dist.all_to_all_single(rows, torch.cat([tensor.flatten() for tensor in sent]), *sizes, group=group)
    for tensor, part in zip(arriving, rows.split(sizes[0]), strict=True):
        tensor.copy_(part.view(tensor.shape))
