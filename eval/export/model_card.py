"""The model card and the licence note that travel with every artifact. Imports neither torch nor transformers."""

from dataclasses import dataclass
from pathlib import Path

from titan_ext.config import ModelDims
from titan_ext.model_stats import count_parameters

_CARD = """---
license: other
license_name: see-license-note
license_link: LICENSE-NOTE.txt
library_name: {usage.library}
tags: [mobilemoe, mixture-of-experts, on-device, int4]
---
# MobileMoE {total} ({active} active a token), {form}

| | |
|---|---|
| layers, width | {dims.n_layers}, {dims.d_model} |
| heads / key-value heads, size | {dims.n_heads} / {dims.n_kv_heads}, {dims.head_dim} |
| routed experts, of which a token takes | {dims.n_experts}, {dims.top_k} |
| width of a routed expert, of the shared one | {dims.expert_hidden}, {dims.shared_hidden} |
| vocabulary, context | {dims.vocab_size}, {dims.max_seq_len} |

After a copy or a download, `sha256sum --quiet --check SHA256SUMS` compares every file with its checksum.

{usage.text}

Architecture: arXiv 2605.27358. Trained and exported with the MobileMoE pipeline; the run's `manifest.json` names every
data source with its version, the recipe and the evaluation.

Licences: the code in this folder is under Apache-2.0. The weights and the tokenizer have terms of their own, which
`LICENSE-NOTE.txt` names.
"""

_LICENSE_NOTE = """The parts of this artifact are under different terms, and it grants no rights beyond those terms.

Weights: they were trained on the sources that the run's manifest.json names, each with its licence. Whoever publishes
the weights must decide before publishing which of these licences apply to them.
Tokenizer: it is copied unchanged. If it is Llama 3's, the Llama 3 Community License applies to it ("Built with Meta
Llama 3").
Code in this folder (*.py): Apache License 2.0, as the MobileMoE pipeline that it is copied from.
"""


LICENSE_NOTE_FILE = "LICENSE-NOTE.txt"


@dataclass(frozen=True)
class Usage:
    """How a folder is used: what its card says, with commands that run inside of the folder."""

    library: str
    """Name of the library on model hubs."""
    text: str


def _transformers_usage(options: str, versions: str) -> Usage:
    return Usage(
        "transformers",
        f"""With {versions}, in this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{options})
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto"{options})
messages = [{{"role": "user", "content": "What is a mixture of experts?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```""",
    )


OWN_CODE = _transformers_usage(", trust_remote_code=True", "transformers 4.57 or 5 and the code of this folder")
STOCK_CODE = _transformers_usage("", "transformers 4.57 or 5")
COMPRESSED_TENSORS = Usage(
    "transformers",
    """With vLLM, on a GPU (not run by us):

```sh
vllm serve . --served-model-name mobilemoe
```

With transformers and the package `compressed-tensors`, which dequantizes the weights:

"""
    + STOCK_CODE.text.partition(":\n\n")[2],
)
MLX = Usage(
    "mlx",
    """With mlx-lm:

```sh
mlx_lm.chat --model .
mlx_lm.server --model . --port 8080
```

```python
from mlx_lm import generate, load

model, tokenizer = load(".")
messages = [{"role": "user", "content": "What is a mixture of experts?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens=64))
```

The architecture is named `exaone_moe`, whose layers compute what MobileMoE's do.""",
)
_EXECUTORCH_TEXT = """ExecuTorch's runners of Llama models take `model.pte` and `tokenizer.json`. `program.json` states
the context, the ends of generation and the operator of the experts."""
EXECUTORCH = Usage(
    "executorch",
    _EXECUTORCH_TEXT
    + """ With the Python packages executorch and transformers:

```python
import torch
from executorch.extension.llm.custom_ops import custom_ops
from executorch.kernels import quantized
from executorch.runtime import Runtime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
program = Runtime.get().load_program("model.pte")
forward = program.load_method("forward")
stops = program.load_method("get_eos_ids").execute([])
messages = [{"role": "user", "content": "What is a mixture of experts?"}]
ids, position, answer = tokenizer.apply_chat_template(messages, add_generation_prompt=True), 0, []
while len(answer) < 64 and (not answer or answer[-1] not in stops):
    logits = forward.execute((torch.tensor([ids]), torch.tensor([position])))[0]
    position, ids = position + len(ids), [int(logits[0].argmax())]
    answer += ids
print(tokenizer.decode(answer, skip_special_tokens=True))
```""",
)
EXECUTORCH_FAST_OP = Usage(
    "executorch",
    f"{_EXECUTORCH_TEXT} The operator is our own, which the runner must be built with (docs/on_device.md).",
)


def llama_cpp_usage(file: str) -> Usage:
    """Return how a GGUF file is used."""
    return Usage(
        "llama.cpp",
        f"""With llama.cpp:

```sh
llama-cli -m {file} --temp 0.7
llama-server -m {file} --port 8080
```

With llama-cpp-python:

```python
from llama_cpp import Llama

model = Llama("{file}", n_ctx=0, verbose=False)
messages = [{{"role": "user", "content": "What is a mixture of experts?"}}]
print(model.create_chat_completion(messages, max_tokens=64)["choices"][0]["message"]["content"])
```

The architecture is named `exaone-moe`, whose layers compute what MobileMoE's do.""",
    )


def write_model_card(folder: Path, dims: ModelDims, form: str, usage: Usage) -> None:
    """Write README.md and LICENSE-NOTE.txt into an artifact's folder; `form` says what kind of artifact it is."""
    count = count_parameters(dims)
    card = _CARD.format(
        dims=dims, form=form, usage=usage, total=_format_count(count.total), active=_format_count(count.active)
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / LICENSE_NOTE_FILE).write_text(_LICENSE_NOTE, encoding="utf-8")


def _format_count(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M"
