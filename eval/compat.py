"""Undocumented interfaces of eval's dependencies, each behind one function.

tests/eval/test_contracts.py holds what each function relies on. Every function imports its dependency when it is
called: code that needs one dependency does not load the others.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM


def find_lm_eval_tasks() -> Path:
    """Return the folder of lm-eval's own task files."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def load_task_yaml(path: Path) -> dict[str, Any]:
    """Read an lm-eval task file, with its `include` files merged and every `!function` resolved."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path)


def evaluate_tasks(lm: "HFLM", tasks: "list[ConfigurableTask]", counts: dict[str, int]) -> dict[str, Any]:
    """Score the first items of task objects that are already built.

    lm-eval's documented entry, `simple_evaluate`, describes the machine on every call (pip, compilers, drivers), which
    takes seconds a benchmark. `evaluate` wants its tasks in the form that only `TaskManager.load` makes.

    Args:
        counts: number of items to score, by task name.

    Returns:
        `results`: task name -> {"metric,filter": value}. `samples`: task name -> one record an item and filter, with
        the keys `filter`, `doc`, `target`, `arguments` (one tuple a request), `resps` and one key a metric.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.evaluate(
        lm,
        task_dict=TaskManager(include_defaults=False).load(tasks),
        samples={name: list(range(count)) for name, count in counts.items()},
        bootstrap_iters=0,
    )


def encode_pair(lm: "HFLM", context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a context and of its continuation, as lm-eval scores them."""
    return lm._encode_pair(context, continuation)


def make_serializable(value: object) -> object:
    """Turn a value that JSON does not know into one that it does; for `json.dumps(default=...)`."""
    from lm_eval.utils import handle_non_serializable

    return handle_non_serializable(value)
