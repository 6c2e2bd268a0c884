"""Load a GGUF file in llama.cpp, compute, and write what came out; run by test_gguf.py and benchmarks.

    python compute_in_llama_cpp.py MODEL.gguf INPUTS.json RESULTS.npz

Imports nothing of this project.
"""

import json
import sys
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

GGML_TYPE_F32 = 0


def run(path: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return tokens of texts, logits of ids, greedy continuations, the chat prompt and its answer's first tokens."""
    model = llama_cpp.Llama(
        path, n_ctx=inputs["context"], n_batch=inputs["context"], n_ubatch=inputs["context"], logits_all=True,
        type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, flash_attn=False, n_threads=2, n_threads_batch=2, verbose=False,
    )  # fmt: skip
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    template = model.metadata["tokenizer.chat_template"]
    eos, bos = (llama_cpp.llama_vocab_get_text(vocab, i).decode() for i in (model.token_eos(), model.token_bos()))
    prompt = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)(messages=inputs["messages"]).prompt
    answer = model.create_chat_completion(inputs["messages"], max_tokens=8, temperature=0.0)
    results: dict[str, Any] = {
        "tokens": [model.tokenize(text.encode(), add_bos=True, special=True) for text in inputs["texts"]],
        "metadata": dict(model.metadata),
        "prompt": prompt,
        "prompt_tokens": model.tokenize(prompt.encode(), add_bos=False, special=True),
        "answer": answer["choices"][0]["message"]["content"],
        "answer_tokens": answer["usage"]["completion_tokens"],
        "eos": [model.token_eos(), *map(int, _list_ends(model))],
    }
    for i, ids in enumerate(inputs["ids"]):
        model.reset()
        model.eval(ids)
        results[f"logits_{i}"] = np.array(model.scores[: len(ids)], np.float32)
        results[f"greedy_{i}"] = _continue_greedily(model, ids, inputs["new_tokens"])
    return results


def _continue_greedily(model: llama_cpp.Llama, ids: list[int], new_tokens: int) -> list[int]:
    model.reset()
    model.eval(ids)
    found = []
    for _ in range(new_tokens):
        found.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(found[-1:])
    return found


def _list_ends(model: llama_cpp.Llama) -> list[int]:
    """Return the tokens at which llama.cpp ends a generation."""
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    return [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        found = run(sys.argv[1], json.load(file))
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in found.items() if name not in arrays}
    np.savez(sys.argv[3], rest=json.dumps(rest), **arrays)
