"""Short questions whose answers are right by construction, from reasoning-gym: texts, conversations, benchmark items.

Every kind has an easy and a hard form. A question belongs to training or to the benchmark by a hash of its text, so a
model is never asked what it was trained on, whatever seed made it.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from xxhash import xxh64_intdigest

from data.catalogue.corpus import Unit
from data.readers.messages import make_exchange

Level = Literal["easy", "hard"]

WORKSHEETS, EXCHANGES = 14_000, 12_000
"""Numbers of texts and of conversations of one unit."""
QUESTIONS_A_WORKSHEET = 4
BENCHMARK_SHARE, MOST_DRAWS = 8, 400
"""One question of so many belongs to the benchmark; the most that are drawn for one of it."""
MOST_ITEMS = 1 << 31
"""Size of a data set of reasoning-gym, more than anybody takes: item i of seed s is drawn from the seed s + i."""


def _ask_sum(item: dict[str, Any]) -> str:
    return item["question"]


def _ask_product(item: dict[str, Any]) -> str:
    return f"Calculate {item['metadata']['expression']}."


def _ask_legs(item: dict[str, Any]) -> str:
    animals = [f"{count} {name}{'s' * (count > 1)}" for name, count in item["metadata"]["animals"].items()]
    return f"How many legs have {' and '.join(animals)}?"


def _ask_sorting(item: dict[str, Any]) -> str:
    about = item["metadata"]
    return f"Sort in {about['direction']} order: {_join_integers(about['original_numbers'])}"


def _answer_sorting(item: dict[str, Any]) -> str:
    return _join_integers(item["metadata"]["sorted_numbers"])


def _join_integers(numbers: list[str]) -> str:
    return ", ".join(number.removesuffix(".0") for number in numbers)


def _ask_letters(item: dict[str, Any]) -> str:
    about = item["metadata"]
    return f"How many times is the letter {about['target_letter']} in {' '.join(about['span'])}?"


def _ask_spelling(item: dict[str, Any]) -> str:
    return f"Spell backward: {item['metadata']['word']}"


def _ask_reversal(item: dict[str, Any]) -> str:
    return f"Reverse the list: {', '.join(item['metadata']['words'])}"


def _ask_haystack(item: dict[str, Any]) -> str:
    statements, _, question = item["question"].rpartition("\n")
    return f"{statements.strip()} {question.removesuffix(' Reply only with a name.')}"


def _ask_family(item: dict[str, Any]) -> str:
    story, about = item["question"].partition("\n\n")[0], item["metadata"]
    return f"{story} What is {about['person1']} to {about['person2']}?"


def _ask_syllogism(item: dict[str, Any]) -> str:
    about = item["metadata"]
    return f"{about['premise1']}. {about['premise2']}. Does it follow that {about['conclusion'].lower()}?"


@dataclass(frozen=True)
class Kind:
    """One kind of questions."""

    dataset: str
    """Name in reasoning-gym."""
    common: dict[str, Any]
    """Its options in both forms."""
    easy: dict[str, Any]
    hard: dict[str, Any]
    ask: Callable[[dict[str, Any]], str]
    """Function that returns the question of an item, in few words."""
    answer: Callable[[dict[str, Any]], str] = lambda item: item["answer"]


_WHOLE = {"min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 99}
_TWO_TERMS = {"min_terms": 2, "max_terms": 2, "operators": ("+", "-"), "allow_parentheses": False}

NUMBER_KINDS = {
    "sums": Kind(
        "basic_arithmetic", _TWO_TERMS | {"allow_negation": False}, {"max_digits": 1}, {"max_digits": 2}, _ask_sum
    ),
    "products": Kind("products", {}, {"max_digits": 1}, {"max_digits": 2}, _ask_product),
    "legs": Kind(
        "leg_counting", {"min_animals": 1}, {"max_animals": 1, "max_instances": 9},
        {"max_animals": 2, "max_instances": 9}, _ask_legs,
    ),
    "sorting": Kind(
        "number_sorting", _WHOLE, {"min_numbers": 2, "max_numbers": 3}, {"min_numbers": 3, "max_numbers": 5},
        _ask_sorting, _answer_sorting,
    ),
}  # fmt: skip
WORD_KINDS = {
    "letters": Kind(
        "letter_counting", {}, {"min_words": 1, "max_words": 1}, {"min_words": 2, "max_words": 4}, _ask_letters
    ),
    "spelling": Kind("spell_backward", {"min_word_len": 3}, {"max_word_len": 4}, {"max_word_len": 6}, _ask_spelling),
    "reversal": Kind(
        "word_sequence_reversal", {}, {"min_words": 2, "max_words": 3}, {"min_words": 3, "max_words": 5}, _ask_reversal
    ),
    "haystack": Kind(
        "needle_haystack", {}, {"min_num_statements": 2, "max_num_statements": 2},
        {"min_num_statements": 3, "max_num_statements": 4}, _ask_haystack,
    ),
    "family": Kind(
        "family_relationships", {}, {"min_family_size": 3, "max_family_size": 3},
        {"min_family_size": 3, "max_family_size": 4}, _ask_family,
    ),
    "syllogisms": Kind("syllogism", {}, {"allow_some": False, "allow_some_not": False}, {}, _ask_syllogism),
}  # fmt: skip
KINDS = NUMBER_KINDS | WORD_KINDS
"""Kinds by name: with numbers, and with words."""


def generate(kind: str, level: Level, seed: int) -> Iterator[tuple[str, str]]:
    """Yield questions and answers without end, by the seed."""
    import reasoning_gym  # takes seconds to import, and only this needs it

    about = KINDS[kind]
    options = about.common | (about.easy if level == "easy" else about.hard)
    items = reasoning_gym.create_dataset(about.dataset, size=MOST_ITEMS, seed=seed, **options)
    for number in range(MOST_ITEMS):
        yield about.ask(items[number]), about.answer(items[number])


def is_for_benchmark(question: str) -> bool:
    """Return whether a question is kept out of training."""
    return xxh64_intdigest(question) % BENCHMARK_SHARE == 0


def read_worksheets(unit: Unit, kinds: tuple[str, ...], level: Level) -> Iterator[dict]:
    """Yield texts of some questions, each with its answer in the next line."""
    questions = _mix(unit, kinds, level)
    for _ in range(WORKSHEETS):
        pairs = [next(questions) for _ in range(QUESTIONS_A_WORKSHEET)]
        yield {"text": "\n\n".join(f"{question}\n{answer}" for question, answer in pairs)}


def read_exchanges(unit: Unit, kinds: tuple[str, ...]) -> Iterator[dict]:
    """Yield conversations of one hard question and its answer."""
    questions = _mix(unit, kinds, "hard")
    for _ in range(EXCHANGES):
        yield make_exchange(*next(questions))


def _mix(unit: Unit, kinds: tuple[str, ...], level: Level) -> Iterator[tuple[str, str]]:
    """Yield training questions of all kinds in turn, in an order that the unit's seed and number decide."""
    rng = random.Random(f"{unit.seed} {unit.corpus.name} {unit.shard}")
    streams = [filter(_is_for_training, generate(kind, level, rng.getrandbits(31))) for kind in kinds]
    while True:
        yield from map(next, rng.sample(streams, len(streams)))


def _is_for_training(pair: tuple[str, str]) -> bool:
    return not is_for_benchmark(pair[0])


def make_benchmark(kind: str, size: int) -> list[dict[str, str]]:
    """Return hard questions that no training text holds, each once: rows of `question` and `answer`."""
    rows: dict[str, str] = {}
    for question, answer in islice(generate(kind, "hard", seed=0), MOST_DRAWS * size):
        if is_for_benchmark(question):
            rows.setdefault(question, answer)
        if len(rows) == size:
            break
    assert len(rows) == size, f"{kind} has too few different questions"
    return [{"question": question, "answer": answer} for question, answer in rows.items()]
