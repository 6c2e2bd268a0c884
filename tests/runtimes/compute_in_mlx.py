"""Load a folder in mlx-lm, compute, and write what came out; run by test_mlx.py.

    python compute_in_mlx.py FOLDER INPUTS.json RESULTS.npz

Imports nothing of this project.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.utils import load_model

if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        inputs = json.load(file)
    model, tokenizer = load(sys.argv[1])
    results = {"prompt": np.array(tokenizer.apply_chat_template(inputs["messages"], add_generation_prompt=True))}
    results["ends"] = np.array(sorted(tokenizer.eos_token_ids))
    ids = mx.array([inputs["ids"]])
    results["logits_bf16"] = np.array(model(ids)[0].astype(mx.float32))
    stored = mx.load(f"{sys.argv[1]}/model.safetensors")
    for name in [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]:
        scales, biases = (stored[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        results[name] = np.array(mx.dequantize(stored[f"{name}.weight"], scales, biases, group_size=32, bits=4))
    exact, _ = load_model(Path(sys.argv[1]))
    exact.set_dtype(mx.float32)
    results["logits_f32"] = np.array(exact(ids)[0])
    np.savez(sys.argv[3], **results)
