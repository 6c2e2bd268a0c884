"""MobileMoE as a torchtitan model (arXiv 2605.27358): a decoder whose every layer is attention plus MoE."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.utils import get_moe_model_nparams_and_flops

from titan_ext.cpu.device import IS_CPU
from titan_ext.mobilemoe.attention import DocumentAttention, find_documents, mask_rank_documents


class MobileMoEBlock(TransformerBlock):
    """One decoder layer: pre-norm attention, then pre-norm MoE, each added to the residual stream."""

    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        pass

    moe_enabled = True

    def __init__(self, config: Config):
        super().__init__()
        assert config.moe is not None
        self.attention = config.attention.build()
        self.moe = config.moe.build()
        self.attention_norm = config.attention_norm.build()
        self.ffn_norm = config.ffn_norm.build()

    def forward(
        self, x_BLD: torch.Tensor, attention_masks: object, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), attention_masks, positions)
        return x_BLD + self.moe(self.ffn_norm(x_BLD))


def _count_router_copies(parallelism: Any) -> int:
    """Return how many ranks route the same tokens and add up their gradients of the router's logits.

    Without expert parallelism every rank of tensor parallelism routes all tokens and computes a part of each expert's
    output, so its gradient of the routing weights is a part of a sum. Under `spmd_types`, the sum is taken at the
    router's weight and input: what a rank computes in full must be divided. DTensor takes it where the experts begin.
    """
    is_summed = parallelism.spmd_backend == "spmd_types" and parallelism.expert_parallel_degree == 1
    return parallelism.tensor_parallel_degree if is_summed else 1


class MobileMoEModel(Decoder):
    """The decoder, with tied embeddings. `build_config.model_config` makes its Config from dimensions."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        seed: int | None = None
        """Seed of the initial weights under pipeline parallelism, set from the training config; None otherwise."""

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Set what depends on the Trainer.Config `config`; torchtitan calls it before the model is built."""
            from titan_ext.mobilemoe.sharding import set_mobilemoe_sharding_config

            parallelism = config.parallelism
            if parallelism.pipeline_parallel_degree > 1:
                # titan_ext.mobilemoe.tied_embedding_pp ties them over two stages.
                self.enable_weight_tying = False  # type: ignore[misc]  # a slot of the base, which has no types
                self.tok_embeddings.param_init = self.lm_head.param_init
                self.seed = config.debug.seed
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            set_mobilemoe_sharding_config(
                self,
                enable_sp=parallelism.enable_sequence_parallel,
                enable_ep=parallelism.expert_parallel_degree > 1,
            )
            training = config.training
            assert training.global_batch_size > 0, "the z-loss needs training.global_batch_size to be set explicitly"
            for layer in self.layers:
                layer.moe.router.gate.num_tokens_per_step = training.global_batch_size * training.seq_len
                layer.moe.router.gate.num_copies = _count_router_copies(parallelism)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Return the parameters and the FLOPs of a token's forward and backward pass, for torchtitan's MFU."""
            attention = self.layers[0].attention
            nparams, flops = get_moe_model_nparams_and_flops(
                self, model, attention.n_heads, 2 * attention.head_dim, seq_len
            )
            # An untied pipeline has the embedding twice, but it is one parameter of the model.
            return nparams - (0 if self.enable_weight_tying else self.vocab_size * self.dim), flops

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Draw the initial weights.

        Under pipeline parallelism on the CPU, every stage also draws the numbers of the other stages, in the order of
        the whole model. So all stages together start from the same weights as one process. On a GPU, torchtitan gives
        each stage another seed.
        """
        if self.enable_weight_tying or self.config.seed is None or not IS_CPU:
            super().init_states(buffer_device=buffer_device)
            return
        torch.manual_seed(self.config.seed)
        for i, config in enumerate(self.config.layers):
            with torch.device("meta"):  # a layer of another stage draws its numbers but allocates no weights
                layer = self.layers[str(i)] if str(i) in self.layers else config.build()
            layer.init_states(buffer_device=buffer_device)
        for module in (self.norm, self.tok_embeddings, self.lm_head):  # a stage has at most one of the last two
            if module is not None:
                module.init_states(buffer_device=buffer_device)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_masks: object = None,
    ) -> torch.Tensor:
        """Return the logits [B, L, vocab].

        Args:
            tokens: int64 [B, L].
            positions: int64 [B, L], position of every token in its document: 0 where a packed document starts.
            attention_masks: flex's or varlen's mask from the trainer; `DocumentAttention` gets what it needs here.
        """
        if positions is not None and isinstance(self.config.first_attention.inner_attention, DocumentAttention.Config):
            # torchtitan's trainer builds masks for flex and varlen only.
            cp_mesh = next(iter(self.layers.values())).attention.inner_attention.cp_mesh
            attention_masks = find_documents(positions) if cp_mesh is None else mask_rank_documents(positions, cp_mesh)
        return super().forward(tokens, positions, attention_masks)
