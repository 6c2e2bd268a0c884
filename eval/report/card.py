"""Scores in the forms that others read: the hub's metadata of a model card (model-index), and lm-eval's results."""

from typing import Any

from eval.benchmarks.suites import QUESTIONS
from eval.report.scores import MODELS

ARTIFACTS = {"sft": "bf16", "qat_int4": "int4"}
"""Model -> artifact whose scores these are."""
DATASETS = {
    "hellaswag": ("Rowan/hellaswag", None),
    "piqa": ("baber/piqa", None),
    "siqa": ("lighteval/siqa", None),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
    "mmlu": ("cais/mmlu", None),
    "nq": ("google-research-datasets/nq_open", None),
    "triviaqa": ("mandarjoshi/trivia_qa", "rc.nocontext"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": ("allenai/openbookqa", "main"),
    "boolq": ("aps/super_glue", "boolq"),
    "drop": ("EleutherAI/drop", None),
    "gsm8k": ("openai/gsm8k", "main"),
    "bbh": ("SaylorTwift/bbh", None),
    "math500": ("HuggingFaceH4/MATH-500", "default"),
    "gsm8k_chat": ("openai/gsm8k", "main"),
    "humaneval": ("openai/openai_humaneval", None),
    "mbpp": ("google-research-datasets/mbpp", "full"),
    "ifeval": ("google/IFEval", None),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", None),
    "gpqa": ("Idavidrein/gpqa", "gpqa_diamond"),
    **{benchmark.key: ("reasoning-gym", None) for benchmark in QUESTIONS},
}
"""Benchmark -> data set on the hub and its configuration, as lm-eval's stock task names them; None for several.
Generated benchmarks name the package that made them."""


def build_model_index(results: dict[str, Any], model: str) -> str:
    """Return the YAML header of a model card with a model's scores, percent, for the top of the artifact's README.md.

    Args:
        results: content of results.json.
        model: key of `MODELS`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    scored = [(row, row["scores"][model]) for row in results["benchmarks"] if row["scores"][model]]
    entries = [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=DATASETS[row["key"]][0],
            dataset_config=DATASETS[row["key"]][1],
            dataset_name=f"{row['title']} ({row['shots']}-shot, {score['items']:,} items)",
            metric_type=row["metric"].split(",")[0],
            metric_name=f"{row['metric'].split(',')[0]}, standard error {_format_percent(score['stderr'])}",
            metric_value=round(100 * score["value"], 2),
            source_name=f"lm-evaluation-harness {score['versions']['lm_eval']}",
            source_url="https://github.com/EleutherAI/lm-evaluation-harness",
        )
        for row, score in scored
    ]
    card = ModelCardData(
        model_name=f"{results['run']} ({MODELS[model]})", library_name="transformers", eval_results=entries or None
    )
    return f"---\n{card.to_yaml()}\n---\n"


def _format_percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.2f}"


def build_lm_eval_results(results: dict[str, Any], model: str) -> dict[str, Any]:
    """Return a model's scores as lm-eval writes them: `results`, `n-samples`, `versions`, `n-shot`, by benchmark."""
    scored = {row["key"]: row["scores"][model] for row in results["benchmarks"] if row["scores"][model]}
    return {
        "model_name": f"{results['run']} ({MODELS[model]})",
        "results": {key: _list_metrics(score) for key, score in scored.items()},
        "n-samples": {key: {"effective": score["items"]} for key, score in scored.items()},
        "versions": {key: score["task_version"] for key, score in scored.items()},
        "n-shot": {key: score["shots"] for key, score in scored.items()},
        "lm_eval_version": next((score["versions"]["lm_eval"] for score in scored.values()), None),
    }


def _list_metrics(score: dict[str, Any]) -> dict[str, Any]:
    """Return every metric of a result by lm-eval's names, with the standard error of the reported one."""
    metric, metric_filter = score["metric"].split(",")
    error = score["stderr"]
    return (
        {"alias": score["benchmark"], **score["other_metrics"]}
        | {f"{metric},{metric_filter}": score["value"]}
        | {f"{metric}_stderr,{metric_filter}": "N/A" if error is None else error}
    )
