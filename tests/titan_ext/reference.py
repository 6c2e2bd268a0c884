"""MobileMoE in plain PyTorch, token by token and expert by expert. The tests compare the torchtitan model with it.

Written from the model's description (arXiv 2605.27358 and the released configuration), not from the code under test.
"""

import math

import torch

from titan_ext.config import ModelDims


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rope_frequencies(dims: ModelDims) -> list[float]:
    """Return the angle a position of each pair of a head, in radians, [head_dim / 2].

    This is llama3 scaling with equal low and high frequency factors: frequencies of long wavelengths are divided by the
    factor, the others stay.
    """
    scaling = dims.rope_scaling
    frequencies = []
    for k in range(dims.head_dim // 2):
        frequency = dims.rope_theta ** (-2 * k / dims.head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > scaling.original_max_position_embeddings / scaling.low_freq_factor:
            frequency /= scaling.factor
        frequencies.append(frequency)
    return frequencies


def rotate(x: torch.Tensor, position: int, frequencies: list[float]) -> torch.Tensor:
    """Rotate neighbouring pairs (x[2k], x[2k+1]) of one head by position * frequency[k]."""
    out = torch.empty_like(x)
    for k, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[2 * k] = x[2 * k] * cos - x[2 * k + 1] * sin
        out[2 * k + 1] = x[2 * k] * sin + x[2 * k + 1] * cos
    return out


def swiglu(x, gate, up, down):
    return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))


def moe(x, w: dict, dims: ModelDims) -> torch.Tensor:
    """Return the MoE layer's output for one token [d_model]; `w` has the layer's weights by released name."""
    scores = torch.sigmoid(w["feed_forward.router.weight"] @ x)
    chosen = (scores + w["feed_forward.expert_bias"]).topk(dims.top_k).indices
    weights = scores[chosen] / (scores[chosen].sum() + 1e-20) * dims.route_scale
    shared = "feed_forward.shared_expert."
    out = swiglu(*(x, *(w[shared + f"{m}_proj.weight"] for m in ("gate", "up", "down"))))
    for expert, weight in zip(chosen.tolist(), weights, strict=True):
        gate, up = w["feed_forward.experts.gate_up_proj"][expert].T.chunk(2)
        out = out + weight * swiglu(x, gate, up, w["feed_forward.experts.down_proj"][expert].T)
    return out


def attention(x_LD, w: dict, dims: ModelDims) -> torch.Tensor:
    """Return the output [L, d_model] of causal grouped-query attention for one document."""
    frequencies = rope_frequencies(dims)
    heads = {}
    for name, count in (("q", dims.n_heads), ("k", dims.n_kv_heads), ("v", dims.n_kv_heads)):
        projected = (x_LD @ w[f"self_attn.{name}_proj.weight"].T).view(len(x_LD), count, dims.head_dim)
        if name != "v":
            projected = torch.stack(
                [
                    torch.stack([rms(rotate(h, t, frequencies), dims.norm_eps) for h in row])
                    for t, row in enumerate(projected)
                ]
            )
        heads[name] = projected
    rows = []
    for t in range(len(x_LD)):
        row = []
        for n in range(dims.n_heads):
            kv = n // (dims.n_heads // dims.n_kv_heads)
            scores = heads["k"][: t + 1, kv] @ heads["q"][t, n] / math.sqrt(dims.head_dim)
            row.append(torch.softmax(scores, 0) @ heads["v"][: t + 1, kv])
        rows.append(torch.cat(row))
    return torch.stack(rows) @ w["self_attn.o_proj.weight"].T


def logits(tokens: list[int], tensors: dict[str, torch.Tensor], dims: ModelDims) -> torch.Tensor:
    """Return the logits [L, vocab] of one document, computed in the precision of `tensors` (by released name)."""
    embedding = tensors["model.embed_tokens.weight"]
    x_LD = embedding[tokens]
    for i in range(dims.n_layers):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        x_LD = x_LD + attention(rms(x_LD, dims.norm_eps) * w["input_layernorm.weight"], w, dims)
        normed_LD = rms(x_LD, dims.norm_eps) * w["post_attention_layernorm.weight"]
        x_LD = x_LD + torch.stack([moe(x, w, dims) for x in normed_LD])
    return rms(x_LD, dims.norm_eps) * tensors["model.norm.weight"] @ embedding.T
