"""Unpack a folder by compressed-tensors, load it in transformers, compute; run by test_compressed_tensors.py.

    python compute_in_compressed_tensors.py FOLDER IDS.pt RESULTS.pt

Imports nothing of this project.
"""

import sys

import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    stored = load_file(f"{sys.argv[1]}/model.safetensors")
    weights = {}
    for name in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
        packed, scale, shape = (stored[f"{name}.weight_{part}"] for part in ("packed", "scale", "shape"))
        values = unpack_from_int32(packed, 4, torch.Size(shape.tolist()))
        weights[name] = (values.unflatten(-1, (-1, 32)).float() * scale.float().unsqueeze(-1)).flatten(-2)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:  # transformers 5 unpacks the experts to it, whatever `dtype` says
            parameter.data = parameter.data.float()
    with torch.no_grad():
        logits = model(torch.load(sys.argv[2])).logits
    results = {"weights": weights, "logits": logits.float(), "class": type(model).__name__}
    torch.save(results | {"version": transformers.__version__}, sys.argv[3])
