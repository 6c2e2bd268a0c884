"""The transformers model against two independent forwards: explicit loops written here, and ExecuTorch's."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from executorch.examples.models.llama.llama_transformer import construct_transformer
from executorch.examples.models.llama.model_args import ModelArgs
from transformers import AutoConfig

from eval.export.dimensions import config_from_dims, dims_from_config
from eval.export.tensor_files import read_config
from eval.hf_mobilemoe import MobileMoEConfig, MobileMoEForCausalLM, MobileMoEModel
from eval.hf_mobilemoe.checkpoint_mobilemoe import tensor_shapes
from eval.hf_mobilemoe.configuration_mobilemoe import REQUIRED_KEYS
from eval.hf_mobilemoe.modeling_mobilemoe import rotary_embedding
from tests.eval.tiny_checkpoint import DIMS, random_tensors

CONFIG = config_from_dims(DIMS)
SCALING = CONFIG.rope_scaling


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_tensors()


@pytest.fixture(scope="module")
def model(weights) -> MobileMoEForCausalLM:
    return MobileMoEForCausalLM.from_pretrained(None, config=CONFIG, state_dict=dict(weights))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(8, DIMS.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))


def reference_logits(w: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits [L, V] in float64 with loops over positions, heads and experts, straight from the paper's description."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x = w["model.embed_tokens.weight"][ids]
    for i in range(DIMS.n_layers):
        layer = {n.removeprefix(f"model.layers.{i}."): t for n, t in w.items() if n.startswith(f"model.layers.{i}.")}
        x = x + reference_attention(layer, rms(x) * layer["input_layernorm.weight"])
        h = rms(x) * layer["post_attention_layernorm.weight"]
        x = x + torch.stack([reference_moe(layer, token) for token in h])
    return rms(x) * w["model.norm.weight"] @ w["model.embed_tokens.weight"].T


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + DIMS.norm_eps).sqrt()


def reference_rope(x: torch.Tensor, position: int) -> torch.Tensor:
    """Channels (2j, 2j+1) of one head as a complex number times e^(i * position * frequency)."""
    out = x.clone()
    for j in range(DIMS.head_dim // 2):
        frequency = DIMS.rope_theta ** (-2 * j / DIMS.head_dim)
        if 2 * math.pi / frequency > DIMS.rope_scaling.original_max_position_embeddings:
            frequency /= DIMS.rope_scaling.factor
        z = complex(x[2 * j], x[2 * j + 1]) * complex(math.cos(position * frequency), math.sin(position * frequency))
        out[2 * j], out[2 * j + 1] = z.real, z.imag
    return out


def reference_attention(layer: dict[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    q, k, v = (h @ layer[f"self_attn.{p}_proj.weight"].T for p in "qkv")
    out = torch.zeros(len(h), DIMS.n_heads * DIMS.head_dim, dtype=h.dtype)
    for head in range(DIMS.n_heads):
        own = slice(head * DIMS.head_dim, (head + 1) * DIMS.head_dim)
        group = head // (DIMS.n_heads // DIMS.n_kv_heads)
        shared = slice(group * DIMS.head_dim, (group + 1) * DIMS.head_dim)
        queries = [rms(reference_rope(q[t, own], t)) for t in range(len(h))]
        keys = [rms(reference_rope(k[t, shared], t)) for t in range(len(h))]
        for t in range(len(h)):
            scores = torch.stack([queries[t] @ keys[s] / math.sqrt(DIMS.head_dim) for s in range(t + 1)])
            out[t, own] = scores.softmax(0) @ v[: t + 1, shared]
    return out @ layer["self_attn.o_proj.weight"].T


def reference_moe(layer: dict[str, torch.Tensor], token: torch.Tensor) -> torch.Tensor:
    scores = (layer["feed_forward.router.weight"] @ token).sigmoid()
    biased = scores + layer["feed_forward.expert_bias"]
    chosen = sorted(range(DIMS.n_experts), key=lambda e: -biased[e])[: DIMS.top_k]
    p = "feed_forward.shared_expert."
    gate, up = layer[p + "gate_proj.weight"] @ token, layer[p + "up_proj.weight"] @ token
    out = layer[p + "down_proj.weight"] @ (F.silu(gate) * up)
    for e in chosen:
        hidden = token @ layer["feed_forward.experts.gate_up_proj"][e]
        gate, up = hidden[: DIMS.expert_hidden], hidden[DIMS.expert_hidden :]
        weight = scores[e] / (sum(scores[c] for c in chosen) + 1e-20) * DIMS.route_scale
        out = out + weight * ((F.silu(gate) * up) @ layer["feed_forward.experts.down_proj"][e])
    return out


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_the_loops(model, weights, tokens, attention):
    ids = tokens[0, :24]
    expected = reference_logits(weights, ids.tolist())
    model.set_attn_implementation(attention)
    try:
        assert relative_error(model(ids[None]).logits[0], expected) < 1e-5
    finally:
        model.set_attn_implementation("sdpa")


def test_the_router_bias_chooses_but_does_not_weigh(model, weights, tokens):
    """Guards the reference comparison: with these weights, the bias does change the choice of experts."""
    feed_forward = model.model.layers[0].feed_forward
    x = torch.randn(200, DIMS.d_model, generator=torch.Generator().manual_seed(2)) * 0.3
    experts, gates = feed_forward.route(x)
    scores = (x @ weights["model.layers.0.feed_forward.router.weight"].T).sigmoid()
    assert (experts.sort().values != scores.topk(DIMS.top_k).indices.sort().values).any()
    torch.testing.assert_close(gates.sum(-1), torch.full((200,), DIMS.route_scale))


def test_logits_equal_executorch(model, weights, tokens):
    """The device's eager model, fed the same weights without permuting heads: both rotate neighbouring channels."""
    theirs = executorch_model(weights)
    ids = tokens[:1, :48]
    ours = MobileMoEForCausalLM.from_pretrained(
        None, config=config_from_dims(DIMS, rope_scaling=None), state_dict=dict(weights)
    )
    with torch.no_grad():
        assert relative_error(ours(ids).logits, theirs(ids)) < 1e-4
        assert relative_error(model(ids).logits, theirs(ids)) > 1e-3, "the RoPE scaling has no effect"


def executorch_model(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """ExecuTorch's eager model without RoPE scaling, of which it knows another rule."""
    args = ModelArgs(
        dim=DIMS.d_model, n_layers=DIMS.n_layers, n_heads=DIMS.n_heads, n_kv_heads=DIMS.n_kv_heads,
        head_dim=DIMS.head_dim, vocab_size=DIMS.vocab_size, norm_eps=DIMS.norm_eps, max_seq_len=64, max_context_len=64,
        hidden_dim=DIMS.shared_hidden, moe=True, num_experts=DIMS.n_experts, num_activated_experts=DIMS.top_k,
        moe_hidden_dim=DIMS.expert_hidden, moe_shared_expert_hidden_dim=DIMS.shared_hidden, moe_use_expert_bias=True,
        moe_score_func="sigmoid", moe_route_scale=DIMS.route_scale, use_qk_norm=True, qk_norm_affine=False,
        qk_norm_before_rope=False, rope_theta=DIMS.rope_theta, generate_full_logits=True,
    )  # fmt: skip
    model = construct_transformer(args).eval()
    model.load_state_dict(executorch_names(weights))
    return model


def executorch_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    own = {"output.weight": weights["model.embed_tokens.weight"], "norm.weight": weights["model.norm.weight"]}
    own["tok_embeddings.weight"] = weights["model.embed_tokens.weight"]
    for i in range(DIMS.n_layers):
        ours, theirs = f"model.layers.{i}.", f"layers.{i}."
        for p in "qkvo":
            own[f"{theirs}attention.w{p}.weight"] = weights[f"{ours}self_attn.{p}_proj.weight"]
        own[f"{theirs}attention_norm.weight"] = weights[f"{ours}input_layernorm.weight"]
        own[f"{theirs}ffn_norm.weight"] = weights[f"{ours}post_attention_layernorm.weight"]
        moe = f"{theirs}block_sparse_moe."
        own[f"{moe}gate.weight"] = weights[f"{ours}feed_forward.router.weight"]
        own[f"{moe}expert_bias"] = weights[f"{ours}feed_forward.expert_bias"]
        gate, up = weights[f"{ours}feed_forward.experts.gate_up_proj"].chunk(2, -1)
        own[f"{moe}cond_ffn.w1"], own[f"{moe}cond_ffn.w3"] = gate.transpose(1, 2), up.transpose(1, 2)
        own[f"{moe}cond_ffn.w2"] = weights[f"{ours}feed_forward.experts.down_proj"]
        for name, p in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            own[f"{moe}shared_expert.{name}.weight"] = weights[f"{ours}feed_forward.shared_expert.{p}_proj.weight"]
    return own


def test_rope_scaling_equals_transformers():
    """Against transformers' own llama3 rule, where its factors differ (it divides by zero where they are equal)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = CONFIG.rope_scaling | {"high_freq_factor": 4.0, "factor": 8.0}
    config = MobileMoEConfig(head_dim=64, rope_scaling=scaling)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    torch.testing.assert_close(rotary_embedding(config, torch.tensor([[1]]))[0, 0].angle(), frequencies)


def test_cached_generation_equals_uncached(model, tokens):
    prompt = tokens[:1, :10]
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    cached = model.generate(prompt, use_cache=True, **options)
    assert cached.shape == (1, 74)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_a_static_cache_equals_the_dynamic_one(model, tokens, attention):
    batch, mask = tokens[:, :12].clone(), torch.ones(2, 12, dtype=torch.long)
    batch[0, :5], mask[0, :5] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    options |= {"pad_token_id": 0, "eos_token_id": 1}
    dynamic = model.generate(batch, **options)
    model.set_attn_implementation(attention)
    try:
        assert torch.equal(model.generate(batch, cache_implementation="static", **options), dynamic)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_on_disk_compute_the_same(dtype, model, tokens, tmp_path):
    """accelerate brings a layer's weights from files at every call: router and bias with them, and in float32."""
    model.save_pretrained(tmp_path / "saved")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    places["model.layers.1"] = "disk"
    offloaded = MobileMoEForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=str(tmp_path / "disk"), dtype=dtype
    )
    model = MobileMoEForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert offloaded.model.layers[1].feed_forward.expert_bias.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(offloaded(tokens).logits, model(tokens).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(offloaded.generate(tokens[:1], **options), model.generate(tokens[:1], **options))


def test_left_padded_batch_equals_singles(model, tokens):
    lengths = (7, 40)
    batch = torch.zeros(2, 40, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, n in enumerate(lengths):
        batch[row, -n:], mask[row, -n:] = tokens[row, :n], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    assert logits.isfinite().all()
    generated = model.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for row, n in enumerate(lengths):
        single = tokens[row : row + 1, :n]
        torch.testing.assert_close(logits[row, -n:], model(single).logits[0], rtol=1e-4, atol=1e-4)
        alone = model.generate(single, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(generated[row, -12:], alone[0, -12:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_equal_separate_ones(model, tokens, use_cache):
    lengths = (30, 45, 25)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(tokens[:1], position_ids=positions, use_cache=use_cache).logits[0]
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    visible = (document[:, None] == document) & torch.ones(100, 100, dtype=torch.bool).tril()
    masked = model(tokens[:1], position_ids=positions, attention_mask=visible[None, None]).logits[0]
    separate = torch.cat([model(ids[None]).logits[0] for ids in tokens[0].split(lengths)])
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masked, separate, rtol=1e-4, atol=1e-4)
    assert relative_error(model(tokens[:1]).logits[0], separate) > 1e-2, "the documents would not matter"


def test_loss_is_next_token_cross_entropy(model, tokens):
    out = model(tokens, labels=tokens)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_gradients_reach_every_parameter(weights, tokens):
    model = MobileMoEForCausalLM.from_pretrained(None, config=CONFIG, state_dict=dict(weights)).train()
    model(tokens, labels=tokens).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == [f"model.layers.{i}.feed_forward.expert_bias" for i in range(DIMS.n_layers)]
    assert not any(model.get_parameter(name).requires_grad for name in without)


def test_save_pretrained_round_trip(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_mobilemoe.py").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    again = MobileMoEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    base = MobileMoEModel.from_pretrained(tmp_path)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(MobileMoEForCausalLM.from_pretrained(tmp_path / "base")(tokens).logits, model(tokens).logits)


def test_router_and_bias_stay_float32_under_bfloat16(model, weights, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    low = MobileMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for i, layer in enumerate(low.model.layers):
        assert torch.equal(layer.feed_forward.router.weight, weights[f"model.layers.{i}.feed_forward.router.weight"])
        assert torch.equal(layer.feed_forward.expert_bias, weights[f"model.layers.{i}.feed_forward.expert_bias"])
    dtypes = {name: t.dtype for name, t in low.state_dict().items() if "router" not in name and "bias" not in name}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert low(tokens).logits.dtype == torch.bfloat16
    assert relative_error(low(tokens).logits, model(tokens).logits) < 0.2


def test_untrained_model_is_initialized():
    model = MobileMoEForCausalLM(CONFIG)
    assert model.model.layers[0].feed_forward.experts.down_proj.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert set(tensor_shapes(CONFIG)) | {"lm_head.weight"} == set(model.state_dict())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", lambda t: None, r"model\.norm\.weight \[64\] is missing"),
        ("model.layers.1.self_attn.k_proj.weight", lambda t: t[:-1], r"k_proj\.weight has shape \[31, 64\], expected"),
        ("model.layers.0.feed_forward.expert_bias", lambda t: None, r"expert_bias \[8\] is missing"),
        ("model.layers.2.input_layernorm.weight", lambda t: torch.ones(64), "is not a tensor of this model"),
    ],
)
def test_incomplete_state_dict_is_refused(weights, name, change, message):
    broken = dict(weights) | {name: change(weights.get(name))}
    broken = {n: t for n, t in broken.items() if t is not None}
    with pytest.raises(ValueError, match=message):
        MobileMoEForCausalLM.from_pretrained(None, config=CONFIG, state_dict=broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"no_rope_layers": [0] * 20}, "no_rope_layers"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok is 61"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be a whole number above 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number above 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; it must be an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": SCALING | {"type": "yarn"}}, "rope_scaling.type is 'yarn'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "rope_scaling lacks "),
        ({"rope_scaling": SCALING | {"factor": 0}}, "rope_scaling.factor is 0; it must be a number above 0"),
        ({"rope_scaling": SCALING | {"low_freq_factor": 8.0}}, "it must not be above high_freq_factor"),
        ({"quantization": {"format": "gptq"}}, "quantization.format is 'gptq'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_impossible_config_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MobileMoEConfig(**values)


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_what_a_config_does_not_say_is_not_guessed(key, model, tmp_path):
    """A rotation base changes no shape: flavor S's value would load, and compute something else."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    for read in (read_config, MobileMoEForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} lacks {key}; "):
            read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, r"config\.json: model_type is 'llama'; this code reads 'mobilemoe'"),
        ({"top_k": 4, "head_dim": 0}, r"config\.json: head_dim is 0; it must be a whole number above 0"),
        (None, r"config\.json is not JSON"),
        ([], r"config\.json is list and not a JSON object"),
    ],
)
def test_an_impossible_config_file_is_named(change, message, tmp_path):
    CONFIG.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    values = json.dumps(json.loads(text) | change if isinstance(change, dict) else change)
    path.write_text(text[:-9] if change is None else values)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)
    if isinstance(change, dict) and "model_type" not in change:
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path)


def test_the_released_spellings_are_read(tmp_path):
    """`type` for `rope_type`, no lists a layer, and nothing of where it was read in what is written again."""
    config = CONFIG.to_diff_dict() | {"model_type": "mobilemoe", "frobnicate": 3}
    for key in ("no_rope_layers", "layer_types", "tie_word_embeddings", "quantization"):
        config.pop(key, None)
    config["rope_scaling"] = {"type": "llama3"} | {k: v for k, v in SCALING.items() if k != "rope_type"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path)
    assert dims_from_config(read) == DIMS and read.layer_types == ["full_attention"] * DIMS.n_layers
    assert str(tmp_path) not in json.dumps(read.to_diff_dict())


def test_hidden_states_and_attentions_are_recorded(model, tokens):
    """By transformers' check_model_inputs: the embeddings, every layer's output, and the weights of its attention."""
    model.set_attn_implementation("eager")
    try:
        out = model(tokens[:, :9], output_hidden_states=True, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, DIMS.d_model)] * (DIMS.n_layers + 1)
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(tokens[:, :9]))
    assert [tuple(a.shape) for a in out.attentions] == [(2, DIMS.n_heads, 9, 9)] * DIMS.n_layers
