"""One checkpoint, one reading: every reader takes a folder with the same numbers, or all refuse it for the same fact.

A case changes one file of a small folder that states a fact twice. The readers are `from_pretrained`, import, export,
the device, the evaluation and the validation of an initial model.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.export.dcp_checkpoint import CheckpointTensors
from eval.export.hf_folder import write_hf_folder
from eval.export.import_hf import import_folder
from eval.hf_mobilemoe import MobileMoEForCausalLM
from tests.eval.readings import (
    BIAS,
    EMBEDDING,
    INDEX,
    NORM,
    TINY,
    Case,
    both,
    check_case,
    config,
    copy,
    edit,
    from_auto,
    index,
    last_file,
    link,
    quantization,
    repeat_in_the_last_file,
    tensors,
    text,
    without_prefix,
)
from tests.eval.tiny_checkpoint import quantize_folder, random_tensors, write_tokenizer
from titan_ext.quantization.config import QuantizationConfig


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One file, bfloat16."""
    root = tmp_path_factory.mktemp("one_reading")
    write_tokenizer(root / "tokenizer")
    return write_hf_folder(random_tensors(TINY), TINY, root / "tokenizer", root / "whole")


@pytest.fixture(scope="module")
def sharded(whole) -> Path:
    """Several files and an index."""
    return write_hf_folder(
        random_tensors(TINY), TINY, whole.with_name("tokenizer"), whole.with_name("sharded"), max_shard_bytes=20_000
    )


@pytest.fixture(scope="module")
def int4(whole) -> Path:
    return quantize_folder(whole, whole.with_name("int4"), QuantizationConfig())


ROPE = {
    "rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
}  # fmt: skip
BOTH = {"rope_theta": 10_000.0} | ROPE

CONFIGS = {
    "unchanged": Case(config()),
    "rope_parameters alone": Case(config(rope_theta=..., rope_scaling=..., rope_parameters=BOTH)),
    "rope_parameters beside a theta of null": Case(config(rope_theta=None, rope_parameters=BOTH)),
    "rope_parameters beside the same": Case(config(rope_parameters=BOTH)),
    "rope_parameters by `type`": Case(
        config(rope_parameters={k: v for k, v in BOTH.items() if k != "rope_type"} | {"type": "llama3"})
    ),
    "rope_theta inside of rope_scaling": Case(config(rope_scaling=BOTH, rope_theta=...)),
    "whole number for the same float": Case(config(rope_theta=10_000)),
    "another theta in rope_parameters": Case(
        config(rope_parameters=BOTH | {"rope_theta": 500_000.0}),
        "rope_theta is 10000.0 and rope_parameters.rope_theta is 500000.0",
    ),
    "another factor in rope_parameters": Case(
        config(rope_parameters=BOTH | {"factor": 8.0}), "rope_scaling.factor is 16.0 and rope_parameters.factor is 8.0"
    ),
    "no scaling in rope_parameters": Case(
        config(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}), "and rope_parameters is None"
    ),
    "no rope_scaling, but rope_parameters": Case(
        config(rope_scaling=None, rope_parameters=BOTH), "rope_scaling is None and rope_parameters"
    ),
    "another theta inside of rope_scaling": Case(
        config(rope_scaling=BOTH | {"rope_theta": 1.0}), "rope_theta is 10000.0 and rope_scaling.rope_theta is 1.0"
    ),
    "two types": Case(
        config(rope_scaling=ROPE | {"type": "default"}),
        "rope_scaling.rope_type is 'llama3' and rope_scaling.type is 'default'",
    ),
    "yarn in rope_parameters": Case(
        config(rope_parameters=BOTH | {"rope_type": "yarn"}), "rope_parameters.rope_type is 'yarn'"
    ),
    "a key of another scaling": Case(config(rope_scaling=ROPE | {"beta_fast": 32}), "rope_scaling.beta_fast is 32"),
    "rope by layer type": Case(config(rope_parameters={"full_attention": BOTH}), "rope_parameters.full_attention is"),
    "another original length at the top": Case(
        config(original_max_position_embeddings=8192), "original_max_position_embeddings is 8192 and rope_scaling"
    ),
    "rope as text": Case(config(rope_scaling="llama3"), "rope_scaling is 'llama3'; it must be an object"),
    "no rope at all": Case(config(rope_theta=..., rope_scaling=...), "lacks rope_theta, rope_scaling"),
    "num_experts, the same": Case(config(num_experts=4, n_routed_experts=4, num_experts_per_token=None)),
    "num_experts, another": Case(config(num_experts=8), "num_local_experts is 4 and num_experts is 8"),
    "n_routed_experts, another": Case(config(n_routed_experts=8), "num_local_experts is 4 and n_routed_experts is 8"),
    "another top k": Case(config(moe_topk=1), "num_experts_per_tok is 2 and moe_topk is 1"),
    "another norm of the top k": Case(config(norm_topk=False), "norm_topk_prob is True and norm_topk is False"),
    "softmax routing": Case(config(scoring_func="softmax"), "scoring_func is 'softmax'"),
    "two shared experts": Case(config(n_shared_experts=2), "n_shared_experts is 2"),
    "a sliding window": Case(config(sliding_window=128), "sliding_window is 128"),
    "dtype twice, the same": Case(config(torch_dtype="bfloat16")),
    "dtype twice": Case(config(torch_dtype="float32"), "dtype is 'bfloat16' and torch_dtype is 'float32'"),
    "torch_dtype alone": Case(config(torch_dtype="bfloat16", dtype=...)),
    "dtype unknown": Case(config(dtype="int8"), "dtype is 'int8'"),
    "dtype with its module": Case(config(dtype="torch.bfloat16"), "dtype is 'torch.bfloat16'"),
    "dtype wider than the tensors": Case(config(dtype="float32")),
    "dtype that rounds the tensors": Case(config(dtype="float16"), "config.json has dtype float16"),
    "no dtype": Case(config(dtype=...)),
    "quantization_config": Case(
        config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config is"
    ),
    "weights of another name": Case(config(transformers_weights="other.safetensors"), "transformers_weights is"),
    "config of another name": Case(
        both(copy("config.json", "config.4.0.0.json"), config(configuration_files=["config.4.0.0.json"])),
        "configuration_files is",
    ),
    "another architecture": Case(config(architectures=["Llama4ForCausalLM"]), "architectures names 'Llama4"),
    "another class in auto_map": Case(
        config(auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}), "auto_map.AutoModelForCausalLM"
    ),
    "another model_type": Case(
        config(model_type="llama4_text"), "model_type is 'llama4_text'", not_read_by=(from_auto,)
    ),
    "an unknown key": Case(config(frobnicate=3)),
    "a number as text": Case(config(hidden_size="32"), "hidden_size is '32'"),
    "8.0 for 8": Case(config(num_hidden_layers=1.0), "num_hidden_layers is 1.0"),
    "true for 1": Case(config(num_hidden_layers=True), "num_hidden_layers is True"),
    "1 for true": Case(config(norm_topk_prob=1), "norm_topk_prob is 1"),
    "a negative number": Case(config(num_local_experts=-4), "num_local_experts is -4"),
    "NaN": Case(text("config.json", lambda t: t.replace("10000.0", "NaN", 1)), "nan"),
    "infinity": Case(text("config.json", lambda t: t.replace("10000.0", "1e999", 1)), "rope_theta is inf"),
    "a key twice": Case(
        text("config.json", lambda t: t.replace("{", '{"num_experts_per_tok": 4,', 1)), "'num_experts_per_tok' stands"
    ),
    "a byte order mark": Case(text("config.json", lambda t: "\ufeff" + t), "config.json"),
    "more layers": Case(config(num_hidden_layers=2, no_rope_layers=..., layer_types=...), "is missing"),
    "more heads": Case(config(num_attention_heads=4), "q_proj.weight has shape"),
    "fewer key-value heads": Case(config(num_attention_heads=3, head_dim=16), "q_proj.weight has shape"),
    "another head_dim": Case(config(head_dim=32), "q_proj.weight has shape"),
    "no head_dim": Case(config(head_dim=...), "lacks head_dim"),
    "another vocabulary": Case(config(vocab_size=400), "embed_tokens.weight has shape"),
    "another expert width": Case(config(intermediate_size=64), "has shape"),
    "an untied head": Case(config(tie_word_embeddings=False), "tie_word_embeddings is False"),
}

TENSORS = {
    "float32 beside dtype bfloat16": Case(
        tensors(lambda t: t | {NORM: t[NORM].float()}), f"{NORM} is torch.float32, "
    ),
    "float32 without a dtype": Case(
        both(config(dtype=...), tensors(lambda t: t | {EMBEDDING: t[EMBEDDING].float()})), "config.json has no dtype"
    ),
    "float64": Case(tensors(lambda t: t | {NORM: t[NORM].double()}), f"{NORM} has dtype torch.float64"),
    "the bias in bfloat16": Case(tensors(lambda t: t | {BIAS: t[BIAS].bfloat16()})),
    "no bias": Case(tensors(lambda t: {n: x for n, x in t.items() if n != BIAS}), f"{BIAS} [4] is missing"),
    "an empty tensor": Case(tensors(lambda t: t | {NORM: t[NORM][:0]}), f"{NORM} has shape [0]"),
    "a tensor without dimensions": Case(tensors(lambda t: t | {NORM: t[NORM][0]}), f"{NORM} has shape []"),
    "a layer more": Case(
        tensors(lambda t: t | {"model.layers.1.input_layernorm.weight": torch.ones(32).bfloat16()}), "is not a tensor"
    ),
    "NaN": Case(tensors(lambda t: t | {NORM: t[NORM] * torch.nan}), f"{NORM} holds NaN"),
    "infinity": Case(tensors(lambda t: t | {BIAS: t[BIAS] / 0}), f"{BIAS} holds NaN or inf"),
    "the head, the same": Case(tensors(lambda t: t | {"lm_head.weight": t[EMBEDDING].clone()})),
    "the head, another": Case(
        tensors(lambda t: t | {"lm_head.weight": t[EMBEDDING] + 1}), f"lm_head.weight differs from {EMBEDDING}"
    ),
    "of MobileMoEModel": Case(tensors(without_prefix)),
    "prefix of a compiled model": Case(
        tensors(lambda t: {f"_orig_mod.{n}": x for n, x in t.items()}), f"{EMBEDDING} [320, 32] is missing"
    ),
    "of another program": Case(tensors(lambda t: t, format="tf"), "has format 'tf'"),
    "metadata without format": Case(tensors(lambda t: t, step="3"), "has format None"),
    "a variant beside it": Case(copy("model.safetensors", "model.fp16.safetensors"), "holds model.fp16.safetensors"),
    "a shard beside it": Case(
        copy("model.safetensors", "model-00001-of-00002.safetensors"), "holds model-00001-of-00002"
    ),
    "an index of it": Case(
        edit(INDEX, metadata={}, weight_map={n: "model.safetensors" for n in random_tensors(TINY)})
    ),
    "another program's file beside it": Case(copy("model.safetensors", "consolidated.safetensors")),
    "a pickle beside it": Case(copy("config.json", "pytorch_model.bin")),
    "a pickle alone": Case(
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "model.safetensors is missing"
    ),
    "an adapter beside it": Case(edit("adapter_config.json", base_model_name_or_path="other"), "adapter_config.json"),
    "a DCP checkpoint beside it": Case(copy("config.json", ".metadata"), "of a DCP checkpoint"),
    "links of the hub's cache": Case(link),
}  # fmt: skip


SHARDS = {
    "unchanged": Case(index(lambda v: None)),
    "no total_size": Case(index(lambda v: v["metadata"].clear())),
    "another total_size": Case(index(lambda v: v["metadata"].update(total_size=7)), "has total_size 7, the files hold"),
    "the dtype of config.json in the index": Case(index(lambda v: v["metadata"].update(dtype="bfloat16"))),
    "another dtype": Case(index(lambda v: v["metadata"].update(dtype="float16")), f"and {INDEX} float16"),
    "no metadata": Case(index(lambda v: v.pop("metadata")), "is no index of tensors"),
    "a tensor that the index does not name": Case(
        index(lambda v: v["weight_map"].pop(NORM)), f"holds {NORM}, but {INDEX} says it is in no file"
    ),
    "a tensor that no file has": Case(
        index(lambda v: v["weight_map"].update({"lm_head.weight": last_file(v)})), "lacks lm_head.weight"
    ),
    "a tensor in another file": Case(
        index(lambda v: v["weight_map"].update({NORM: v["weight_map"][EMBEDDING]})), f"lacks {NORM}"
    ),
    "a tensor in two files": Case(repeat_in_the_last_file, f"holds {EMBEDDING}, but {INDEX} says it is in model-00001"),
    "a file of an older set": Case(
        copy("model-00001*", "model-00001-of-00099.safetensors"), "holds model-00001-of-00099.safetensors"
    ),
    "the whole beside the shards": Case(
        lambda f: shutil.copyfile(f.parent / "whole.safetensors", f / "model.safetensors"), "holds model.safetensors"
    ),
    "a file outside of the folder": Case(
        index(lambda v: v["weight_map"].update({EMBEDDING: "../whole.safetensors"})), "is no safetensors file of this"
    ),
    "a tensor twice in the index": Case(
        text(INDEX, lambda t: t.replace('"weight_map": {', f'"weight_map": {{"{EMBEDDING}": "x.safetensors",')),
        "stands there twice",
    ),
}

TOKENIZERS = {
    "a larger tokenizer": Case(
        text("tokenizer.json", lambda t: re.sub('("id"|<.eom_id.>"): 7', r"\1: 320", t)),
        "gives '<|eom_id|>' the id 320, config.json has vocab_size 320",
    ),
    "a token with two ids": Case(
        text("tokenizer.json", lambda t: t.replace('"id": 7', '"id": 319')), "added_tokens give '<|eom_id|>' the id 319"
    ),
    "a smaller tokenizer": Case(lambda folder: None),
    "bos of config.json": Case(config(bos_token_id=5), "bos_token_id is 5 in config.json and 0 in"),
    "pad of generation_config.json": Case(
        edit("generation_config.json", pad_token_id=1), "pad_token_id is 5 in config.json and 1 in"
    ),
    "ends that generation lacks": Case(edit("generation_config.json", eos_token_id=[1]), "eos_token_id is"),
    "more ends of generation": Case(edit("generation_config.json", eos_token_id=[1, 4, 6, 7])),
    "an id beyond the vocabulary": Case(config(eos_token_id=128_009), "eos_token_id is 128009; it must be 0 to"),
    "an end beyond the vocabulary": Case(
        edit("generation_config.json", eos_token_id=[1, 4, 7, 320]), "eos_token_id is [1, 4, 7, 320]; it must be"
    ),
    "another end of the tokenizer": Case(
        both(edit("tokenizer_config.json", eos_token="<|python_tag|>"), edit("special_tokens_map.json", eos_token=...)),
        "eos_token_id is [1, 4, 7] in config.json and 6 in tokenizer.json",
    ),
    "special_tokens_map": Case(
        edit("special_tokens_map.json", eos_token="<|eot_id|>"), "in special_tokens_map.json; correct one"
    ),
    "a special token that is none": Case(
        both(
            edit("special_tokens_map.json", unk_token="<unk>"), edit("tokenizer_config.json", unk_token="<unk>")
        ),
        "unk_token is '<unk>', which tokenizer.json does not have",
    ),
    "ids of tokenizer_config.json": Case(
        text("tokenizer_config.json", lambda t: t.replace('"7": {', '"9": {')), "gives '<|eom_id|>' the id 9"
    ),
    "added_tokens.json": Case(edit("added_tokens.json", **{"<|eom_id|>": 300}), "added_tokens.json gives '<|eom_id|>'"),
    "two chat templates": Case(
        edit("tokenizer_config.json", chat_template="{{ messages }}"), "hold different chat templates"
    ),
    "the same chat template twice": Case(
        lambda f: edit("tokenizer_config.json", chat_template=(f / "chat_template.jinja").read_text())(f)
    ),
}  # fmt: skip

SCALE = "model.layers.0.self_attn.q_proj.weight_scale"


INT4 = {
    "unchanged": Case(config()),
    "no quantization": Case(config(quantization=None), "is missing"),
    "another group size": Case(quantization(group_size=16), "has shape"),
    "another axis": Case(quantization(expert_group_axis="out (last dim of [E, in, out])"), "has shape"),
    "another number of bits": Case(quantization(qmax=127), "quantization.qmax is 127"),
    "a newer key": Case(quantization(zero_point=True), "quantization.zero_point is True"),
    "scales in float32": Case(tensors(lambda t: t | {SCALE: t[SCALE].float()}), f"{SCALE} has dtype torch.float32"),
    "scales with NaN": Case(tensors(lambda t: t | {SCALE: t[SCALE] * torch.nan}), f"{SCALE} holds NaN"),
    "unpacked values beside": Case(
        tensors(lambda t: t | {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32).bfloat16()}),
        "is not a tensor of this model",
    ),
    "links of the hub's cache": Case(link),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_config_json_states_twice(name, whole, tmp_path):
    check_case(CONFIGS[name], whole, tmp_path)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_those_that_config_json_states(name, whole, tmp_path):
    check_case(TENSORS[name], whole, tmp_path)


@pytest.mark.parametrize("name", SHARDS)
def test_the_index_and_the_files_agree(name, sharded, tmp_path):
    check_case(SHARDS[name], sharded, tmp_path)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_and_the_model_agree(name, whole, tmp_path):
    check_case(TOKENIZERS[name], whole, tmp_path)


@pytest.mark.parametrize("name", INT4)
def test_int4_is_packed_as_config_json_states(name, int4, tmp_path):
    check_case(INT4[name], int4, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_safetensors": False}, "use_safetensors is False"),
        ({"variant": "fp16"}, "variant is 'fp16'"),
        ({"gguf_file": "model.gguf"}, "gguf_file is 'model.gguf'"),
    ],
)
def test_options_for_other_files_are_refused(options, words, whole):
    """transformers would read those files, after the safetensors had been checked."""
    with pytest.raises(ValueError, match=words):
        MobileMoEForCausalLM.from_pretrained(whole, **options)


def test_int4_is_not_left_on_disk_by_a_device_map_of_accelerate(int4, tmp_path):
    """`auto` with little memory puts layers on disk, as a map that names it does."""
    options = {"device_map": "auto", "max_memory": {"cpu": 20_000}, "offload_folder": str(tmp_path)}
    with pytest.raises(ValueError, match="is INT4 and cannot lie on disk"):
        MobileMoEForCausalLM.from_pretrained(int4, **options)
    loaded = MobileMoEForCausalLM.from_pretrained(int4, device_map="auto", max_memory={"cpu": 1 << 30})
    whole = MobileMoEForCausalLM.from_pretrained(int4)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))


def test_a_dcp_checkpoint_with_more_layers_is_refused(whole, tmp_path):
    dims = replace(TINY, n_layers=2)
    import_folder(
        write_hf_folder(random_tensors(dims), dims, whole.with_name("tokenizer"), tmp_path / "two"), tmp_path / "deep"
    )
    with pytest.raises(ValueError, match="it has layer 1, the model's dimensions have 1 layers"):
        CheckpointTensors(tmp_path / "deep", TINY)
