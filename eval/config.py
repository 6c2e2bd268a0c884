"""The options of a recipe for evaluation, export and the device program."""

from dataclasses import dataclass
from typing import Literal

N_ANSWER = 32
"""Number of tokens that a profile decodes after the prompt; prompt and answer together fill the context."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Options of the benchmarks through lm-eval and of the held-out loss."""

    suite: str = "foundational"
    """Name in `eval.benchmarks.suites.SUITES`; `foundational` holds the 14 benchmarks of the paper's main table."""
    benchmarks: tuple[str, ...] = ()
    """Keys of the suite's benchmarks to score; empty takes all of them."""
    limit: int | None = None
    """Number of items a benchmark; None takes all of them."""
    quick_benchmarks: tuple[str, ...] = ("hellaswag", "piqa", "arc_easy")
    """Benchmarks of the suite `foundational` that are scored while a stage trains (`stages.*.benchmark_interval`)."""
    quick_limit: int = 200
    """Number of items a benchmark that is scored while a stage trains."""
    items_folder: str = ""
    """Folder with the items that no registry has, `<benchmark>/<split>.jsonl`; without it their benchmarks are left
    out."""
    run_generated_code: bool = False
    """Whether code that a model writes may be run, in a sandbox, for the benchmarks that test it."""
    allow_missing_items: bool = False
    """Whether to leave out the benchmarks whose items no registry has, instead of refusing; the report names them."""
    batch_tokens: int = 8192
    """Number of tokens a forward pass, padding included; a longer sequence passes alone."""
    activations: Literal["float", "int8"] = "float"
    """Activations of the benchmarks' models: in the dtype of the weights, or rounded to INT8 as on the device."""
    heldout_tokens: int = 200_000
    """Largest number of held-out tokens that are scored, a domain."""


@dataclass(frozen=True)
class ExportConfig:
    """Options of how artifacts are written. `Recipe.quantization` states their INT4 groups."""

    formats: tuple[str, ...] = ("hf-native", "compressed-tensors", "gguf", "mlx", "executorch")
    """Formats that a run ends with, beside bf16 and int4: names of `eval.export.formats.PACKAGED`."""

    profile_contexts: tuple[int, ...] = (512, 2048)
    """Numbers of tokens of prompt and answer at which a run's ExecuTorch program is measured on the machine that made
    it, as far as its context reaches; empty measures it nowhere."""

    max_shard_bytes: int = 4 << 30
    """Size limit of one safetensors file, bytes."""


@dataclass(frozen=True)
class GgufConfig:
    """Options of the GGUF file of a checkpoint."""

    type: Literal["q4_0", "bf16", "f16", "f32"] = "q4_0"
    """Type of the matrices. `q4_0` holds the INT4 groups of the checkpoint bit for bit."""


@dataclass(frozen=True)
class DeviceConfig:
    """Options of the ExecuTorch program of a checkpoint."""

    context: int = 2048
    """Number of positions of the KV cache, for prompt and answer together; the program allocates it when it starts."""
    expert_op: Literal["stock", "fast"] = "stock"
    """`stock`: llama::quantized_moe_ffn, which ExecuTorch's runners have; `fast`: our own, eval/device/expert_op."""
    kv_cache: Literal["float32", "int8"] = "float32"
    """Type of the numbers in the KV cache. `int8` has a scale and a zero point for each head and position, and takes a
    quarter of the memory; attention computes on the integers."""
    expert_group_size: int | None = None
    """Number of values along the input dimension that share a scale in the experts; None takes the checkpoint's."""
