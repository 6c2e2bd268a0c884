"""Load folders in the transformers of this process, compute, and write what came out; run by test_transformers5.py.

    python compute_in_transformers5.py INPUTS.pt RESULTS.pt FOLDER...

Imports nothing of this project: the folders bring what they need.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def run_folder(folder: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return logits, greedy ids with and without cache, and what the folder is after it was saved again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(inputs["texts"], padding=True, return_tensors="pt")
    greedy = [
        model.generate(**batch, max_new_tokens=24, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    ]
    half = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True)
    model.save_pretrained(Path(folder).with_name(f"{Path(folder).name}_saved"))
    return {
        "class": type(model).__name__,
        "logits": model(inputs["ids"], attention_mask=inputs["mask"]).logits,
        "hidden_states": len(model(inputs["ids"], output_hidden_states=True).hidden_states),
        "packed": _run_packed(folder, inputs) if inputs["int4"] in folder else None,
        "greedy": greedy,
        "dtypes": sorted({str(parameter.dtype) for parameter in half.parameters()}),
        "chat": tokenizer.apply_chat_template(inputs["messages"], add_generation_prompt=True, return_dict=False),
    }


def _run_packed(folder: str, inputs: dict[str, Any]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True, keep_int4=True)
    return model(inputs["ids"], attention_mask=inputs["mask"]).logits


if __name__ == "__main__":
    inputs = torch.load(sys.argv[1])
    results: dict[str, Any] = {"version": transformers.__version__}
    for folder in sys.argv[3:]:
        try:
            results[Path(folder).name] = run_folder(folder, inputs)
        except ValueError as error:
            results[Path(folder).name] = str(error)
    torch.save(results, sys.argv[2])
