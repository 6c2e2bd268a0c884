"""Markup is removed as the plain regular expressions remove it, which take quadratic time, but in linear time."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.readers import package_readers, wikitext
from data.readers.markup import remove_tables, remove_templates, replace_enclosed
from tests.data.growth import measure_growth

TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
REFERENCE = re.compile(r"<ref[^>/]*/>|<ref[^>]*>.*?</ref>", re.DOTALL | re.IGNORECASE)
BLOCK = re.compile(
    r"<(math|gallery|timeline|source|syntaxhighlight|code|pre|nowiki)\b[^>]*>.*?</\1>", re.DOTALL | re.IGNORECASE
)
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)
IMAGE = re.compile(r"\[?!\[[^\]]*\]\([^)]*\)(?:\]\([^)]*\))?")
LINK = re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")


def remove_nested(pattern: re.Pattern, text: str) -> str:
    while (shorter := pattern.sub("", text)) != text:
        text = shorter
    return text


def some(*parts: str):
    return st.lists(st.sampled_from(parts), max_size=25).map("".join)


@settings(max_examples=500)
@given(some("{", "}", "{{", "}}", "a", "|", "\n"))
def test_templates_go_as_one_level_after_the_other_would(text):
    assert remove_templates(text) == remove_nested(TEMPLATE, text)


@settings(max_examples=500)
@given(some("{", "}", "|", "{|", "|}", "a", "\n"))
def test_tables_go_as_one_level_after_the_other_would(text):
    assert remove_tables(text) == remove_nested(TABLE, text)


@settings(max_examples=500)
@given(
    some("<!--", "-->", "<ref", "<REF>", "/", ">", "</ref>", "<ref/>", "<math>", "</Math>", "<pre", "</pre>", "a", "\n")
)
def test_wiki_elements_go_as_the_regular_expressions_remove_them(text):
    for opening, pattern in ((wikitext._COMMENT, COMMENT), (wikitext._REFERENCE, REFERENCE), (wikitext._BLOCK, BLOCK)):
        assert replace_enclosed(text, opening, wikitext._CLOSINGS) == pattern.sub("", text)


@settings(max_examples=500)
@given(some("```", "~~~", "\n", "\n```\n", "[", "]", "(", ")", "![", "](", "a", "!", "[![a](b)](c)", " ", "py"))
def test_markdown_goes_as_the_regular_expressions_remove_it(text):
    readers = package_readers
    assert replace_enclosed(text, readers._FENCE, readers._FENCE_ENDS) == FENCE.sub("", text)
    assert replace_enclosed(text, readers._IMAGE, readers._IMAGE_END) == IMAGE.sub("", text)
    assert replace_enclosed(text, readers._LINK, readers._LINK_ENDS) == LINK.sub(r"\1", text)


def test_external_links_keep_their_label():
    line = "The bridge [https://a.b/c?d=[e the old bridge] crosses the river [http://f.g] near the town."
    assert wikitext.extract_prose(line) == "The bridge the old bridge crosses the river near the town."


def test_a_character_reference_of_many_digits_is_dropped():
    line = "Six words and &#x41; and &#" + "1" * 10_000 + "; and more of them"
    assert wikitext.extract_prose(line) == "Six words and A and and more of them"


NESTED = ("{{", "}}"), ("{|", "|}"), ("[[", "]]"), ("[[File:", "]]"), ("<ref>", "</ref>")
REPEATED = (
    "{{", "}}", "{{a", "a}}", "{|", "|}", "{|\n", "<!--", "<ref", "<ref>", "<ref name=a/b>", "<math>", "<pre", "<",
    "<a",
    "[[", "[[a|", "[[File:", "[[File:[[a]]", "[http://", "[http://a ", "==", "==a", "=\n", "= ", "&#1", "&", "```a\n",
    "~~~\n", "[", "[a](", "[a][", "![", "![](", "[![", "](", "\n ", ".. ", "a ",
)  # fmt: skip


@pytest.mark.parametrize("extract", [wikitext.extract_prose, package_readers.extract_prose])
def test_time_grows_with_the_length_alone(extract):
    texts = [lambda n, unit=unit: unit * (n // len(unit)) for unit in REPEATED]
    texts += [lambda n, o=o, c=c: o * (n // len(o + c)) + c * (n // len(o + c)) for o, c in NESTED]
    texts += [lambda n: "=" * n + "x", lambda n: "![" * (n // 2) + "]x", lambda n: "&#" + "1" * n]
    for text in texts:
        # 16 times as long: 16 times the work where it is linear, 256 times where it is quadratic.
        assert measure_growth(extract, text(2_000), text(32_000)) < 64, text(20)
