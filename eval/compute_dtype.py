"""Choose the dtype that a model computes in on this machine.

PyTorch multiplies bfloat16 matrices on any CPU, but on one without instructions for it by an emulation that takes about
seven times as long as float32 does. Weights of 16 bits are exact in float32, so such a CPU computes in float32.
"""

import json
from pathlib import Path

import torch

from eval import compat

FULL, HALF = "float32", ("bfloat16", "float16")


def choose_dtype(model_dir: Path) -> str:
    """Return the name of the dtype to load a Hugging Face folder in: its own, or float32 in place of one of 16 bits.

    A GPU and a CPU that multiplies bfloat16 take the folder's own. A folder that states none gets "auto".
    """
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    own = config.get("dtype") or config.get("torch_dtype") or "auto"
    return FULL if own in HALF and not has_bfloat16_products() else own


def choose_float_dtype(model_dir: Path) -> torch.dtype:
    """Return `choose_dtype` as torch's; a folder that states none computes in float32."""
    name = choose_dtype(model_dir)
    return torch.float32 if name == "auto" else getattr(torch, name)


def has_bfloat16_products() -> bool:
    """Return whether this machine multiplies bfloat16 matrices at the speed of float32, or faster."""
    return torch.cuda.is_available() or compat.is_bfloat16_supported_by_cpu()
