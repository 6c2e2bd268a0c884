"""Generated tool-use conversations: functions of the standard library, called for real.

Every answer is the value that the function returned when the sample was made. The sentences have few forms: this corpus
is the fallback where recorded conversations cannot be fetched, not one to train a product on.
"""

import calendar
import inspect
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator

from data.catalogue.corpus import Unit
from data.readers.messages import TOOLS_PROMPT, make_message

NUM_SAMPLES = 400
"""Number of conversations that are generated."""


def _numbers(rng: random.Random) -> list[int]:
    return [rng.randint(1, 99) for _ in range(rng.randint(3, 8))]


TOOLS: dict[str, tuple[Callable, tuple[str, ...], Callable[[random.Random], tuple], str]] = {
    "gcd": (math.gcd, ("a", "b"), lambda r: (r.randint(2, 999), r.randint(2, 999)),
            "What is the greatest common divisor of {a} and {b}?"),
    "lcm": (math.lcm, ("a", "b"), lambda r: (r.randint(2, 99), r.randint(2, 99)),
            "I need the least common multiple of {a} and {b}."),
    "comb": (math.comb, ("n", "k"), lambda r: (r.randint(5, 30), r.randint(1, 5)),
             "In how many ways can I choose {k} things out of {n}?"),
    "isqrt": (math.isqrt, ("n",), lambda r: (r.randint(10, 100_000),), "Give me the integer square root of {n}."),
    "median": (statistics.median, ("data",), lambda r: (_numbers(r),), "What is the median of {data}?"),
    "mean": (statistics.fmean, ("data",), lambda r: (_numbers(r),), "Please average these numbers: {data}."),
    "isleap": (calendar.isleap, ("year",), lambda r: (r.randint(1800, 2200),), "Is {year} a leap year?"),
    "weekday": (calendar.weekday, ("year", "month", "day"),
                lambda r: (r.randint(1900, 2100), r.randint(1, 12), r.randint(1, 28)),
                "Which weekday is {year}-{month:02}-{day:02}, counting from Monday = 0?"),
}  # fmt: skip
"""Name of a tool -> (function, parameter names, a function that draws arguments at random, the user's question)."""


def _describe_tool(name: str) -> dict:
    function, parameters, _, _ = TOOLS[name]
    documentation = inspect.getdoc(function)
    assert documentation, f"{name}: every tool is a documented function of the standard library"
    return {"name": name, "description": documentation.splitlines()[0], "parameters": list(parameters)}


def read_generated(unit: Unit) -> Iterator[dict]:
    """Yield conversations of a question, a call in JSON, the function's result and the answer, by the unit's seed."""
    rng = random.Random(unit.seed)
    for _ in range(NUM_SAMPLES):
        offered = rng.sample(sorted(TOOLS), 3)
        function, parameters, draw, question = TOOLS[offered[0]]
        arguments = dict(zip(parameters, draw(rng), strict=True))
        result = function(*arguments.values())
        tools = [_describe_tool(name) for name in sorted(offered)]
        contents = (
            ("system", f"{TOOLS_PROMPT}\n{json.dumps(tools)}"),
            ("user", question.format(**arguments)),
            ("assistant", json.dumps({"name": offered[0], "arguments": arguments})),
            ("tool", json.dumps({"result": result})),
            ("assistant", f"The result is {json.dumps(result)}."),
        )
        yield {"messages": [make_message(role, content) for role, content in contents]}
