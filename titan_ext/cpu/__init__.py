"""Adaptations that let torchtitan 0.3.0 train on the CPU. None of them is active where an accelerator is present.

1. torchtitan falls back to "cuda" where there is no accelerator. `device.use_cpu` sets the CPU and a device module with
   the memory calls that the trainer makes. Importing `titan_ext.mobilemoe` calls it.
2. FSDP2 averages gradients with PREMUL_SUM, which gloo refuses. In a group of one rank it copies all gradients twice,
   although there is nothing to reduce. `fsdp.adapt_reductions` changes both.
3. gloo has no all_to_all of tensor lists. `device.SPMD_BACKEND` selects the backend of torchtitan that exchanges tokens
   with all_to_all_single and split sizes.
4. Flex attention has no backward pass on the CPU, and varlen attention runs on CUDA only.
   `titan_ext.mobilemoe.attention.DocumentAttention` replaces them.
5. CUDA graphs are off: `titan_ext.training.trainer_config`.
6. DTensor has no sharded random numbers on the CPU: every rank would fill its shard from the same seed, and the experts
   of two ranks would start with equal weights. `init.normal_init` draws the full tensor on every rank and keeps the
   shard. `titan_ext.mobilemoe.model.MobileMoEModel.init_states` does the same for the stages of a pipeline.
7. torch._grouped_mm has no backward pass for a rank that received no token: `titan_ext.mobilemoe.moe.Experts`.
8. A gloo group has two worker threads, which damage the heap when they finish two collectives at the same time.
   `titan_ext.compat.run_gloo_in_one_thread` gives it one.
9. glibc returns large blocks to the system, and every step faults them in again: `allocator.keep_freed_memory`.
10. oneDNN prepares a bfloat16 product anew for every number of rows, and an expert seldom gets the same number twice.
    `kernels.pad_groups` rounds the number of rows up.
11. Blocks are not compiled on the CPU, and a quantizer makes a dozen passes over a weight. `kernels.fuse_if_large`
    compiles the quantizer alone.
12. Blocks are not compiled, so the sum of a token's rows would make passes over memory for every choice.
    `titan_ext.mobilemoe.row_gather` calls `embedding_bag`, which makes one.
13. For the same reason, `titan_ext.mobilemoe.rope` rotates with one product of complex numbers instead of several real
    ones. The bits are the same.
14. torchao's float8 grouped product has kernels for GPUs alone: `float8.emulate_grouped_product` rounds with torchao's
    functions, and torchao itself emulates the linears.

This file imports nothing: pipelines reads `titan_ext.cpu.allocator` in processes that must not import torch.
"""
