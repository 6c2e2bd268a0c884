"""The whole data step on a small subset: what it drops, what it keeps, and that a kill -9 changes nothing."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from streaming.base.compression import decompress
from streaming.base.format import reader_from_json
from transformers import AutoTokenizer

from data.pipeline import prepare
from data.tokens import mds
from data.tokens.verify_shards import verify_shards
from data.work_folder import is_finished
from tests.data.planted import CONFIG, NUM_PAGES, Preparation, plant

REPOSITORY = Path(__file__).parents[2]


def samples(folder: Path) -> list[dict]:
    """Every sample of an MDS folder, through streaming's own reader, hashes checked."""
    found = []
    for info in json.loads((folder / "index.json").read_text())["shards"]:
        shard = reader_from_json(str(folder), None, info)
        shard.validate(False)
        zipped = (folder / info["zip_data"]["basename"]).read_bytes()
        (folder / info["raw_data"]["basename"]).write_bytes(decompress(info["compression"], zipped))
        found += [shard[index] for index in range(len(shard))]
        (folder / info["raw_data"]["basename"]).unlink()
    return found


def texts(prepared: Preparation, prefix: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(prepared.out / "tokenizer")
    return [tokenizer.decode(s["tokens"][1:-1]) for f in sorted(prepared.out.glob(prefix)) for s in samples(f)]


def test_planted_rows_are_counted_out(prepared):
    entry = prepared.manifest["corpora"]["planted"]
    assert entry["read"] == NUM_PAGES + 2 + 1 + 2  # 59 clean, 3 extra, 3 malformed
    assert entry["malformed"] == 3
    assert entry["exact_duplicates"] == 1
    assert entry["near_duplicates"] == 1
    assert entry["contaminated"] == {"bakery": 1}
    assert entry["kept"] == NUM_PAGES - 1
    assert prepared.manifest["decontamination"]["hits"] == {"bakery": {"planted": 1}}
    assert prepared.manifest["decontamination"]["benchmarks"] == {
        "bakery": {"items": 1, "runs": 18, "too_short": 0}, "short": {"items": 1, "runs": 0, "too_short": 1},
    }  # fmt: skip


def test_duplicates_are_found_across_corpora_and_the_first_named_keeps_its_own(prepared):
    entry = prepared.manifest["corpora"]["mirror"]
    assert (entry["read"], entry["exact_duplicates"], entry["near_duplicates"]) == (12, 1, 1)
    assert entry["kept"] == 10 and prepared.manifest["corpora"]["planted"]["kept"] == NUM_PAGES - 1


def test_a_corpus_for_midtraining_alone_is_not_pretrained_on(prepared):
    assert set(prepared.manifest["corpora"]["mirror"]["splits"]) <= {"midtrain", "heldout"}


def test_addresses_are_redacted_and_counted(prepared):
    assert prepared.manifest["corpora"]["mirror"]["redacted"] == 1
    everything = texts(prepared, "*/*/web")
    assert not any("jane.doe" in text for text in everything)
    assert any("example." in text for text in everything)


def test_manifest_names_inputs_versions_and_filters(prepared):
    source = prepared.source / "mirror/a.jsonl"
    (named,) = prepared.manifest["corpora"]["mirror"]["inputs"]
    assert named["checksum"] == f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()}"
    assert prepared.manifest["versions"]["datatrove"] == importlib.metadata.version("datatrove")
    assert [block["label"] for block in prepared.manifest["filters"]] == list(CONFIG.filters)
    assert prepared.manifest["language"]["not_run"]  # no package was given
    assert prepared.manifest["corpora"]["planted"]["language_filtered"] == "English <by its publisher>"
    assert prepared.manifest["corpora"]["planted"]["quality_filtered"] == ""
    assert "English &lt;by its publisher&gt;" in (prepared.out / "statistics.html").read_text()


def test_malformed_rows_are_set_aside_with_a_reason(prepared):
    files = (prepared.out / "set_aside" / "malformed").glob("planted.*.jsonl")
    reasons = [json.loads(line)["reason"] for file in files for line in file.read_text().splitlines()]
    assert len(reasons) == 3
    assert any(reason.startswith("json:") for reason in reasons)
    assert "text is null, not a string" in reasons


def test_contaminated_document_is_set_aside_and_its_neighbours_are_kept(prepared):
    files = (prepared.out / "set_aside" / "contaminated").glob("*.jsonl.gz")
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    dropped = [json.loads(line) for line in lines]
    assert [document["metadata"]["filter_reason"] for document in dropped] == ["bakery"]
    assert not any("seven trays of rolls" in text for text in texts(prepared, "*/*/web"))


def test_kept_texts_are_distinct_and_in_one_part_only(prepared):
    kept = {part: texts(prepared, f"{part}/web") for part in ("shards/pretrain", "shards/midtrain", "heldout/pretrain")}
    everything = [text for part in kept.values() for text in part]
    assert all(kept.values())
    assert len(everything) == len(set(everything)) == NUM_PAGES - 1 + 10


def test_documents_begin_with_bos_and_end_with_eos(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared.out / "tokenizer")
    for sample in samples(prepared.out / "shards/pretrain/web"):
        assert sample["tokens"].dtype == np.uint32
        assert (sample["tokens"][0], sample["tokens"][-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_sft_masks_decode_to_the_answers_alone(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared.out / "tokenizer")
    for sample in samples(prepared.out / "shards/sft/tool_use"):
        assert sample["loss_mask"].dtype == np.uint8
        call, answer, rest = tokenizer.decode(sample["tokens"][sample["loss_mask"] == 1]).split("<|eot_id|>")
        assert set(json.loads(call)) == {"name", "arguments"}
        assert answer.startswith("The result is ")
        assert rest == ""


def test_manifest_counts_what_the_shards_hold(prepared):
    for stage, kind in (("shards/pretrain", "text"), ("shards/sft", "sft"), ("heldout/pretrain", "text")):
        for domain in (prepared.out / stage).iterdir():
            top, name = stage.split("/")
            entry = prepared.manifest[top][name][domain.name]
            read = samples(domain)
            assert entry["documents"] == len(read)
            assert entry["tokens"] == sum(len(sample["tokens"]) for sample in read)
            trained = [s["loss_mask"].sum() if kind == "sft" else len(s["tokens"]) - 1 for s in read]
            assert entry["trained_tokens"] == sum(trained)


def test_entropy_is_that_of_the_held_out_tokens(prepared):
    tokens = np.concatenate([s["tokens"][1:] for s in samples(prepared.out / "heldout/pretrain/web")])
    _, counts = np.unique(tokens, return_counts=True)
    p = counts / counts.sum()
    entropy = prepared.manifest["unigram_entropy_nats"]["heldout_text"]["web"]
    assert entropy == pytest.approx(-(p * np.log(p)).sum())


def test_missing_packages_fall_back_and_say_so(prepared):
    assert {entry["corpus"]: entry["fallback"] for entry in prepared.manifest["missing"]} == {
        "wikipedia-plain": "python-topics",
        "tool-calls": "generated-tool-calls",
    }
    assert set(prepared.manifest["corpora"]) == {"planted", "mirror", "python-topics", "generated-tool-calls"}
    assert prepared.manifest["corpora"]["python-topics"]["licence"] == "PSF-2.0"


def test_tokenizer_is_as_the_manifest_says(prepared):
    assert len(AutoTokenizer.from_pretrained(prepared.out / "tokenizer")) == 1024
    assert prepared.manifest["tokenizer"]["vocab_size"] == 1024


def test_working_files_are_gone_and_every_phase_was_reported_done(prepared):
    assert not (prepared.out / "work").exists()
    finished = {phase for phase, done, total in prepared.reports if done == total}
    assert len(finished) == 10
    assert json.loads((prepared.out / "data_manifest.json").read_text()) == prepared.manifest


def test_a_full_disk_and_two_kills_change_nothing(prepared, tmp_path, monkeypatch):
    """One folder through all of them: each run goes on where the one before was cut off."""
    out = tmp_path / "out"
    script = [sys.executable, "-m", "tests.data.killed_prepare", prepared.source, prepared.benchmark_texts, out]
    ended = subprocess.run(list(map(str, script)), cwd=REPOSITORY, capture_output=True, text=True, check=True)
    full, *killed = json.loads(ended.stdout)
    assert full == {"exitcode": 1, "finished": False, "first_step_done_at": None}
    assert "data step '1-read-and-filter': ranks" in ended.stderr and "File too large" in ended.stderr
    assert [end["exitcode"] for end in killed] == [-signal.SIGKILL] * 2, ended.stderr
    assert not any(end["finished"] for end in killed)

    plant(monkeypatch, prepared.source)
    marker = out / "work" / "logs" / "1-read-and-filter" / "completions" / "00000"
    seen = {end["first_step_done_at"] for end in killed}

    def progress(phase, done, total):
        if marker.exists():
            seen.add(marker.stat().st_mtime_ns)

    manifest = prepare(CONFIG, packages={}, benchmark_texts=prepared.benchmark_texts, out=out, progress=progress)
    assert manifest == prepared.manifest
    assert len(seen) == 1  # the first step was not run again
    assert not list(out.rglob("*.partial")) and not (out / ".lock").exists()
    for index in prepared.out.rglob("index.json"):
        assert (out / index.relative_to(prepared.out)).read_text() == index.read_text()
    verify_shards(out)


def test_finished_folder_is_returned_as_it_is(prepared, monkeypatch):
    plant(monkeypatch, prepared.source)
    before = (prepared.out / "data_manifest.json").stat().st_mtime_ns
    again = prepare(
        CONFIG, packages={}, benchmark_texts=prepared.benchmark_texts, out=prepared.out, progress=lambda *_: None
    )
    assert again == prepared.manifest
    assert (prepared.out / "data_manifest.json").stat().st_mtime_ns == before


def test_damaged_files_are_named_and_the_other_units_are_kept(prepared, tmp_path, monkeypatch):
    source = tmp_path / "source [1]"
    shutil.copytree(prepared.source, source)
    # Half of the bytes are in a and b, so the first unit has these, and the second one y and z.
    whole = gzip.compress(b"".join((source / name).read_bytes() for name in ("a.jsonl", "b.jsonl")), compresslevel=0)
    for name in ("y.jsonl", "z.jsonl"):
        (source / name).write_bytes(whole[: len(whole) // 2])
    plant(monkeypatch, source)
    config = dataclasses.replace(CONFIG, corpora=("planted", "mirror"))
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match=r"data step '1-read-and-filter': ranks \[1\] of 3 did not") as caught:
        prepare(config, packages={}, benchmark_texts=None, out=out, progress=lambda *_: None)
    message = str(caught.value)
    assert "rank 1 (planted.00001): DamagedData: 2 of 2 files of planted.00001 cannot be used" in message
    for name in ("y.jsonl", "z.jsonl"):
        assert re.search(rf"{re.escape(str(source / name))} cannot be read .*byte [\d,]+: EOFError", message)
    completed = (out / "work/logs/1-read-and-filter/completions").iterdir()
    assert sorted(path.name for path in completed) == ["00000", "00002"]


def test_interrupted_join_goes_on(tmp_path):
    parts = tmp_path / "parts"
    for rank in range(3):
        with mds.make_writer(parts / f"{rank:05d}" / "shards/sft/math", "sft", 1 << 20) as writer:
            for value in range(rank + 1):
                tokens = np.arange(value + 3, dtype=np.uint32)
                writer.write({"tokens": tokens, "loss_mask": (tokens % 2).astype(np.uint8)})
    beside = tmp_path / "out/shards/sft/math.partial"
    beside.mkdir(parents=True)
    shard = parts / "00000/shards/sft/math/shard.00000.mds.zstd"
    shard.rename(beside / "a-1.00000.mds.zstd")  # as if killed after the first rename
    folders = [("a-1", parts / "00000"), ("a-1", parts / "00001"), ("b-2", parts / "00002")]
    entry = mds.assemble(folders, tmp_path / "out", "shards/sft/math", "abc")
    index = json.loads((tmp_path / "out/shards/sft/math/index.json").read_text())
    assert index["vocabulary_sha256"] == "abc" and entry["shards"] == len(index["shards"]) == 3
    names = [shard["zip_data"]["basename"] for shard in index["shards"]]
    assert names == ["a-1.00000.mds.zstd", "a-1.00001.mds.zstd", "b-2.00000.mds.zstd"]
    read = samples(tmp_path / "out/shards/sft/math")
    assert [len(sample["tokens"]) for sample in read] == [3, 3, 4, 3, 4, 5]
    assert all((sample["loss_mask"] == sample["tokens"] % 2).all() for sample in read)


def test_work_of_another_plan_is_put_aside_and_never_replaced(tmp_path):
    out = tmp_path / "data.partial"
    for number in range(3):
        assert not is_finished(out, {"config": number})
        assert not is_finished(out, {"config": number}), "the same plan goes on with its work"
        for folder in ("work/read", "shards"):
            (out / folder).mkdir(parents=True)
        (out / "shards" / "index.json").write_text(str(number))
    begun = tmp_path / "begun"
    assert not is_finished(begun, {"config": 0}) and not is_finished(begun, {"config": 1})
    assert not (tmp_path / "begun.former").exists(), "a plan alone is no work"
    former = [tmp_path / name for name in ("data.partial.former", "data.partial.former-2")]
    assert [(folder / "shards/index.json").read_text() for folder in former] == ["0", "1"]
    assert all((folder / "work/read").is_dir() for folder in former)
    assert json.loads((former[1] / "work/plan.json").read_text()) == {"config": 1}
    assert (out / "shards/index.json").read_text() == "2"
