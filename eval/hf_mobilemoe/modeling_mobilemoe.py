"""This module is MobileMoE (arXiv 2605.27358) for transformers 4.57 and 5; a copy is in every exported folder.

It loads BF16/FP32 checkpoints and INT4 ones (config.json with `quantization`). INT4 weights are unpacked to floats when
they are loaded, or, with `keep_int4=True`, when they are used. q * scale is exact in float32 and rounded once in
bfloat16. Only weights are quantized here. The device and quantization-aware training also round activations to INT8,
with a range for each token. loading_mobilemoe.py lists the private names of transformers that this file uses.

Shape legend: B batch, L query length, T tokens (B * L), D hidden_size, H heads, N key/value heads, C head_dim,
E experts, K experts a token, F hidden width of an expert.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple

from .checkpoint_mobilemoe import check_tensors
from .configuration_mobilemoe import MobileMoEConfig
from .folder_mobilemoe import check_folder  # noqa: F401  transformers copies only the files that this one names
from .inputs_mobilemoe import CheckedGenerationMixin, check_inputs, check_outputs
from .loading_mobilemoe import dequantize_checkpoint, keep_float32_on_disk, load_tensors, read_config, record_source
from .packed_mobilemoe import build_packed_model
from .spellings_mobilemoe import join_spellings  # noqa: F401  as above
from .tensors_mobilemoe import open_checkpoint  # noqa: F401  as above
from .versions_mobilemoe import CACHE, build_causal_mask, record_outputs


def rotary_frequencies(config: MobileMoEConfig, device: torch.device | None = None) -> torch.Tensor:
    """Return the angle by which every channel pair turns from one position to the next, in radians, float32 [C/2].

    The scaling is Llama 3.1's. If low_freq_factor equals high_freq_factor, no frequency is interpolated.
    """
    pair = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    freqs = 1.0 / config.rope_theta ** (pair / config.head_dim)
    if config.rope_scaling is not None:
        low, high = config.rope_scaling["low_freq_factor"], config.rope_scaling["high_freq_factor"]
        turns = config.rope_scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns >= low).float()
        freqs = smooth * freqs + (1 - smooth) * freqs / config.rope_scaling["factor"]
    return freqs


def rotary_embedding(config: MobileMoEConfig, positions_BL: torch.Tensor) -> torch.Tensor:
    """Return cos + i sin of every position and channel pair, complex64 [B, L, C/2]."""
    # They are computed at every call, in float32: a buffer would lose precision when the model is cast to bfloat16.
    angles = positions_BL[..., None].float() * rotary_frequencies(config, positions_BL.device)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(x_BLHC: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channels (2i, 2i+1) as one complex number; the result is float32."""
    pairs = torch.view_as_complex(x_BLHC.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary[:, :, None]).flatten(-2)


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention's output [B, L, H, C] and weights for [B, heads, length, C] inputs; the mask is additive."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MobileMoEAttention(nn.Module):
    """Grouped-query attention; q and k are rotated first, then RMS-normalized over head_dim without weights."""

    def __init__(self, config: MobileMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        d, n_q, n_kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, n_q * config.head_dim, bias=False)
        self.k_proj = nn.Linear(d, n_kv * config.head_dim, bias=False)
        self.v_proj = nn.Linear(d, n_kv * config.head_dim, bias=False)
        self.o_proj = nn.Linear(n_q * config.head_dim, d, bias=False)

    def forward(
        self,
        x_BLD: torch.Tensor,
        rotary: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        cache_position: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [B, L, D] and, with eager attention, the weights [B, H, L, keys]."""
        head_dim = self.config.head_dim
        q_BLHC, k_BLNC, v_BLNC = (
            p(x_BLD).unflatten(-1, (-1, head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BLHC, k_BLNC = (
            F.rms_norm(apply_rotary(t, rotary), (head_dim,), eps=self.config.rms_norm_eps).to(x_BLD.dtype)
            for t in (q_BLHC, k_BLNC)
        )
        q, k, v = (t.transpose(1, 2) for t in (q_BLHC, k_BLNC, v_BLNC))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": cache_position})
        attend: Callable = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out_BLHC, weights = attend(self, q, k, v, attention_mask, scaling=head_dim**-0.5, dropout=0.0, **kwargs)
        return self.o_proj(out_BLHC.flatten(2)), weights


class MobileMoEMLP(nn.Module):
    """The shared expert, a SwiGLU network."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size_mlp, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size_mlp, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size_mlp, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MobileMoEExperts(nn.Module):
    """The routed SwiGLU experts as two tensors [E, in, out]; gate columns come before up columns."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        e, d, f = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, d, 2 * f))
        self.down_proj = nn.Parameter(torch.empty(e, f, d))

    def forward(self, x_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Sort the tokens by expert, run the experts that were hit, and sum each token's K outputs in float32."""
        top_k = experts_TK.shape[1]
        order = experts_TK.flatten().argsort(stable=True)
        counts = torch.bincount(experts_TK.flatten(), minlength=len(self.gate_up_proj)).tolist()
        outputs = []
        for expert, x in enumerate(x_TD[order // top_k].split(counts)):
            if counts[expert]:
                gate, up = (x @ self.gate_up_proj[expert]).chunk(2, dim=-1)
                outputs.append((F.silu(gate) * up) @ self.down_proj[expert])
        y_TKD = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, top_k))
        return (y_TKD.float() * weights_TK[..., None]).sum(dim=1).to(x_TD.dtype)


class MobileMoERouter(nn.Linear):
    """Linear layer that scores the experts [T, E], in float32 for every dtype of the model, under autocast too.

    Only this module reads its weight: accelerate loads weights from disk when their module is called.
    """

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float()).sigmoid()


class MobileMoEFeedForward(nn.Module):
    """Router, routed experts and the shared expert, whose output is added unscaled."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        self.top_k, self.route_scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.router = MobileMoERouter(config.hidden_size, config.num_local_experts, bias=False, dtype=torch.float32)
        # The choice of experts has no gradient. It is not a buffer, because accelerate loses buffers on the disk.
        bias_E = torch.zeros(config.num_local_experts, dtype=torch.float32)
        self.expert_bias = nn.Parameter(bias_E, requires_grad=False)
        self.experts = MobileMoEExperts(config)
        self.shared_expert = MobileMoEMLP(config)

    def route(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each token's experts [T, K], chosen with the bias, and their float32 weights, without the bias."""
        scores_TE = self.router(x_TD)
        experts_TK = (scores_TE + self.expert_bias.float()).topk(self.top_k, dim=-1).indices
        chosen_TK = scores_TE.gather(1, experts_TK)
        return experts_TK, chosen_TK / (chosen_TK.sum(dim=-1, keepdim=True) + 1e-20) * self.route_scale

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        x_TD = x_BLD.flatten(0, 1)
        return (self.experts(x_TD, *self.route(x_TD)) + self.shared_expert(x_TD)).view_as(x_BLD)


class MobileMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each after an RMSNorm and with a residual connection."""

    def __init__(self, config: MobileMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MobileMoEAttention(config, layer_idx)
        self.feed_forward = MobileMoEFeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), **kwargs)[0]
        return x_BLD + self.feed_forward(self.post_attention_layernorm(x_BLD))


class MobileMoEPreTrainedModel(PreTrainedModel):
    """Base class with the loading, saving and initialization of both models."""

    config: MobileMoEConfig
    config_class = MobileMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MobileMoEDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("router", "expert_bias")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MobileMoEDecoderLayer, "attentions": MobileMoEAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MobileMoEExperts):
            module.gate_up_proj.data.normal_(mean=0.0, std=0.02)
            module.down_proj.data.normal_(mean=0.0, std=0.02)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, state_dict=None, keep_int4=False, **kwargs
    ):
        """Load a model as transformers does, with three differences.

        A missing or superfluous tensor, or one of another shape, raises a ValueError that names it; transformers would
        use random weights. A checkpoint whose config.json has `quantization` is dequantized to `dtype` (float32 by
        default). The loaded model's config does not have the key, because a saved copy would be unquantized. With
        `keep_int4` the weights stay packed, which takes a quarter of the memory of bfloat16 and more time a token
        (`packed_mobilemoe`). The only options then are `dtype`, `attn_implementation` and `generation_config`.
        """
        config, hub = read_config(pretrained_model_name_or_path, config, kwargs)
        where = str(pretrained_model_name_or_path or "the state dict")
        found = load_tensors(where, state_dict, config, hub)
        check_tensors({name: tuple(tensor.shape) for name, tensor in found.items()}, config, where)
        if keep_int4:
            return build_packed_model(cls, where, found, config, hub, **kwargs)
        if config.quantization is None:
            options = {"config": config, "state_dict": state_dict} | kwargs
            return keep_float32_on_disk(super().from_pretrained(pretrained_model_name_or_path, *model_args, **options))
        options = dequantize_checkpoint(cls, where, found, config, hub, kwargs)
        # The folder's name is None, because transformers would read the packed files.
        return record_source(super().from_pretrained(None, *model_args, **options), where)

    def save_pretrained(self, *args, **kwargs):
        """Save the model as transformers does; raise a ValueError for packed weights, whose folder already exists."""
        if self.config.quantization is not None:
            raise ValueError(f"the weights are packed (keep_int4): copy the folder they come from, {self.name_or_path}")
        return super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs):
        """Resize the embedding as transformers does; raise a ValueError for packed weights, which take no more rows."""
        if self.config.quantization is not None:
            raise ValueError("the embedding is packed (keep_int4): load the model without keep_int4 to resize it")
        return super().resize_token_embeddings(*args, **kwargs)


class MobileMoEModel(MobileMoEPreTrainedModel):
    """The decoder without its output projection."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MobileMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @record_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states [B, L, D] of `input_ids` [B, L] or `inputs_embeds` [B, L, D].

        Args:
            attention_mask: [B, past + L] with 0 for padding on either side, or a 4-D mask that is used as it is (or
                {"full_attention": that}).
            position_ids: [B, L]. Positions that restart at 0, without `attention_mask` and without a past, mark packed
                documents: a document sees only itself (with "sdpa", "eager" and "flex_attention").
            cache: the name that newer versions of transformers have for `past_key_values`.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        checked = (input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, cache_position)
        check_inputs(self.config, *checked)
        x_BLD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache_position is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(seen, seen + x_BLD.shape[1], device=x_BLD.device)
        if position_ids is None:
            position_ids = cache_position[None]
        if isinstance(attention_mask, dict):  # generate with a static cache makes a mask for each type of layer
            attention_mask = attention_mask["full_attention"]
        # The mask comes before our own cache: transformers detects packed documents only if there is no cache.
        mask = build_causal_mask(
            x_BLD,
            past_key_values,
            config=self.config,
            attention_mask=attention_mask,
            cache_position=cache_position,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        rotary = rotary_embedding(self.config, position_ids)
        for layer in self.layers:
            x_BLD = layer(
                x_BLD,
                rotary=rotary,
                attention_mask=mask,
                past_key_values=past_key_values,
                cache_position=cache_position,
                position_ids=position_ids,
                **kwargs,
            )
        past: dict[str, Any] = {CACHE: past_key_values if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BLD), **past)


class MobileMoEForCausalLM(MobileMoEPreTrainedModel, CheckedGenerationMixin):
    """The language model; its output projection is its embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__(config)
        self.model = MobileMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, L, vocab_size] in the model's dtype; see `MobileMoEModel.forward` for the other arguments.

        Args:
            labels: [B, L]; the loss is then the mean cross-entropy in nats of predicting label t + 1 at position t.
                -100 is ignored.
            logits_to_keep: number of last positions to return; 0 returns all.
        """
        check_outputs(logits_to_keep, labels, input_ids if inputs_embeds is None else inputs_embeds, self.vocab_size)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


__all__ = ["MobileMoEForCausalLM", "MobileMoEModel"]
