"""Published models beside ours: where their weights are, their sizes, and the averages that were published of them.

Source of the averages: arXiv 2605.27358 and the model cards of its releases. A figure that could not be found there is
None. Sizes of other models are those of their cards, in parameters; all of a dense model's are active.
"""

from dataclasses import dataclass

from eval.export.sizes import int4_bytes
from titan_ext.config import FLAVORS
from titan_ext.model_stats import count_parameters

INT4_BITS = 4.5
"""Bits a parameter of INT4 with a float16 scale a group of 32."""


@dataclass(frozen=True)
class Baseline:
    """One published model."""

    title: str
    hub_id: str | None
    """Repository on the Hugging Face hub; None where none is known."""
    active: int
    """Number of parameters that a token passes through."""
    total: int
    base: float | None = None
    """Average of the base model over the 14 benchmarks, in points (percent)."""
    sft: float | None = None
    qat: float | None = None
    note: str = ""

    exact_int4_bytes: int | None = None
    """Bytes of its INT4 checkpoint, where its dimensions give them."""

    @property
    def int4_bytes(self) -> int:
        """Bytes of the model in INT4 with groups of 32: `exact_int4_bytes`, or those of all parameters; derived."""
        return self.exact_int4_bytes or round(self.total * INT4_BITS / 8)


def _describe_flavor(name: str, base: float, sft: float, qat: float, note: str) -> Baseline:
    count = count_parameters(FLAVORS[name])
    return Baseline(
        f"MobileMoE-{name}", f"facebook/MobileMoE-{name}-Base", count.active, count.total, base, sft, qat, note,
        int4_bytes(FLAVORS[name]),
    )  # fmt: skip


BASELINES = {
    "mobilemoe-s": _describe_flavor("S", 46.5, 46.7, 44.0, "its QAT card says 43.9"),
    "mobilemoe-m": _describe_flavor("M", 55.4, 55.3, 52.5, "its QAT card says 52.7"),
    "mobilemoe-l": _describe_flavor("L", 59.8, 60.1, 57.8, "its QAT card says 58.1"),
    "olmoe-1b-7b": Baseline("OLMoE-1B-7B", "allenai/OLMoE-1B-7B-0924", 1_300_000_000, 6_900_000_000, 52.4),
    "mobilellm-pro": Baseline(
        "MobileLLM-Pro", "facebook/MobileLLM-Pro-base", 1_080_000_000, 1_080_000_000, 47.0,
        note="one public summary prints 43.7",
    ),
    "qwen3.5-2b": Baseline("Qwen3.5 2B", None, 2_000_000_000, 2_000_000_000, 53.3),
    "smollm2-1.7b": Baseline("SmolLM2 1.7B", "HuggingFaceTB/SmolLM2-1.7B", 1_710_000_000, 1_710_000_000, 50.7),
    "smollm2-135m": Baseline("SmolLM2 135M", "HuggingFaceTB/SmolLM2-135M", 135_000_000, 135_000_000),
    "gemma-3-270m": Baseline("Gemma 3 270M", "google/gemma-3-270m", 268_000_000, 268_000_000, 33.5),
    "gemma-3-1b": Baseline("Gemma 3 1B", "google/gemma-3-1b-pt", 1_000_000_000, 1_000_000_000),
    "llama-3.2-1b": Baseline("Llama 3.2 1B", "meta-llama/Llama-3.2-1B", 1_240_000_000, 1_240_000_000),
    "qwen3-0.6b": Baseline("Qwen3 0.6B", "Qwen/Qwen3-0.6B-Base", 600_000_000, 600_000_000),
    "qwen3-1.7b": Baseline("Qwen3 1.7B", "Qwen/Qwen3-1.7B-Base", 1_700_000_000, 1_700_000_000),
}  # fmt: skip
"""Models by the name that `mobilemoe eval baseline:NAME` takes."""
PUBLISHED_QAT_COST = {"MobileMoE-S": -2.7, "MobileMoE-M": -2.8, "MobileMoE-L": -2.3}
"""Change of the average over the 14 from BF16 SFT to INT4 QAT, in points."""
