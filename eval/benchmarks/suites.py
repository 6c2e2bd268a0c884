"""The table of benchmarks: shots, metric, chance level, where the items are read, and what has been published.

Source of the benchmark list, of the zero-shot tasks and of every published figure: arXiv 2605.27358 and the model
cards of its releases. A figure that could not be found there is None. Scores are fractions here, percent in print.

The paper does not say which metric it reads where lm-eval offers two, nor the shots of five tasks. Our assumptions:
length-normalised accuracy (`acc_norm`) wherever lm-eval defines it, and for the tasks that are not zero-shot the shots
customary in the base-model literature: MMLU, NQ and TriviaQA 5, DROP 3, GSM8K 8 (chain of thought), BBH 3.

How to add a benchmark: see the docstring of `eval.benchmarks`.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from core.errors import RefusedInput
from eval.benchmarks.item_readers import (
    ReadItems,
    folder_reader,
    read_bbh,
    read_boolq,
    read_drop,
    read_gsm8k,
    read_humaneval,
    read_math500,
    read_mbpp,
    read_mmlu,
    read_nq,
    read_triviaqa,
    read_whole_bbh,
    science_reader,
    take_generated,
    validation_reader,
)


@dataclass(frozen=True)
class ItemSource:
    """The source of a benchmark's items."""

    read: ReadItems
    """Function that returns the items' rows; one of `eval.benchmarks.item_readers`."""
    text_fields: tuple[str, ...]
    """Fields whose text identifies an item: training documents that share an n-gram with it are dropped. Empty where
    another benchmark has the same items."""
    place: Literal["package", "lm-eval", "folder", "generated"] = "package"
    """What holds the items: the items package, lm-eval itself, the folder `evaluation.items_folder`, or nothing: the
    caller of `eval.benchmarks.items.prepare` makes them."""


@dataclass(frozen=True)
class Benchmark:
    """One row of the main table."""

    key: str
    """Name of the task file in eval/benchmarks/tasks, of the items' folder and of the result file."""
    title: str
    category: str
    """Group of the row: commonsense, knowledge, science, reading or reasoning."""
    shots: int
    """Number of solved examples in the prompt."""
    metric: str
    """lm-eval's name of the reported number: metric,filter."""
    chance: float
    """Expected score of a uniform guess, or of the most frequent answer among those of a generated benchmark; 0 where
    an answer is written freely."""
    items: ItemSource
    published_base: float | None = None
    """Published score of MobileMoE-S base."""
    note: str = ""
    """Difference between our number and that of a stock lm-eval run; printed beside the result."""
    chat: bool = False
    """Whether prompts are rendered by the model's chat template, except for base models."""
    runs_code: bool = False
    """Whether code that the model writes is run; it needs `evaluation.run_generated_code`."""
    task_file: str = ""
    """Name of the task file in eval/benchmarks/tasks where it is not the key."""
    nltk_data: str = ""
    """Resource of nltk that the metric needs; nltk's own downloader gets it."""

    def describe(self) -> dict[str, Any]:
        """Return the fields that reports and fingerprints carry: all but the source of the items."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "items"}


FOUNDATIONAL = (
    Benchmark(
        "hellaswag", "HellaSwag", "commonsense", 0, "acc_norm,none", 1 / 4,
        ItemSource(validation_reader("hellaswag/none"), ("ctx", "endings")), published_base=0.589,
    ),
    Benchmark(
        "piqa", "PIQA", "commonsense", 0, "acc_norm,none", 1 / 2,
        ItemSource(validation_reader("piqa/plain_text"), ("goal", "sol1", "sol2")), published_base=0.754,
    ),
    Benchmark(
        "siqa", "SIQA", "commonsense", 0, "acc,none", 1 / 3,
        ItemSource(
            validation_reader("social_i_qa/none"), ("context", "question", "answerA", "answerB", "answerC")
        ),
        published_base=0.468,
    ),
    Benchmark(
        "winogrande", "WinoGrande", "commonsense", 0, "acc,none", 1 / 2,
        ItemSource(validation_reader("winogrande/winogrande_xl"), ("sentence", "option1", "option2")),
        published_base=0.586,
    ),
    Benchmark("mmlu", "MMLU", "knowledge", 5, "acc,none", 1 / 4, ItemSource(read_mmlu, ("question", "choices"))),
    Benchmark(
        "nq", "NQ", "knowledge", 5, "exact_match,remove_whitespace", 0.0, ItemSource(read_nq, ("question", "answer")),
        note="Few-shot examples: the five training questions of the OLMES prompt, in a fixed order.",
    ),
    Benchmark(
        "triviaqa", "TriviaQA", "knowledge", 5, "exact_match,remove_whitespace", 0.0,
        ItemSource(read_triviaqa, ("question", "answer")),
        note="The 7,993 questions of the Wikipedia part of the validation split; few-shot examples are drawn from the "
        "same split, never the question asked.",
    ),
    Benchmark(
        "arc_easy", "ARC-Easy", "science", 0, "acc_norm,none", 1 / 4,
        ItemSource(science_reader("arc_easy", "question"), ("question", "choices")), published_base=0.739,
    ),
    Benchmark(
        "arc_challenge", "ARC-Challenge", "science", 0, "acc_norm,none", 1 / 4,
        ItemSource(science_reader("arc_challenge", "question"), ("question", "choices")),
    ),
    Benchmark(
        "openbookqa", "OpenBookQA", "science", 0, "acc_norm,none", 1 / 4,
        ItemSource(science_reader("openbookqa", "question_stem"), ("question_stem", "choices")), published_base=0.346,
    ),
    Benchmark(
        "boolq", "BoolQ", "reading", 0, "acc,none", 1 / 2, ItemSource(read_boolq, ("passage", "question")),
        published_base=0.602,
        note="62% of the answers are yes: a model that always says yes is above the chance level.",
    ),
    Benchmark(
        "drop", "DROP", "reading", 3, "f1,none", 0.0, ItemSource(read_drop, ("passage", "question", "answers")),
        note="1,000 questions of the validation split. lm-eval's own few-shot examples print the answer's field names "
        "instead of the answer; ours print the answer, and a blank line ends a generation.",
    ),
    Benchmark(
        "gsm8k", "GSM8K", "reasoning", 8, "exact_match,strict-match", 0.0,
        ItemSource(read_gsm8k, ("question", "answer")),
        note="Chain of thought with the eight standard examples (lm-eval's gsm8k_cot).",
    ),
    Benchmark(
        "bbh", "BBH", "reasoning", 2, "exact_match,none", 0.0,
        ItemSource(read_bbh, ("input", "target"), place="lm-eval"),
        note="SMOKE TEST, NOT A SCORE: the items are lm-eval's 81 few-shot exemplars (27 tasks, 3 each), every one "
        "asked with the two others as examples. The customary setting is 6,511 items and 3 shots.",
    ),
)  # fmt: skip
"""The 14 benchmarks of the paper's main table, in its order."""

ADVANCED = (
    Benchmark(
        "math500", "MATH-500", "mathematics", 0, "exact_match,none", 0.0,
        ItemSource(read_math500, ("problem", "solution")), chat=True,
        note="lm-eval's hendrycks_math500, which compares normalised strings between the first and the last $.",
    ),
    Benchmark(
        "gsm8k_chat", "GSM8K", "mathematics", 8, "exact_match,flexible-extract", 0.0, ItemSource(read_gsm8k, ()),
        chat=True,
        note="Chain of thought with the eight standard examples (lm-eval's gsm8k_cot); the last number counts.",
    ),
    Benchmark(
        "humaneval", "HumanEval", "code", 0, "pass_at_1,none", 0.0,
        ItemSource(read_humaneval, ("prompt", "canonical_solution")), chat=True, runs_code=True,
        note="lm-eval's humaneval_instruct; tests run in our sandbox.",
    ),
    Benchmark(
        "mbpp", "MBPP", "code", 0, "pass_at_1,none", 0.0, ItemSource(read_mbpp, ("text", "code")), chat=True,
        runs_code=True, note="lm-eval's mbpp_instruct without its three examples; tests run in our sandbox.",
    ),
    Benchmark(
        "ifeval", "IFEval", "instructions", 0, "prompt_level_strict_acc,none", 0.0,
        ItemSource(folder_reader("ifeval", ("test",), ("key", "prompt", "instruction_id_list", "kwargs")), ("prompt",),
                   "folder"),
        chat=True, nltk_data="tokenizers/punkt_tab",
    ),
    Benchmark(
        "mmlu_pro", "MMLU-Pro", "knowledge", 5, "exact_match,custom-extract", 0.0,
        ItemSource(folder_reader("mmlu_pro", ("test", "validation"), ("question", "options", "answer", "category")),
                   ("question", "options"), "folder"),
        chat=True,
    ),
    Benchmark(
        "gpqa", "GPQA", "knowledge", 0, "acc_norm,none", 1 / 4,
        ItemSource(
            folder_reader(
                "gpqa", ("test",), ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
            ),
            ("Question",), "folder",
        ),
        chat=True, note="lm-eval's gpqa_diamond_zeroshot; the order of the choices is drawn once for all models.",
    ),
)  # fmt: skip
"""The tier for instruction-tuned models. IFBench is not in it: lm-eval has no task for it."""


def _generated(kind: str, title: str, category: str, majority: float) -> Benchmark:
    return Benchmark(
        f"questions_{kind}",
        title,
        category,
        0,
        "exact_match,strip",
        majority,
        ItemSource(take_generated, ("question", "answer"), "generated"),
        chat=True,
        task_file="questions",
    )


QUESTIONS = (
    _generated("sums", "Sums", "numbers", 7 / 500), _generated("products", "Products", "numbers", 2 / 500),
    _generated("legs", "Legs", "numbers", 22 / 500), _generated("sorting", "Sorting", "numbers", 1 / 500),
    _generated("letters", "Letters", "words", 337 / 500), _generated("spelling", "Spelling", "words", 1 / 500),
    _generated("reversal", "Reversal", "words", 1 / 500), _generated("haystack", "Haystack", "logic", 4 / 500),
    _generated("family", "Family", "logic", 122 / 500), _generated("syllogisms", "Syllogisms", "logic", 347 / 500),
)  # fmt: skip
"""Generated questions of the kinds that the recipe `hour` trains on, and that no training text holds. The answer that
is right most often stands for chance."""

LARGER = {
    "bbh": replace(
        next(benchmark for benchmark in FOUNDATIONAL if benchmark.key == "bbh"),
        shots=3, items=ItemSource(read_whole_bbh, ("input", "target"), "folder"), task_file="bbh_whole", note="",
    )
}  # fmt: skip
"""Key -> benchmark that takes the place of the one of that key, where the user's folder has its items."""

SUITES: dict[str, tuple[Benchmark, ...]] = {
    "foundational": FOUNDATIONAL, "advanced": ADVANCED, "questions": QUESTIONS,
}  # fmt: skip
"""Suites by the name that a recipe's `evaluation.suite` and `mobilemoe eval --suite` take."""


def get_suite(name: str, keys: Collection[str] = ()) -> tuple[Benchmark, ...]:
    """Return the benchmarks of a suite.

    Args:
        keys: of the benchmarks to return; empty returns all of them.

    Raises:
        RefusedInput: there is no such suite, or it has no such benchmark; the message lists those there are.
    """
    if name not in SUITES:
        raise RefusedInput(f"evaluation.suite: {name!r} is not a suite; choose one of {', '.join(sorted(SUITES))}")
    known = {benchmark.key: benchmark for benchmark in SUITES[name]}
    for key in keys:
        if key not in known:
            raise RefusedInput(
                f"evaluation.benchmarks: the suite {name} has no {key!r}; choose among {', '.join(known)}"
            )
    return tuple(benchmark for key, benchmark in known.items() if not keys or key in keys)


def list_benchmarks() -> list[Benchmark]:
    """Return the benchmarks of all suites, each once."""
    return list({benchmark.key: benchmark for suite in SUITES.values() for benchmark in suite}.values())
