"""Steps that get no documents do nothing, or fail with the reason, and never wait or make something of nothing."""

import json

import fsspec
import pytest
from datatrove.data import Document

from data import pipeline
from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Unit
from data.config import DataConfig
from data.filters import dedup
from data.filters.exact_dedup import ExactFilter, ExactFind, ExactSignature

TEXT = next(corpus for corpus in CATALOGUE.values() if corpus.kind == "text")


def documents(*texts: str) -> list[Document]:
    return [Document(text=text, id=text, metadata={"corpus": "c", "kind": "text"}) for text in texts]


@pytest.mark.parametrize("texts", [(), ("one two three four five six", "too short to sign")])
def test_deduplication_without_documents_in_a_rank_or_in_all(texts, tmp_path):
    ranks = [list(texts), []]
    for rank, found in enumerate(ranks):
        ExactSignature(tmp_path).run(documents(*found), rank, 2)
    ExactFind(tmp_path, [0, 0]).run(None, 0, 1)
    exact = [ExactFilter(tmp_path, 2, 1).run(documents(*found), rank, 2) for rank, found in enumerate(ranks)]
    assert [[document.text for document in kept] for kept in exact] == ranks
    for rank, found in enumerate(ranks):
        dedup.make_near_signature(tmp_path / "near", ["a", "b"]).run(documents(*found), rank, 2)
    for make in (dedup.make_near_buckets, dedup.make_near_cluster):
        block, labels = make(tmp_path / "near", ["a", "b"])
        for task in range(len(labels)):
            block.run(None, task, len(labels))
    near = [
        dedup.make_near_filter(tmp_path / "near").run(documents(*found), rank, 2) for rank, found in enumerate(ranks)
    ]
    assert [[document.text for document in kept] for kept in near] == ranks


@pytest.mark.parametrize("split", [None, "midtrain"])
def test_no_tokenizer_is_trained_on_no_text(split, tmp_path):
    if split:
        clean = tmp_path / "work/clean"
        clean.mkdir(parents=True)
        with fsspec.open(str(clean / "00000.jsonl.zst"), "wt", compression="infer") as file:
            file.write(json.dumps({"text": "A text.", "id": "1", "metadata": {"split": split}}))
    with pytest.raises(RuntimeError, match=r"data\.tokenizer: no document is left for pre-training"):
        pipeline._make_tokenizer(DataConfig(corpora=(TEXT.name,)), [Unit(TEXT, "", 0, 0)], tmp_path, lambda *_: None)
    assert not (tmp_path / "tokenizer").exists()
