"""Expert, tensor, context and data parallelism, activation checkpointing and compile for a MobileMoE."""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointingConfig
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_cp_to_forward
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder, get_fsdp_reshard_after_forward_policy
from torchtitan.distributed.full_dtensor import resolve_fsdp_mesh, resolve_sparse_fsdp_mesh, validate_config

from titan_ext import compat
from titan_ext.cpu.fsdp import adapt_reductions
from titan_ext.mobilemoe.attention import DocumentAttention
from titan_ext.mobilemoe.model import MobileMoEModel


def parallelize_mobilemoe(
    model: MobileMoEModel,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig,
    ac_config: ActivationCheckpointingConfig | None,
    dump_folder: str,
) -> MobileMoEModel:
    """Parallelize `model` in place and return it. It is on the meta device; torchtitan allocates its weights later.

    The order is that of torchtitan's own models: activation checkpointing wraps the blocks, compile traces what is
    wrapped, and FSDP comes last, because its hooks must stay outside of the compiled graphs.
    """
    one_mesh = parallelism.spmd_backend in ("full_dtensor", "spmd_types")
    if one_mesh:  # every parameter is a DTensor over all axes of the mesh, also those of data and context parallelism
        validate_config(parallel_dims, model)
        model.parallelize(parallel_dims)
    else:
        if parallel_dims.cp_enabled:
            _apply_context_parallel(model, parallel_dims)
        if parallel_dims.tp_enabled or parallel_dims.ep_enabled:
            model.parallelize(parallel_dims)
            for block in model.layers.values():
                _copy_gathered_inputs(block.moe.routed_experts)

    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)

    dp_mesh, dp_mesh_dims, edp_mesh, edp_mesh_dims = _find_data_parallel_meshes(parallel_dims, one_mesh)
    # The router's gate first: its weight and gradient stay float32, so it needs a policy of its own.
    for block in model.layers.values():
        fully_shard(
            block.moe.router.gate,
            mesh=dp_mesh,
            mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32),
            reshard_after_forward=get_fsdp_reshard_after_forward_policy(
                parallelism.fsdp_reshard_after_forward, parallel_dims.pp_enabled
            ),
            **({"dp_mesh_dims": dp_mesh_dims} if dp_mesh_dims is not None else {}),
        )
    apply_fsdp_to_decoder(
        model,
        dp_mesh,
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        pp_enabled=parallel_dims.pp_enabled,
        cpu_offload=training.enable_cpu_offload,
        reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
        ep_degree=parallel_dims.ep,
        edp_mesh=edp_mesh,
        dp_mesh_dims=dp_mesh_dims,
        edp_mesh_dims=edp_mesh_dims,
        enable_symm_mem=parallelism.enable_fsdp_symm_mem,
    )
    for block in model.layers.values():
        _gather_router_with_block(block.moe.router.gate, block)
    adapt_reductions(model)
    return model


def _gather_router_with_block(gate: FSDPModule, block: FSDPModule) -> None:
    """Make the block's hooks gather the router's weight and reduce its gradient, and remove the gate's own hooks.

    The weight stays float32 in the forward pass and in its gradient, while the rest is cast to
    `mixed_precision_param`. FSDP2 has one policy a parameter group, so the weight is a group of its own. It must not be
    a unit of its own, for two reasons: hooks inside of a block break the one graph of a compiled block, and
    torchtitan's prefetching under expert parallelism names blocks only, so it would miss the gate. A block has several
    groups anyway where its experts lie on another mesh, so FSDP2 handles any number of groups.
    """
    compat.move_param_groups(gate, block)


def _copy_gathered_inputs(module: torch.nn.Module) -> None:
    """Make `module`, a local_map region, copy the inputs that are still being gathered when it is called.

    local_map waits for them outside of autograd. Under tensor parallelism without expert parallelism, the input of the
    routed experts would get no gradient, on any device. The copy waits inside of autograd.
    """

    def copy_if_gathering(value: Any) -> Any:
        return value.clone() if compat.is_being_gathered(value) else value

    module.register_forward_pre_hook(lambda module, inputs: tuple(map(copy_if_gathering, inputs)))


def _apply_context_parallel(model: MobileMoEModel, parallel_dims: ParallelDims) -> None:
    """Split the attention's sequences over the ranks of context parallelism."""
    attentions = [block.attention.inner_attention for block in model.layers.values()]
    cp_mesh = parallel_dims.get_mesh("cp")
    if not isinstance(attentions[0], DocumentAttention):
        apply_cp_to_forward(attentions, cp_mesh)
        return
    for attention in attentions:
        attention.cp_mesh = cp_mesh


def _find_data_parallel_meshes(parallel_dims: ParallelDims, one_mesh: bool) -> tuple:
    """Return the FSDP meshes of the dense parameters and of the routed experts, each with its data-parallel dims."""
    if one_mesh:
        return (*resolve_fsdp_mesh(parallel_dims), *resolve_sparse_fsdp_mesh(parallel_dims))
    replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    dp_mesh = parallel_dims.get_mesh([*replicate, "fsdp"])
    edp_mesh = parallel_dims.get_optional_mesh([*replicate, "efsdp"]) if parallel_dims.ep_enabled else None
    return dp_mesh, None, edp_mesh, None
