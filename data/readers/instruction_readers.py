"""Readers of instruction corpora: each record is one conversation, `{"messages": [{"role", "content"}, ...]}`."""

import ast
import json
from collections.abc import Iterator

import yaml

from data.catalogue.corpus import Unit
from data.readers.package_readers import members, package_file, stdlib_modules

ROLES = ("system", "user", "assistant", "tool")
SAMPLES_PER_TASK = 150

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
"""Without isomorphic_strings, which draws from sets of letters: other samples in every process."""


def turn(role: str, content: str) -> dict:
    """One message of a conversation."""
    return {"role": role, "content": content}


def exchange(question: str, answer: str) -> dict:
    """A conversation of one question and one answer."""
    return {"messages": [turn("user", question), turn("assistant", answer)]}


def read_reasoning_gym(unit: Unit, tasks: tuple[str, ...]) -> Iterator[dict]:
    """Generated questions with answers that are right by construction; the seed fixes them."""
    import reasoning_gym  # seconds to import, and only this reader wants it

    for name in tasks:
        for item in reasoning_gym.create_dataset(name, size=SAMPLES_PER_TASK, seed=unit.seed):
            yield exchange(item["question"].strip(), item["answer"])


def read_dialogues(unit: Unit) -> Iterator[dict]:
    """chatterbot-corpus: lists of statements, speakers taking turns; a last turn without an answer is left off.

    Files that list several answers to one prompt instead of a dialogue (emotion, computers) give the first answer.
    """
    for name, content in sorted(members(unit.location, unit.corpus.source.member).items()):
        document = yaml.safe_load(content)
        alternatives = name.endswith(("emotion.yml", "computers.yml"))
        for statements in document["conversations"]:
            if not isinstance(statements, list):
                yield {"malformed": "not a list of statements", "raw": str(statements)}
                continue
            kept = statements[:2] if alternatives else statements[: len(statements) // 2 * 2]
            roles = ("user", "assistant") * (len(kept) // 2)
            # YAML reads bare years and numbers as integers; they are what the speaker said.
            messages = [turn(role, str(said).strip()) for role, said in zip(roles, kept, strict=True)]
            yield {"messages": messages}


def read_tool_calls(unit: Unit) -> Iterator[dict]:
    """Conversations with function calls: the tools stand in the system message, calls are the assistant's JSON."""
    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    for row in json.loads(package_file(unit)):
        try:
            messages = [turn(roles[message["from"]], message["value"]) for message in row["conversations"]]
        except KeyError as error:
            yield {"malformed": f"unknown field or speaker {error}", "raw": json.dumps(row)}
            continue
        if row.get("tools"):
            messages.insert(0, turn("system", f"You may call these functions:\n{row['tools']}"))
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        yield {"messages": messages}


def read_alpaca(unit: Unit) -> Iterator[dict]:
    """Rows of instruction, optional input and output."""
    for row in json.loads(package_file(unit)):
        question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        yield exchange(question, row["output"])


def _documented_functions() -> Iterator[tuple[str, ast.FunctionDef, str, str]]:
    """(module, node, docstring, source) of the public functions in the modules kept for instructions."""
    for path in stdlib_modules(instructions=True):
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield path.stem, node, docstring, source


def read_stdlib_functions(unit: Unit) -> Iterator[dict]:
    """Signature and docstring as the task, the function's own source as the answer; 3 to 40 lines."""
    for _, node, docstring, source in _documented_functions():
        body = [statement for statement in node.body[1:] if not isinstance(statement, ast.Pass)]
        code = ast.get_source_segment(source, node)
        if body and code and 3 <= len(code.splitlines()) <= 40:
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            yield exchange(
                f"Write the Python function `{signature}` that does this:\n{docstring}",
                f"```python\n{ast.unparse(node)}\n```",
            )


def read_stdlib_questions(unit: Unit) -> Iterator[dict]:
    """What a function of the standard library does, in its documentation's words; for when there are no dialogues."""
    for module, node, docstring, _ in _documented_functions():
        if len(docstring) >= 40:
            yield exchange(f"What does `{node.name}` in Python's `{module}` module do?", docstring)
