"""Readers of instruction corpora: each record is one conversation, `{"messages": [{"role", "content"}, ...]}`."""

import ast
import json
from collections.abc import Iterator

import yaml

from data.catalogue.corpus import Unit
from data.readers.package_readers import get_package_file, list_stdlib_modules, read_archive_members, read_package_file

ROLES = ("system", "user", "assistant", "tool")
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
TOOLS_PROMPT = "You may call these functions:"
"""Beginning of the system message that lists the functions a conversation may call."""
ROLES_BY_SPEAKER = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""ShareGPT's names of the speakers -> roles."""


def make_message(role: str | None, content: str | None) -> dict:
    """Return one message of a conversation. The pipeline rejects a record whose role or content is None."""
    return {"role": role, "content": content}


def make_exchange(question: str | None, answer: str | None) -> dict:
    """Return a conversation of one question and one answer."""
    return {"messages": [make_message("user", question), make_message("assistant", answer)]}


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
    for row in json.loads(read_package_file(unit)):
        try:
            messages = [
                make_message(ROLES_BY_SPEAKER[message["from"]], message["value"]) for message in row["conversations"]
            ]
        except KeyError as error:
            yield {"malformed": f"unknown field or speaker {error}", "raw": json.dumps(row)}
            continue
        if row.get("tools"):
            messages.insert(0, make_message("system", f"{TOOLS_PROMPT}\n{row['tools']}"))
        # Only answers are trained, so nothing is lost with the messages after the last one.
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        yield {"messages": messages}


def read_alpaca(unit: Unit) -> Iterator[dict]:
    """Yield conversations from rows of instruction, optional input and output."""
    for row in json.loads(read_package_file(unit)):
        question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        yield make_exchange(question, row["output"])


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
