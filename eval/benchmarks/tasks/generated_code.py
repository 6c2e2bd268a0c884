"""Metrics of the code benchmarks: whether a program that a model wrote passes the item's tests, in our sandbox."""

import secrets
from typing import Any

from eval.benchmarks.sandbox import run_untrusted


def check_humaneval(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Run the item's tests after the function that the prompt begins and the answer ends. lm-eval calls this."""
    return _check(f"{doc['prompt']}{cut_fence(results[0])}\n{doc['test']}\ncheck({doc['entry_point']})\n")


def check_mbpp(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Run the item's tests after the answer's program. lm-eval calls this."""
    tests = "\n".join(doc["test_list"])
    return _check(f"{doc['test_setup_code']}\n{cut_fence(results[0])}\n{tests}\n")


def cut_fence(answer: str) -> str:
    """Return an answer up to the fence that ends its program: the prompt has opened it."""
    return answer.partition("```")[0]


def _check(program: str) -> dict[str, float]:
    # A program that ends early, `exit(0)` say, has passed no test: it must come to the end and say so.
    password = secrets.token_hex(16)
    outcome = run_untrusted(f"{program}\nprint({password!r})\n")
    passed = outcome.passed and outcome.output.rstrip().endswith(password)
    return {"pass_at_1": float(passed)}
