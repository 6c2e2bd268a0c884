"""ShardStore beyond damaged shards: other tokenizers, fetching ahead, full disks, repeated epochs, light imports."""

import hashlib
import json
import logging
import multiprocessing
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from transformers import PreTrainedTokenizerFast

from core.errors import DamagedData, RefusedInput
from core.samples import VOCABULARY_KEY, hash_vocabulary
from tests.titan_ext.stage_of_shards import MIXTURE, G, build, sequences, write_domain
from titan_ext.loader.streaming_loader import StreamingLoader

REPOSITORY = Path(__file__).parents[2]


def tokenizer(folder, words: list[str]) -> HuggingFaceTokenizer:
    """Make a tokenizer of the class that torchtitan gives to the loader."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return HuggingFaceTokenizer(tokenizer_path=str(folder))


def write_stage(root, vocabulary: dict[str, int] | None):
    write_domain(root / "web", [[1, 2, 3]] * 4)
    if vocabulary is not None:
        index = root / "web/index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {VOCABULARY_KEY: hash_vocabulary(vocabulary)}))
    return str(root)


def load(shards: str, cache, given) -> StreamingLoader:
    config = StreamingLoader.Config(shards=shards, local=str(cache), global_batch_size=1, pad_token_id=0)
    return config.build(
        dp_world_size=1, dp_rank=0, tokenizer=given, seq_len=8, local_batch_size=1, snapshot_every_n_steps=1
    )


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    own = tokenizer(tmp_path / "own", ["a", "b", "c", "d"])
    other = tokenizer(tmp_path / "other", ["a", "b", "d", "c"])
    shards = write_stage(tmp_path / "stage", own.get_vocab())
    assert next(iter(load(shards, tmp_path / "cache", own)))
    with pytest.raises(RefusedInput, match=r"shards of \['web'\] were written with another tokenizer.*hf_assets_path"):
        load(shards, tmp_path / "cache", other)


def test_shards_that_do_not_say_and_loaders_without_tokenizer_pass(tmp_path):
    own = tokenizer(tmp_path / "own", ["a", "b", "c", "d"])
    assert load(write_stage(tmp_path / "silent", None), tmp_path / "cache", own)
    assert load(write_stage(tmp_path / "said", {"x": 0}), tmp_path / "cache", None)


def test_the_hash_of_a_vocabulary_depends_on_the_ids_alone():
    vocabulary = {"Ġthe": 1, "é": 0, "<|eot_id|>": 2, "\t": 3}
    assert hash_vocabulary(vocabulary) == hash_vocabulary(dict(reversed(vocabulary.items())))
    assert hash_vocabulary(vocabulary) != hash_vocabulary(vocabulary | {"é": 3, "\t": 0})
    by_hand = b"0\t\xc3\xa9\n1\t\xc4\xa0the\n2\t<|eot_id|>\n3\t\t\n"
    assert hash_vocabulary(vocabulary) == hashlib.sha256(by_hand).hexdigest()


def test_shards_are_fetched_ahead_of_their_documents(stage, tmp_path):
    loader = build(stage, tmp_path, mixture={"web": 1.0}, global_batch_size=1)
    sequences([loader], 1)
    (domain,) = loader._domains
    share = domain.take_share(0, 0)
    assert {share.locate(p)[0] for p in range(share.find_slot(0) + 1)} == {share.list_shards(0)[0]}
    ahead = share.list_shards(0)[1]
    assert domain.store.path(ahead).exists()


def test_a_cache_too_small_to_hold_what_is_ahead_fetches_when_asked(stage, cache, tmp_path):
    expected = sequences([build(stage, cache)], 4 * G)
    np.testing.assert_array_equal(sequences([build(stage, tmp_path, cache_bytes=6000)], 4 * G), expected)
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.mds")) <= 6000


def _read_with_little_room(stage, cache, result):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        sequences([build(stage, cache)], 4 * G)
    except OSError as error:
        result.put(str(error))


def test_a_full_cache_disk_is_named_and_the_next_start_goes_on(stage, cache, tmp_path):
    context = multiprocessing.get_context("fork")
    (tmp_path / "full").mkdir()
    build(stage, tmp_path / "full")  # the indexes, which are larger than the limit, are there
    result = context.Queue()
    worker = context.Process(target=_read_with_little_room, args=(stage, tmp_path / "full", result), daemon=True)
    worker.start()
    assert "Make room there, or name another folder as the loader's `local`" in result.get(timeout=60)
    worker.join()
    expected = sequences([build(stage, cache)], 4 * G)
    np.testing.assert_array_equal(sequences([build(stage, tmp_path / "full")], 4 * G), expected)


def test_a_domain_that_begins_again_is_reported(stage, cache, caplog):
    with caplog.at_level(logging.WARNING, "titan_ext.loader.domain"):
        sequences([build(stage, cache, mixture={"code": 1.0})], 12 * G)
    said = [record.getMessage() for record in caplog.records]
    assert "domain code: epoch 2 begins, its documents repeat" in said
    assert len(said) == len(set(said))


def test_an_index_that_miscounts_a_shard_is_refused(tmp_path):
    write_domain(tmp_path / "s/web", [[1, 2, 3]] * 4)
    index = tmp_path / "s/web/index.json"
    content = json.loads(index.read_text())
    content["shards"][0]["samples"] += 1
    index.write_text(json.dumps(content))
    with pytest.raises(DamagedData, match=r"shard\.00000"):
        sequences([build(tmp_path / "s", tmp_path / "cache", mixture={"web": 1.0})], 2 * G)


def test_a_process_that_ends_while_shards_are_prepared_ends_well(tmp_path):
    rng = np.random.default_rng(0)
    for name in MIXTURE:
        write_domain(tmp_path / "s" / name, rng.integers(0, 50_000, (200, 2000)), size_limit=1 << 17)
    script = [sys.executable, "-m", "tests.titan_ext.end_while_prefetching", tmp_path / "s", tmp_path / "caches", "3"]
    ended = subprocess.run(list(map(str, script)), cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ended.stdout == "{0: 3}\n", ended.stderr


def test_reading_shards_needs_no_training_stack():
    """A program that only reads shards, as the held-out loss does, must not wait for the import of torchtitan."""
    script = "import sys, titan_ext.loader.domain; print(sorted({'torchtitan', 'torchao'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
