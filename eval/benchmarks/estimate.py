"""What an evaluation costs, before it starts: requests and tokens, counted exactly, and the time they take."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import AutoConfig, AutoModelForCausalLM

from core.progress import Progress
from eval.benchmarks import harness
from eval.benchmarks.prefix_lm import PrefixLM, Request
from eval.benchmarks.scoring import BenchmarkTasks
from eval.benchmarks.shared_prefixes import Ids, group_by_prefix
from eval.benchmarks.slices import cut_benchmark
from eval.config import EvaluationConfig

ROW_TOKENS, DECODE_ROWS, DECODE_STEPS = 128, 32, 8
"""Tokens of a row when the speed is measured, rows that are generated at once, and tokens that each generates."""


@dataclass
class Cost:
    """Numbers of one benchmark."""

    items: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    """Tokens of all contexts and answers: what passes where nothing is shared, without padding."""
    computed_tokens: int = 0
    """Tokens that pass here, shared prefixes once, without padding."""
    generated_tokens: int = 0
    """Bound on the tokens that are generated."""


@dataclass(frozen=True)
class Rates:
    """Tokens a second of one worker."""

    prefill: float
    decode: float
    """Of all rows of a batch together."""

    def seconds(self, cost: Cost) -> float:
        """Return the time of one worker."""
        return cost.computed_tokens / self.prefill + cost.generated_tokens / self.decode


class RequestCounter(PrefixLM):
    """A model that counts the tokens of its requests in place of computing them. It needs no weights."""

    cost: Cost

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        contexts = self._group_requests(requests)
        self.cost.requests += len(requests)
        self._count_computed(contexts)
        for context in contexts.values():
            for ids, wanted in context.continuations.items():
                self.cost.computed_tokens += len(ids) - 1
                self.cost.prompt_tokens += (len(context.ids) + len(ids) - 1) * len(wanted)
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Count the prompts, and the most tokens that are generated after each."""
        prompts: dict[Ids, int] = {}
        for request in requests:
            context, options = request.args
            longest = options.get("max_gen_toks", self.max_gen_toks)
            ids = tuple(self.tok_encode(context, left_truncate_len=self.max_length - longest))
            prompts[ids] = longest
            self.cost.prompt_tokens += len(ids)
        self.cost.requests += len(requests)
        self._count_computed(prompts)
        self.cost.generated_tokens += sum(prompts.values())
        return [""] * len(requests)

    def _count_computed(self, sequences: Any) -> None:
        for prefix, group in group_by_prefix(list(sequences)):
            self.cost.computed_tokens += len(prefix) + sum(len(ids) - len(prefix) for ids in group)


def count_requests(
    model_dir: Path, items: Path, config: EvaluationConfig, progress: Progress, *, base: bool = False
) -> dict[str, Cost]:
    """Count what the benchmarks of an evaluation ask for, as `harness.evaluate` would ask it, slice by slice.

    Args:
        model_dir: Hugging Face folder; its config.json and tokenizer are enough.
        base: as in `harness.evaluate`.

    Returns:
        benchmark key -> cost.

    Raises:
        RefusedInput: as `harness.evaluate`.
    """
    benchmarks, counts = harness.choose_benchmarks(model_dir, items, config, base=base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir, local_files_only=True))
    lm = RequestCounter(pretrained=model, tokenizer=str(model_dir), backend="causal", batch_size=1)
    costs = {}
    for done, benchmark in enumerate(benchmarks):
        progress(benchmark.key, done, len(benchmarks))
        lm.cost = costs[benchmark.key] = Cost(items=counts[benchmark.key])
        tasks = BenchmarkTasks(benchmark, items, config.limit, base=base)
        for part in cut_benchmark(benchmark.key, counts[benchmark.key]):
            tasks.score(lm, part)
    progress("estimate", len(benchmarks), len(benchmarks))
    return costs


def measure_rates(model_dir: Path, batch_tokens: int) -> Rates:
    """Measure the speed of a model on this machine: one batch of prompts, and some tokens after each.

    Raises:
        RefusedInput: the folder holds no model.
    """
    lm = harness.load_model(model_dir, batch_tokens)
    generator = torch.Generator().manual_seed(0)
    rows = max(1, batch_tokens // ROW_TOKENS)
    ids = torch.randint(0, lm.model.config.vocab_size, (rows, ROW_TOKENS), generator=generator).tolist()
    requests: list[Request] = [(("", ""), row[:-1], row[-1:]) for row in ids]
    lm._loglikelihood_tokens(requests[:1], disable_tqdm=True)
    start = time.perf_counter()
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    prefill = rows * (ROW_TOKENS - 1) / (time.perf_counter() - start)
    prompt = lm.tok_decode(ids[0][:16])
    options = {"until": [], "max_gen_toks": DECODE_STEPS, "do_sample": False}
    prompts = [
        Instance("generate_until", {}, (f"{number} {prompt}", dict(options)), number) for number in range(DECODE_ROWS)
    ]
    start = time.perf_counter()
    texts = lm.generate_until(prompts, disable_tqdm=True)
    assert len(texts) == DECODE_ROWS
    return Rates(prefill, DECODE_ROWS * DECODE_STEPS / (time.perf_counter() - start))
