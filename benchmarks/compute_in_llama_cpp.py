"""One measurement of beside_llama_cpp.py: a GGUF file in llama.cpp, through its C interface.

    PYTHONPATH=.runtimes/llama_cpp python benchmarks/compute_in_llama_cpp.py SPEC

SPEC is the JSON of `eval.device.profile_worker`, and so is what it prints: prefill_seconds and decode_seconds. Imports
nothing of this project. Options are llama.cpp's defaults: parts of at most 512 tokens, a float16 cache.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


class Model:
    """A model with an empty cache."""

    def __init__(self, path: str, context: int, threads: int):
        llama_cpp.llama_backend_init()
        # Kept: ggml holds the pointer.
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        assert self._model, f"llama.cpp does not load {path}"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = context, threads, threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = options.n_ubatch

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def eval(self, tokens: list[int]) -> int:
        """Append tokens and return the likeliest next one."""
        for start in range(0, len(tokens), self._batch):
            part = tokens[start : start + self._batch]
            array = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(part)))
            assert code == 0, f"llama_decode returned {code}"
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def main(spec: dict) -> dict[str, list[float]]:
    """Run prompt and answer `repetitions` times, and return times in seconds."""
    prompt, answer = spec["tokens"][: -spec["n_answer"]], spec["tokens"][-spec["n_answer"] :]
    model = Model(spec["artifact"], len(spec["tokens"]), spec["threads"])
    prefill, decode = [], []
    for _ in range(spec["repetitions"]):
        model.clear()
        start = time.perf_counter()
        model.eval(prompt)
        prefill.append(time.perf_counter() - start)
        start = time.perf_counter()
        for token in answer:
            model.eval([token])
        decode.append(time.perf_counter() - start)
    return {"prefill_seconds": prefill, "decode_seconds": decode}


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
