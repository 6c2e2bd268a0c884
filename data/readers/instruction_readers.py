"""Readers of instruction corpora: each record is one conversation, `{"messages": [{"role", "content"}, ...]}`."""

import ast
from collections.abc import Iterator

import yaml

from data.catalogue.corpus import Unit
from data.readers.messages import TOOLS_PROMPT, convert_messages, make_exchange, make_message
from data.readers.package_readers import get_package_file, list_stdlib_modules, read_archive_members, read_json_array
from data.readers.rows import MalformedRow, convert_rows

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
        document = yaml.safe_load(content)
        alternatives = name.endswith(("emotion.yml", "computers.yml"))
        for statements in document["conversations"]:
            if not isinstance(statements, list):
                yield {"malformed": "not a list of statements", "raw": str(statements)}
                continue
            kept = statements[:2] if alternatives else statements[: len(statements) // 2 * 2]
            roles = ("user", "assistant") * (len(kept) // 2)
            # YAML reads unquoted years and numbers as integers; `str` gives the statement back.
            messages = [make_message(role, str(said).strip()) for role, said in zip(roles, kept, strict=True)]
            yield {"messages": messages}


def read_tool_calls(unit: Unit) -> Iterator[dict]:
    """Yield conversations with function calls: the system message lists the tools, an assistant's message may be a call
    in JSON.
    """

    def convert(row: dict) -> dict:
        messages = convert_messages(row.get("conversations"), "conversations")
        tools = [make_message("system", f"{TOOLS_PROMPT}\n{row['tools']}")] if row.get("tools") else []
        return {"messages": [*tools, *messages]}

    yield from convert_rows(read_json_array(unit), convert)


def read_alpaca(unit: Unit) -> Iterator[dict]:
    """Yield conversations from rows of instruction, optional input and output."""

    def convert(row: dict) -> dict:
        if missing := [name for name in ("instruction", "output") if name not in row]:
            raise MalformedRow(f"no {', '.join(missing)}")
        question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        return make_exchange(question, row["output"])

    yield from convert_rows(read_json_array(unit), convert)


def _find_documented_functions() -> Iterator[tuple[str, ast.FunctionDef, str, str]]:
    """Yield (module, node, docstring, source) of the public functions in the modules kept for instructions."""
    for path in list_stdlib_modules(instructions=True):
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield path.stem, node, docstring, source


def read_stdlib_functions(unit: Unit) -> Iterator[dict]:
    """Yield tasks to write a function: signature and docstring, answered by the function's source of 3 to 40 lines."""
    for _, node, docstring, source in _find_documented_functions():
        body = [statement for statement in node.body[1:] if not isinstance(statement, ast.Pass)]
        code = ast.get_source_segment(source, node)
        if body and code and 3 <= len(code.splitlines()) <= 40:
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            yield make_exchange(
                f"Write the Python function `{signature}` that does this:\n{docstring}",
                f"```python\n{ast.unparse(node)}\n```",
            )


def read_stdlib_questions(unit: Unit) -> Iterator[dict]:
    """Yield questions about functions of the standard library, answered by docstrings; the fallback of `dialogues`."""
    for module, node, docstring, _ in _find_documented_functions():
        if len(docstring) >= 40:
            yield make_exchange(f"What does `{node.name}` in Python's `{module}` module do?", docstring)
