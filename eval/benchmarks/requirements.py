"""What some benchmarks need beside their items, checked before anything is scored."""

from collections.abc import Sequence
from pathlib import Path

from core.errors import RefusedInput
from eval.benchmarks.suites import Benchmark
from eval.config import EvaluationConfig


def check_requirements(
    benchmarks: Sequence[Benchmark], model_dir: Path, config: EvaluationConfig, *, base: bool
) -> None:
    """Check that the benchmarks can be scored here.

    Args:
        base: whether the model is a base model, whose prompts no chat template renders.

    Raises:
        RefusedInput: code that the model writes would be run and is not allowed, or there is no sandbox; prompts are to
            be rendered by a chat template and the model has none; nltk lacks a resource.
    """
    code = [benchmark.key for benchmark in benchmarks if benchmark.runs_code]
    if code and not config.run_generated_code:
        others = [benchmark.key for benchmark in benchmarks if not benchmark.runs_code]
        raise RefusedInput(
            f"evaluation.run_generated_code: {', '.join(code)} run code that the model writes; give "
            f"--run-generated-code to run it in a sandbox, or --benchmarks {' '.join(others)} to leave them out"
        )
    if code:
        from eval.benchmarks.sandbox import run_untrusted

        run_untrusted("pass")
    if any(benchmark.chat for benchmark in benchmarks) and not base and not has_chat_template(model_dir):
        raise RefusedInput(
            f"{model_dir}: its tokenizer has no chat template, by which the suite renders prompts; give an "
            "instruction-tuned model, or put the template into chat_template.jinja"
        )
    for benchmark in benchmarks:
        if benchmark.nltk_data:
            _require_nltk_data(benchmark)


def has_chat_template(model_dir: Path) -> bool:
    """Return whether the tokenizer of a model folder has a chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True).chat_template is not None


def _require_nltk_data(benchmark: Benchmark) -> None:
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find(benchmark.nltk_data)
    except LookupError as error:
        name = benchmark.nltk_data.rpartition("/")[2]
        raise RefusedInput(
            f"{benchmark.key}: nltk has no {name}; get it with `python -m nltk.downloader {name}`, set NLTK_DATA, or "
            "leave the benchmark out (--benchmarks)"
        ) from error
