"""A data set takes over the corpora of a former one that are the same, and is what it is when made from nothing."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue.corpora import CATALOGUE, select_corpora
from data.catalogue.corpus import Corpus, RemoteFiles, Unit
from data.config import DataConfig
from data.corpus_keys import compute_keys
from data.pipeline import prepare
from data.readers import remote_readers
from data.sources import SourceFile
from data.tokens.verify_shards import verify_shards
from tests.data.planted import CONFIG, plant


def make_chats(folder):
    """Return a corpus of conversations: new ones, one of them twice, and one that the generated tool calls have."""
    generated = CATALOGUE["generated-tool-calls"]
    known = next(iter(generated.read(Unit(generated, "", 0, 0))))["messages"]
    new = [
        [{"role": "user", "content": f"What is {n} plus {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]
        for n in range(40)
    ]
    folder.mkdir()
    rows = [json.dumps({"messages": messages}) for messages in [*new, new[7], known]]
    (folder / "chats.jsonl").write_text("\n".join(rows) + "\n")
    return Corpus(
        "chats", "math", "sft", "conversation", "test", RemoteFiles(str(folder), "*.jsonl", ("messages",)),
        remote_readers.read_messages, text_bytes=10_000,
    )  # fmt: skip


def test_adding_a_corpus_makes_that_corpus_alone(prepared, tmp_path, monkeypatch):
    plant(monkeypatch, prepared.source)
    monkeypatch.setitem(CATALOGUE, "chats", make_chats(tmp_path / "chats"))
    config = dataclasses.replace(CONFIG, corpora=(*CONFIG.corpora, "chats"))
    outs, units = [tmp_path / name for name in ("with former", "from nothing")], []
    for out, former in zip(outs, ([tmp_path / "nothing", prepared.out], []), strict=True):
        labels = set()
        prepare(
            config, packages={}, benchmark_texts=prepared.benchmark_texts, out=out, former=former,
            progress=lambda name, done, total: labels.add((name, total)),  # noqa: B023  called in this round only
        )  # fmt: skip
        units.append(dict(labels)["1-read-and-filter"])
        verify_shards(out)
    assert units == [1, 1 + sum(len(entry["records_sha256"]) for entry in prepared.manifest["corpora"].values())]
    manifests = [json.loads((out / "data_manifest.json").read_text()) for out in outs]
    assert manifests[0] == manifests[1]
    assert manifests[0]["corpora"]["chats"]["exact_duplicates"] == 2  # its own, and the tool call
    for index in outs[1].rglob("index.json"):
        name = index.relative_to(outs[1])
        assert (outs[0] / name).read_bytes() == index.read_bytes()
    kept = [file for file in prepared.out.rglob("*.zstd") if "tool_use" in str(file) or "web" in str(file)]
    assert kept and all((outs[0] / file.relative_to(prepared.out)).samefile(file) for file in kept)
    set_aside = prepared.out / "set_aside"
    for file in (path for path in set_aside.rglob("*") if path.is_file()):
        assert (outs[0] / file.relative_to(prepared.out)).read_bytes() == file.read_bytes()


def test_another_tokenizer_takes_nothing_over(prepared, tmp_path, monkeypatch):
    plant(monkeypatch, prepared.source)
    tokenizer = dataclasses.replace(CONFIG.tokenizer, train_vocab_size=1100)
    config = dataclasses.replace(CONFIG, corpora=("planted",), tokenizer=tokenizer)
    manifest = prepare(
        config, packages={}, benchmark_texts=prepared.benchmark_texts, out=tmp_path / "out", former=[prepared.out],
        progress=lambda *_: None,
    )  # fmt: skip
    assert manifest["keys"]["corpora"]["planted"] != prepared.manifest["keys"]["corpora"]["planted"]
    assert not any(file.stat().st_nlink > 1 for file in (tmp_path / "out").rglob("*.zstd"))


# --- keys ---

TEXTS = [
    Corpus(
        f"text{i}", "web", "text", "prose", "test", RemoteFiles(f"/t{i}", "*"), remote_readers.read_text, 1,
        deduplicated="by its publisher" if i % 2 else "", tokens=100.0,
    )
    for i in range(4)
]  # fmt: skip
CHATS = [
    dataclasses.replace(
        TEXTS[0], name=f"chat{i}", domain="chat", kind="sft", style="conversation", read=remote_readers.read_messages
    )
    for i in range(4)
]  # fmt: skip


def keys_of(chosen: list[Corpus], sizes: dict[str, int], tmp_path, **options):
    """Return the keys of corpora with one file each, of the size given, with an existing tokenizer and benchmarks."""
    file = tmp_path / "tokenizer.json"
    if not file.exists():
        file.write_text("{}")
    config = DataConfig(corpora=tuple(c.name for c in chosen), **options)
    config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=str(file)))
    sources = {c.name: [SourceFile(f"{c.name}.jsonl", sizes.get(c.name, 1), None)] for c in chosen}
    return compute_keys(config, 0, chosen, {}, sources, None, file).corpora


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() & after.keys() if before[name] != after[name]}


@pytest.mark.parametrize("within", ["all", "corpus"])
def test_a_corpus_at_the_end_of_its_kind_changes_no_other_but_its_group(tmp_path, within):
    first = keys_of([*TEXTS[:3], *CHATS[:3]], {}, tmp_path, near_duplicates_within=within)
    assert changed(first, keys_of([*TEXTS[:3], *CHATS], {}, tmp_path, near_duplicates_within=within)) == set()
    assert changed(first, keys_of([*TEXTS, *CHATS[:3]], {}, tmp_path, near_duplicates_within=within)) == set()
    # A text corpus that is not deduplicated joins the group of the others.
    joined = [*TEXTS[:2], TEXTS[3], dataclasses.replace(TEXTS[2], name="late"), *CHATS[:3]]
    before = keys_of([*TEXTS[:2], TEXTS[3], *CHATS[:3]], {}, tmp_path, near_duplicates_within=within)
    assert changed(before, keys_of(joined, {}, tmp_path, near_duplicates_within=within)) == (
        {"text0"} if within == "all" else set()
    )


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([*TEXTS, *CHATS]))
def test_other_files_change_a_corpus_and_those_of_its_kind_behind_it(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("keys")
    everything = [*TEXTS, *CHATS]
    options = {"near_duplicates_within": "corpus"}
    before = keys_of(everything, {}, folder, **options)
    after = keys_of(everything, {corpus.name: 2}, folder, **options)
    behind = everything[everything.index(corpus) :]
    assert changed(before, after) == {other.name for other in behind if other.kind == corpus.kind}


@pytest.mark.parametrize(
    "options",
    [
        {"decontaminate_ngram": 11},
        {"heldout_fraction": 0.3},
        {"languages": ("de",)},
        {"shard_bytes": 1 << 20},
        {"max_heldout_tokens": 1},
    ],
)
def test_an_option_changes_every_key_and_a_runtime_option_none(tmp_path, options):
    everything = [*TEXTS, *CHATS]
    before = keys_of(everything, {}, tmp_path)
    assert changed(before, keys_of(everything, {}, tmp_path, **options)) == {c.name for c in everything}
    assert changed(before, keys_of(everything, {}, tmp_path, workers=7, max_malformed_share=0.5)) == set()


def test_a_trained_tokenizer_depends_on_every_text_and_no_conversation():
    config = DataConfig(corpora=tuple(c.name for c in (*TEXTS, *CHATS)))

    def compute(chosen, sizes):
        sources = {c.name: [SourceFile("a", sizes.get(c.name, 1), None)] for c in chosen}
        return compute_keys(config, 0, chosen, {}, sources, None, None)

    before = compute([*TEXTS, *CHATS], {})
    assert compute([*TEXTS, *CHATS], {"chat3": 2}).tokenizer == before.tokenizer
    after = compute([*TEXTS, *CHATS], {"text3": 2})
    assert after.tokenizer != before.tokenizer and changed(before.corpora, after.corpora) == before.corpora.keys()


def test_every_corpus_of_the_catalogue_has_a_key():
    config = DataConfig(corpora=tuple(CATALOGUE))
    corpora, _ = select_corpora(config, {})
    sources = {c.name: [SourceFile("a", 1, None)] for c in corpora if isinstance(c.source, RemoteFiles)}
    keys = compute_keys(config, 0, corpora, {}, sources, None, None).corpora
    assert keys.keys() == {c.name for c in corpora} and len(set(keys.values())) == len(keys)
