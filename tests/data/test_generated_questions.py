"""Generated questions: right answers, checked by other means than the generator's, and none in two places."""

import re
from itertools import islice

import pytest

from data.catalogue.corpora import CATALOGUE, QUESTION_CORPORA
from data.catalogue.corpus import Unit
from data.readers import generated_questions
from data.readers.generated_questions import KINDS, generate, is_for_benchmark, make_benchmark
from eval.benchmarks.suites import QUESTIONS
from pipelines.steps.data import GENERATED_ITEMS

LEGS = {"snake": 0, "chicken": 2, "cat": 4, "dog": 4, "bee": 6, "spider": 8}


def integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def check_sums(question: str) -> str:
    a, sign, b = re.fullmatch(r"Calculate (\d+) ([-+]) (\d+)\.", question).groups()
    return str(int(a) + int(b) if sign == "+" else int(a) - int(b))


def check_products(question: str) -> str:
    a, b = integers(question)
    return str(a * b)


def check_legs(question: str) -> str | None:
    animals = re.findall(r"(\d+) ([a-z ]+?)s?(?= and|\?)", question)
    return str(sum(int(n) * LEGS[name] for n, name in animals)) if {a for _, a in animals} <= LEGS.keys() else None


def check_sorting(question: str) -> str:
    return ", ".join(map(str, sorted(integers(question), reverse="descending" in question)))


def check_letters(question: str) -> str:
    letter, text = re.fullmatch(r"How many times is the letter (\w) in (.*)\?", question).groups()
    return str(text.lower().count(letter.lower()))


def check_spelling(question: str) -> str:
    return question.split()[-1][::-1]


def check_reversal(question: str) -> str:
    return ", ".join(question.partition(": ")[2].split(", ")[::-1])


def check_haystack(question: str) -> str:
    *statements, asked = re.split(r"(?<=[.]) ", question)
    wanted = asked.removeprefix("Who ").rstrip("?")
    (name,) = {s.removesuffix(f" {wanted}.") for s in statements if s.endswith(f" {wanted}.")}
    return name


def check_family(question: str) -> str | None:
    """Husbands, wives and children of the first couple; what is further away is left to the generator."""
    first, wife, child = re.match(r"(\S+) is married to (\S+)\. They have a child called (\S+)\.", question).groups()
    who, whose = re.search(r"What is (\S+) to (\S+)\?", question).groups()
    known = {(first, wife): "husband", (wife, first): "wife", (first, child): "father", (wife, child): "mother"}
    return known.get((who, whose))


def check_syllogisms(question: str) -> str | None:
    """Two forms that everybody knows; the other answers are the generator's."""
    first, second, asked = re.fullmatch(r"(.*)\. (.*)\. Does it follow that (.*)\?", question).groups()
    a, b = (re.fullmatch(r"All (\S+) are (\S+)", premise) for premise in (first, second))
    if a and b and a[2] == b[1] and asked == f"all {a[1]} are {b[2]}":
        return "Yes"
    return None


@pytest.mark.parametrize("level", ["easy", "hard"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind, level):
    check, checked = globals()[f"check_{kind}"], 0
    for question, answer in islice(generate(kind, level, 7), 400):
        expected = check(question)
        assert expected in (None, answer), question
        checked += expected is not None
        assert question == question.strip() and answer == answer.strip() and "\n" not in question + answer
    assert checked > (400 if kind not in ("legs", "family", "syllogisms") else 5) - 1


def test_no_training_text_holds_a_question_of_the_benchmark(monkeypatch):
    monkeypatch.setattr(generated_questions, "WORKSHEETS", 300)
    monkeypatch.setattr(generated_questions, "EXCHANGES", 600)
    asked = {row["question"] for kind in KINDS for row in make_benchmark(kind, GENERATED_ITEMS)}
    assert len(asked) == GENERATED_ITEMS * len(KINDS)
    for name in QUESTION_CORPORA:
        corpus = CATALOGUE[name]
        texts = [list(corpus.read(Unit(corpus, "", shard, seed=0))) for shard in range(corpus.shards)]
        assert texts[0] != texts[1], "each unit has its own"
        for record in (record for unit in texts for record in unit):
            if corpus.kind == "text":
                questions = [pair.partition("\n")[0] for pair in record["text"].split("\n\n")]
            else:
                questions = [record["messages"][0]["content"]]
            assert not asked & set(questions)
            assert not any(map(is_for_benchmark, questions))


@pytest.mark.parametrize("benchmark", QUESTIONS, ids=lambda b: b.key)
def test_chance_is_the_most_frequent_answer(benchmark):
    answers = [row["answer"] for row in make_benchmark(benchmark.key.removeprefix("questions_"), GENERATED_ITEMS)]
    most = max(answers.count(answer) for answer in set(answers))
    assert benchmark.chance == most / GENERATED_ITEMS
