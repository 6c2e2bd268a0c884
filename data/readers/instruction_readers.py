"""Readers of instruction corpora: each record is one conversation, `{"messages": [{"role", "content"}, ...]}`."""

import ast
from collections.abc import Callable, Iterator
from functools import partial

import yaml

from core.errors import DamagedData
from data.catalogue.corpus import Unit
from data.readers.messages import TOOLS_PROMPT, convert_messages, make_exchange, make_message
from data.readers.package_readers import (
    get_package_file,
    list_stdlib_modules,
    parse_module,
    read_archive_members,
    read_json_array,
)
from data.readers.rows import MalformedRow, convert_rows, describe_type, make_malformed
from data.readers.tool_calls import dump_tools

SAMPLES_PER_TASK = 150
"""Number of questions generated for each task of reasoning-gym."""

MATH_TASKS = (
    "basic_arithmetic", "chain_sum", "decimal_arithmetic", "fraction_simplification", "gcd", "lcm", "leg_counting",
    "polynomial_equations", "prime_factorization", "products", "simple_equations", "time_intervals",
    "calendar_arithmetic", "count_primes",
)  # fmt: skip
LOGIC_TASKS = (
    "base_conversion", "binary_alternation", "caesar_cipher", "count_bits", "family_relationships",
    "knights_knaves", "letter_counting", "number_filtering", "number_sorting", "number_sequence",
    "spell_backward", "string_manipulation", "syllogism", "word_sorting", "word_sequence_reversal",
)  # fmt: skip
"""isomorphic_strings is left out: it draws from sets of letters, so every process would get other samples."""


def read_reasoning_gym(unit: Unit, tasks: tuple[str, ...]) -> Iterator[dict]:
    """Yield generated questions with answers that are right by construction; the unit's seed determines them."""
    import reasoning_gym  # takes seconds to import, and only this reader needs it

    for name in tasks:
        for item in reasoning_gym.create_dataset(name, size=SAMPLES_PER_TASK, seed=unit.seed):
            yield make_exchange(item["question"].strip(), item["answer"])


def read_dialogues(unit: Unit) -> Iterator[dict]:
    """Yield the dialogues of chatterbot-corpus: lists of statements of two speakers in turn.

    A last statement without an answer is left out. Two files (emotion, computers) list several answers to one prompt
    instead of a dialogue; there the first answer is taken.
    """
    for name, content in sorted(read_archive_members(unit.location, get_package_file(unit).member).items()):
        alternatives = name.endswith(("emotion.yml", "computers.yml"))
        rows = ({"statements": statements} for statements in _load_dialogues(content, f"{unit.location}: {name}"))
        yield from convert_rows(rows, partial(_convert_dialogue, alternatives=alternatives))


def _load_dialogues(content: bytes, name: str) -> list:
    """Return the list `conversations` of a YAML file.

    Raises:
        DamagedData: the file has none; names it.
    """
    try:
        # This loader leaves every scalar the text that it is: a year, `yes`, `1.50`.
        document = yaml.load(content, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DamagedData(f"{name} is no YAML ({error}); fetch the package again") from error
    if not isinstance(document, dict) or not isinstance(document.get("conversations"), list):
        raise DamagedData(f"{name} has no list `conversations`; fetch the package again")
    return document["conversations"]


def _convert_dialogue(row: dict, alternatives: bool) -> dict:
    statements = row["statements"]
    if not isinstance(statements, list):
        raise MalformedRow("not a list of statements")
    kept = statements[:2] if alternatives else statements[: len(statements) // 2 * 2]
    if not all(isinstance(said, str) for said in kept):
        raise MalformedRow("a statement that is no text")
    roles = ("user", "assistant") * (len(kept) // 2)
    return {"messages": [make_message(role, said.strip()) for role, said in zip(roles, kept, strict=True)]}


def read_tool_calls(unit: Unit) -> Iterator[dict]:
    """Yield conversations with function calls: the system message lists the tools, an assistant's message may be a call
    in JSON.
    """

    def convert(row: dict) -> dict:
        messages = convert_messages(row.get("conversations"), "conversations")
        if row.get("tools"):
            messages.insert(0, make_message("system", f"{TOOLS_PROMPT}\n{dump_tools(row['tools'], 'tools')}"))
        return {"messages": messages}

    yield from convert_rows(read_json_array(unit), convert)


def read_alpaca(unit: Unit) -> Iterator[dict]:
    """Yield conversations from rows of instruction, optional input and output."""

    def convert(row: dict) -> dict:
        for name, value in (("instruction", row.get("instruction")), ("input", row.get("input") or "")):
            if not isinstance(value, str):
                raise MalformedRow(f"`{name}` is {describe_type(value)}, not a string")
        question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        return make_exchange(question, row.get("output"))

    yield from convert_rows(read_json_array(unit), convert)


def _read_documented_functions(convert: Callable[[str, ast.FunctionDef, str, str], dict | None]) -> Iterator[dict]:
    """Yield what `convert` makes of the public functions in the modules kept for instructions.

    Args:
        convert: function that takes the module's name, the node, its docstring and the module's source, and returns a
            record, or None for a function that is left out.
    """
    for path in list_stdlib_modules(instructions=True):
        try:
            source, tree = parse_module(path)
        except MalformedRow as error:
            yield make_malformed(error, str(path))
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                docstring = ast.get_docstring(node)
                record = convert(path.stem, node, docstring, source) if docstring else None
                if record:
                    yield record


def read_stdlib_functions(unit: Unit) -> Iterator[dict]:
    """Yield tasks to write a function: signature and docstring, answered by the function's source of 3 to 40 lines."""

    def convert(module: str, node: ast.FunctionDef, docstring: str, source: str) -> dict | None:
        body = [statement for statement in node.body[1:] if not isinstance(statement, ast.Pass)]
        code = ast.get_source_segment(source, node)
        if not (body and code and 3 <= len(code.splitlines()) <= 40):
            return None
        signature = f"def {node.name}({ast.unparse(node.args)}):"
        return make_exchange(
            f"Write the Python function `{signature}` that does this:\n{docstring}",
            f"```python\n{ast.unparse(node)}\n```",
        )

    yield from _read_documented_functions(convert)


def read_stdlib_questions(unit: Unit) -> Iterator[dict]:
    """Yield questions about functions of the standard library, answered by docstrings; the fallback of `dialogues`."""

    def convert(module: str, node: ast.FunctionDef, docstring: str, source: str) -> dict | None:
        if len(docstring) < 40:
            return None
        return make_exchange(f"What does `{node.name}` in Python's `{module}` module do?", docstring)

    yield from _read_documented_functions(convert)
