"""The dependencies keep what eval/compat.py relies on; every docstring names what breaks when its test fails."""

import copy
import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from eval import compat


def test_onednn_says_whether_the_cpu_multiplies_bfloat16():
    code = "from eval import compat; print(compat.is_bfloat16_supported_by_cpu())"
    # An instruction set without them; the number that a processor with them gives is not known here.
    old = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert old.stdout == "False\n"
    assert isinstance(compat.is_bfloat16_supported_by_cpu(), bool)


def test_lm_eval_task_files_lie_below_its_package():
    """find_lm_eval_tasks: no benchmark finds its stock task."""
    folder = compat.find_lm_eval_tasks()
    assert (folder / "piqa/piqa.yaml").is_file() and (folder / "bbh/fewshot").is_dir()


def test_lm_eval_merges_included_files_and_resolves_functions():
    """load_task_yaml: stock tasks lose the keys of the files they include, or hold their functions as text."""
    folder = compat.find_lm_eval_tasks()
    subject = compat.load_task_yaml(folder / "mmlu/default/mmlu_anatomy.yaml")
    assert subject["dataset_name"] == "anatomy" and subject["output_type"] == "multiple_choice"
    assert "include" not in subject
    assert callable(compat.load_task_yaml(folder / "drop/default.yaml")["process_results"])


@pytest.fixture(scope="module")
def lm():
    from lm_eval.api.model import TemplateLM

    class Bytes(TemplateLM):
        """Tokens are bytes; every continuation is worth minus its length, every generation is "4"."""

        @property
        def eot_token_id(self):
            return 0

        def tok_encode(self, string, **_):
            return list(string.encode())

        def loglikelihood(self, requests, **_):
            return [(-float(len(request.args[1])), False) for request in requests]

        _loglikelihood_tokens = loglikelihood_rolling = None

        def generate_until(self, requests, **_):
            return ["4" for _ in requests]

    Bytes.__abstractmethods__ = frozenset()
    return Bytes()


def build_task(name, rows, **config):
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(
        config={"task": name, "custom_dataset": lambda **_: {"test": rows}, "test_split": "test", **config}
    )


def test_lm_eval_scores_tasks_that_are_already_built(lm):
    """evaluate_tasks: no benchmark is scored, or a result's value, truncation count and prompt hash are wrong."""
    import datasets

    choices = datasets.Dataset.from_list([{"q": f"Q{i}:", "options": ["a", "bbb"], "gold": i % 2} for i in range(5)])
    sums = datasets.Dataset.from_list([{"q": "2+2=", "answer": "4"}] * 3)
    tasks = [
        build_task("choices", choices, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{options}}",
                   doc_to_target="gold", metric_list=[{"metric": "acc"}]),
        build_task("sums", sums, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{answer}}",
                   generation_kwargs={"until": ["\n"], "max_gen_toks": 8}, metric_list=[{"metric": "exact_match"}]),
    ]  # fmt: skip
    evaluated = compat.evaluate_tasks(lm, tasks, {"choices": range(4), "sums": [0, 1]})
    assert evaluated["results"]["choices"]["acc,none"] == 0.5, "the shorter continuation is always chosen"
    assert evaluated["results"]["sums"]["exact_match,none"] == 1.0
    samples = evaluated["samples"]
    assert [len(samples["choices"]), len(samples["sums"])] == [4, 2]
    assert samples["choices"][1] | {"filter": "none", "target": 1, "acc": 0.0} == samples["choices"][1]
    assert samples["choices"][1]["arguments"] == [("Q1:", " a"), ("Q1:", " bbb")]
    assert samples["choices"][1]["doc"]["q"] == "Q1:" and len(samples["choices"][1]["resps"]) == 2
    ((prompt, options),) = samples["sums"][0]["arguments"]
    assert (prompt, options["max_gen_toks"]) == ("2+2=", 8)


def test_lm_eval_moves_a_contexts_trailing_space_to_the_continuation(lm):
    """encode_pair: truncated prompts are counted by other tokens than those that are scored."""
    assert compat.encode_pair(lm, "ab ", "c") == (list(b"ab"), list(b" c"))


def test_lm_eval_makes_samples_serializable():
    """make_serializable: the per-item log cannot be written, or metrics in it become text."""
    values = {"numpy": np.float32(0.5), "flag": np.bool_(True), "choices": {1}}
    text = json.dumps(values, default=compat.make_serializable)
    assert json.loads(text) == {"numpy": 0.5, "flag": True, "choices": [1]}


SIZES = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 96, "vocab_size": 32,
    "max_seq_len": 16, "max_context_len": 16, "use_kv_cache": True, "enable_dynamic_shape": True,
}  # fmt: skip


def test_executorchs_example_llama_has_the_parts_that_are_filled():
    """Breaks: eval/device/transformer.py, which puts weights into these attributes and shares the causal mask."""
    model = compat.build_llama(**SIZES)
    assert {"tok_embeddings", "output", "norm", "rope", "layers"} <= {name for name, _ in model.named_children()}
    layer = model.layers[1]
    assert all(isinstance(getattr(layer.attention, f"w{p}"), nn.Linear) for p in "qkvo")
    assert layer.attention.mask is model.layers[0].attention.mask and layer.attention.mask.shape == (16, 16)
    assert hasattr(layer, "attention_norm") and hasattr(layer, "ffn_norm")
    assert hasattr(model.rope, "freqs_cos") and hasattr(model.rope, "freqs_sin")


def test_executorchs_example_llama_takes_the_custom_attention():
    """Breaks: programs would hold the slow attention of the example, or none that traces."""
    compat.register_executorch_ops()
    model = compat.use_custom_attention(compat.build_llama(**SIZES))
    names = {type(module).__name__ for module in model.modules()}
    assert {"CustomKVCache", "SDPACustom"} <= names


@pytest.mark.parametrize("n_groups", [1, 2])
def test_the_4_bit_embedding_reads_the_high_nibble_first(n_groups):
    """Breaks: the embedding of every ExecuTorch program."""
    compat.register_executorch_ops()
    q = torch.randint(-8, 8, (5, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales = torch.full((5, n_groups), 0.25)
    even, odd = (q + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    scales = scales.squeeze(1) if n_groups == 1 else scales
    embedding = compat.int4_embedding((even << 4) | odd, scales, 64, 64 // n_groups)
    assert torch.equal(embedding(torch.arange(5)), q.float() * 0.25)


def test_int4_linears_dequantize_to_value_times_scale():
    """Breaks: the dense layers of every ExecuTorch program (torchao's IntxUnpackedToInt8Tensor)."""
    q = torch.randint(-8, 8, (8, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    weight = compat.int4_linear_weight(q, torch.full((8, 2), 0.5, dtype=torch.float16))
    assert torch.equal(weight.dequantize(), q.float() * 0.5)
    assert weight.qdata.dtype == torch.int8 and weight.scale.shape == (8, 2)
    assert weight.activation_quantization == "int8_asym_per_token"


def test_xnnpacks_partitioner_has_the_seams():
    """Breaks: TransformerPartitioner; test_executorch.py compares its program with XNNPACK's own partitioner's."""
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    spec = compat.xnnpack_partitioner().delegation_spec
    assert spec.backend_id == XnnpackPartitioner().delegation_spec.backend_id
    assert spec.compile_specs[0].key in inspect.getsource(xnnpack_preprocess), "the key that leaves passes out"
    assert callable(XnnpackPartitioner.ops_to_not_decompose)


def test_passes_of_executorch_are_where_they_are_taken_from():
    """Breaks: eval/device/executorch_export.py, lower."""
    config = compat.executorch_backend_config()
    assert [type(p).__name__ for p in config.passes] == ["QuantFusionPass"]
    assert config.do_quant_fusion_and_const_prop
    graph = torch.fx.symbolic_trace(nn.Identity())
    compat.remove_redundant_transposes(graph)


def test_the_thread_pool_can_be_resized():
    """Breaks: --threads of `mobilemoe profile`."""
    from executorch.extension.pybindings import portable_lib

    compat.set_executorch_threads(2)
    assert portable_lib._threadpool_get_thread_count() == 2


def test_layers_of_a_dynamic_cache_grow_by_new_tensors():
    """`cached_rows.Rows.select` copies layers shallowly, and several batches go on from one prefix."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    other = copy.copy(cache.layers[0])
    other.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert (cache.layers[0].keys.shape[2], other.keys.shape[2]) == (3, 4)
    other.batch_select_indices(torch.tensor([0, 0]))
    assert (len(cache.layers[0].keys), len(other.keys)) == (1, 2)
